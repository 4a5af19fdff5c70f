"""What one `generate()` call with a draft did: acceptance and phase times."""

from dataclasses import dataclass, field

from .. import metrics
from ..clocks import PhaseClock


@dataclass
class GenerationStats:
    """Statistics of one call. They are updated while the call runs, so a streamer can read them.

    Attributes:
        num_draft_levels: Maximum number of tokens that a round of this call could accept.
        new_tokens: Tokens generated, the first one (which the prefill gives) included; of all sequences together,
            without the padding of finished ones.
        accepted: Accepted draft tokens of each round; a round is one target forward after the prefill. In a batch, a
            forward has one entry for every sequence that was drafted for.
        max_draft_cache_length: Maximum length of the draft's cache (text, glimpse and tree together).
        num_sequences: Sequences of the call.
        failed_drafts: Rounds in which the draft's scores were not numbers and nothing was drafted.
    """

    num_draft_levels: int
    clock: PhaseClock = field(repr=False)
    num_sequences: int = 1
    new_tokens: int = 0
    accepted: list[int] = field(default_factory=list)
    max_draft_cache_length: int = 0
    failed_drafts: int = 0

    @property
    def rounds(self) -> int:
        """Target forwards after the prefill; in a batch, each counts once for every sequence that was drafted for."""
        return len(self.accepted)

    @property
    def k(self) -> float:
        """Accepted draft tokens per round."""
        return metrics.accepted_per_round(sum(self.accepted), self.rounds)

    @property
    def tau(self) -> float:
        """Tokens of a sequence per target forward after the prefill (τ).

        It is `k + 1`, except if a last round ends with a draft.
        """
        return metrics.tau(self.new_tokens - self.num_sequences, self.rounds)

    @property
    def per_position(self) -> list[float]:
        """`a_j = P(k ≥ j)`, j = 1 … `num_draft_levels`: how often the j-th drafted token of a round was accepted."""
        return metrics.per_position(metrics.count_reaching(self.accepted, self.num_draft_levels), self.rounds)

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
