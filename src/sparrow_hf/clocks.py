"""Two clocks: one times a `generate()` call from outside, the other adds up the phases of a call from inside."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from ._transformers import unwrap


def now(device: torch.device) -> float:
    """Wall-clock seconds, taken when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StopWatch(BaseStreamer):
    """Times one `generate()` call, in the same way for every arm.

    A streamer and a context manager: `with StopWatch(target) as watch: target.generate(..., streamer=watch)`.

    Args:
        target: The model that generates.
        streamer: Is handed on everything, after the time was taken. What it does counts as time of the call.

    Attributes:
        tokens: Generated tokens.
        chunks: Tokens handed over at once; the first chunk is what the prefill gave.
        prefill_seconds, decode_seconds: Until the first chunk, and from there to the end of the `with` block.
    """

    def __init__(self, target: PreTrainedModel, streamer: BaseStreamer | None = None):
        self.tokens: list[int] = []
        self.chunks: list[int] = []
        self.prefill_seconds = self.decode_seconds = 0.0
        self._target = unwrap(target)
        self._streamer = streamer
        self._saw_prompt = False
        self._start = self._first_token = 0.0

    def __enter__(self) -> "StopWatch":
        self._start = self._first_token = now(self._target.device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.decode_seconds = now(self._target.device) - self._first_token

    def put(self, value: Tensor) -> None:
        if self._saw_prompt:
            if not self.chunks:
                self._first_token = now(self._target.device)
                self.prefill_seconds = self._first_token - self._start
            self.tokens += value.flatten().tolist()
            self.chunks.append(value.numel())
        self._saw_prompt = True
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """The time goes on: the call ends with the `with` block."""
        if self._streamer is not None:
            self._streamer.end()


class PhaseClock:
    """Adds up the time spent in named phases, without ever waiting for the device.

    On CUDA a pair of events brackets each phase and is read only when a total is requested; elsewhere wall-clock time.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Another GPU may be the current one.
            start.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._pending.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def seconds(self, name: str) -> float:
        """Total of one phase so far; waits until the device has finished the phase."""
        while self._pending:
            phase, start, end = self._pending.pop()
            end.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + start.elapsed_time(end) / 1000
        return self._seconds.get(name, 0.0)
