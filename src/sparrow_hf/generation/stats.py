"""What one `generate()` call with a draft did: acceptance and phase times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


class PhaseClock:
    """Adds up the time spent in named phases, without ever waiting for the device.

    On CUDA a pair of events brackets each phase and is only read when somebody asks; elsewhere wall-clock time.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._on_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def seconds(self, name: str) -> float:
        """Total of one phase so far; waits for the device if it has not got there yet."""
        while self._pending:
            phase, start, end = self._pending.pop()
            end.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + start.elapsed_time(end) / 1000
        return self._seconds.get(name, 0.0)


@dataclass
class GenerationStats:
    """Statistics of one call. Filled in while the call runs, so a streamer may look.

    Attributes:
        num_draft_levels: Most tokens a round of this call could accept.
        new_tokens: Tokens generated, the first one (which the prefill gives) included.
        accepted: Accepted draft tokens of each round; a round is one target forward after the prefill.
        max_draft_cache_length: Most rows the draft's cache ever held (text, glimpse and tree together).
        failed_drafts: Rounds in which the draft's scores were not numbers and nothing was drafted.
    """

    num_draft_levels: int
    clock: PhaseClock = field(repr=False)
    new_tokens: int = 0
    accepted: list[int] = field(default_factory=list)
    max_draft_cache_length: int = 0
    failed_drafts: int = 0

    @property
    def rounds(self) -> int:
        """Target forwards after the prefill."""
        return len(self.accepted)

    @property
    def k(self) -> float:
        """Accepted draft tokens per round."""
        return sum(self.accepted) / self.rounds if self.rounds else 0.0

    @property
    def tau(self) -> float:
        """Tokens per target forward after the prefill (τ). `k + 1`, but for a last round that stops on a draft."""
        return (self.new_tokens - 1) / self.rounds if self.rounds else 0.0

    @property
    def per_position(self) -> list[float]:
        """`a_j = P(k ≥ j)`, j = 1 … `num_draft_levels`: how often the j-th drafted token of a round was accepted."""
        return [
            sum(accepted >= position for accepted in self.accepted) / self.rounds if self.rounds else 0.0
            for position in range(1, self.num_draft_levels + 1)
        ]

    @property
    def prefill_seconds(self) -> float:
        """Target forward over the prompt (the video encoder, which `generate()` runs before it, excluded)."""
        return self.clock.seconds("prefill")

    @property
    def draft_seconds(self) -> float:
        """Draft prefill, draft forwards and tree building."""
        return self.clock.seconds("draft")

    @property
    def verify_seconds(self) -> float:
        """Target forwards over the trees, the walk and the commit."""
        return self.clock.seconds("verify")

    @property
    def decode_seconds(self) -> float:
        """Everything after the target's prefill: draft and verification."""
        return self.draft_seconds + self.verify_seconds
