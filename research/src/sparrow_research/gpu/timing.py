"""Times of what runs on the device, and which kernels it starts."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def synchronize(device: torch.device) -> None:
    """Waits until all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int, warm_ups: int = 2) -> dict[str, Any]:
    """Median and range of several calls, after the first ones."""
    for _ in range(warm_ups):
        function()
    return spread([seconds(function, device) * 1000 for _ in range(repeats)])


def spread(values: list[float]) -> dict[str, Any]:
    """Their median, least and greatest."""
    return {"ms": statistics.median(values), "least_ms": min(values), "most_ms": max(values)}


def kernels(function: Callable[[], Any], device: torch.device) -> dict[str, dict[str, float]] | None:
    """Kernel → how often one call starts it, and its microseconds together; `None` without a GPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        synchronize(device)
    found = {
        event.key: {"count": event.count, "us": event.self_device_time_total}
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and not _waits(event.key)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def _waits(name: str) -> bool:
    """Whether what the profiler shows of the device is no work but a wait."""
    return name.endswith(("Sync", "Wait Event"))


def peak_gigabytes(function: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory of the device that was taken during one call, weights and caches included."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`function` as one CUDA graph, and the outputs that every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs
