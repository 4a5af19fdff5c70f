"""One function of fixed shapes, run many times: compiled by torch, and on CUDA replayed as one graph of kernels."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Of a process, one capture at a time.
_CAPTURING = threading.Lock()

#: Runs before a capture: libraries choose their kernels and take their workspace in the first ones.
_WARM_UPS = 2


def traces_steps() -> bool:
    """Whether this torch can trace a step in one graph."""
    return torch.__version__ >= "2.11"


class FixedStep:
    """Runs `function`, which takes nothing, reads buffers that stay in place and returns tensors.

    Running it again must be harmless, whatever it wrote: it is run several times before it is captured. What it
    returns holds until it runs again.

    Args:
        function: Reads and writes buffers of fixed shapes and makes no decision on their values.
        device: Where it runs. On CUDA its kernels are captured at first use, and launched as one graph afterwards.
        compile_config: How `torch.compile` translates the function; `None`: not at all.
    """

    def __init__(
        self, function: Callable[[], Any], device: torch.device, compile_config: dict[str, Any] | None = None
    ):
        self._function = function if compile_config is None else compiled(function, compile_config)
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None

    def __call__(self) -> Any:
        if self._device.type != "cuda":
            return self._function()
        if self._graph is None:
            with torch.cuda.device(self._device):
                self._capture()
        else:
            self._graph.replay()
        return self._outputs

    def _capture(self) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device, whichever was captured on before; other threads may go on with their own work.
        with _CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = self._function()
        graph.replay()
        self._graph = graph


def compiled(function: Callable[[], Any], compile_config: dict[str, Any]) -> Callable[[], Any]:
    """`torch.compile` for fixed shapes, in one graph; announces itself, since the first run takes seconds to minutes.

    Args:
        compile_config: Arguments of `torch.compile`. Its own CUDA graphs are left out: a step is captured as a whole.
    """
    options = compile_config | {"fullgraph": True, "dynamic": False}
    modes = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
    options["mode"] = modes.get(options.get("mode", "default"), options.get("mode"))
    translated = torch.compile(function, **options)
    is_first = True

    def run() -> Any:
        nonlocal is_first
        if is_first:
            logger.warning("compiling %s: the first call takes longer", function.__qualname__)
            # Every bucket of lengths is a graph of its own.
            with torch._dynamo.config.patch(recompile_limit=128):
                outputs = translated()
            is_first = False
            return outputs
        return translated()

    return run
