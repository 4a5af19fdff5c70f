"""Times `generate()` from outside, the same way whoever does the decoding."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .targets import unwrap


class StopWatch(BaseStreamer):
    """Times one `generate()` call from outside and counts the target's forwards; use it as a context manager.

    Attributes:
        tokens: Generated tokens.
        chunks: Tokens handed over at once; the first chunk is what the prefill gave.
        rounds: Target forwards after the first chunk.
        prefill_seconds, decode_seconds: Until the first chunk, and from there to the end of the `with` block.
    """

    def __init__(self, target: PreTrainedModel):
        self.tokens: list[int] = []
        self.chunks: list[int] = []
        self.rounds = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._target = unwrap(target)
        self._saw_prompt = False
        self._forwards = 0
        self._start = self._first_token = 0.0

    def __enter__(self) -> "StopWatch":
        self._hook = self._target.register_forward_pre_hook(self._count)
        self._start = self._first_token = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        self.decode_seconds = self._now() - self._first_token
        self._hook.remove()

    @property
    def seconds_per_token(self) -> float:
        """Seconds per token after the prefill; 0 if there was none."""
        decode_tokens = sum(self.chunks[1:])
        return self.decode_seconds / decode_tokens if decode_tokens else 0.0

    def _count(self, *args: object) -> None:
        self._forwards += 1
        # A round counts when its forward begins; the forwards before the first token are the prefill.
        self.rounds += bool(self.chunks)

    def _now(self) -> float:
        if self._target.device.type == "cuda":
            torch.cuda.synchronize(self._target.device)
        return time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        if not self.chunks:
            self._first_token = self._now()
            self.prefill_seconds = self._first_token - self._start
        self.tokens += value.flatten().tolist()
        self.chunks.append(value.numel())

    def end(self) -> None:
        """Nothing to do: the call ends with the `with` block."""
