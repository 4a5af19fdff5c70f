"""Training arguments of the rivals that learn from text first and from visual rows later."""

from dataclasses import dataclass, field

import torch

from sparrow_hf.training import SparrowTrainingArguments


@dataclass
class CurriculumArguments(SparrowTrainingArguments):
    r"""As [`SparrowTrainingArguments`]; a sample may show no visual rows in a step, the more seldom the later it is.

    Raises:
        ValueError: A share is not in 0 … 1, or the ramp ends before it starts.
    """

    visual_start: float = field(
        default=0.0,
        metadata={"help": "Share of the training's steps before which no sample shows visual rows (text first)."},
    )
    visual_full: float = field(
        default=0.0,
        metadata={"help": "Share of the steps from which on every sample shows them; ever more do until then."},
    )
    visual_dropout: float = field(
        default=0.0, metadata={"help": "Probability that a sample shows no visual rows in one step all the same."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.visual_start <= self.visual_full <= 1 or not 0 <= self.visual_dropout <= 1:
            raise ValueError(
                "these must be 0 ≤ visual_start ≤ visual_full ≤ 1 and 0 ≤ visual_dropout ≤ 1; found "
                f"{self.visual_start}, {self.visual_full} and {self.visual_dropout}"
            )

    def visual_odds(self, progress: float) -> float:
        """Probability that a sample shows its visual rows after this share (0 … 1) of the steps."""
        ramp = self.visual_full - self.visual_start
        shown = float(progress >= self.visual_start) if ramp == 0 else (progress - self.visual_start) / ramp
        return min(max(shown, 0.0), 1.0) * (1 - self.visual_dropout)

    def draw_visual_rows(self, num_visual_rows: int, progress: float, generator: torch.Generator) -> int:
        """As in the base class, but none where the sample draws to show none."""
        odds = self.visual_odds(progress)
        if odds < 1 and float(torch.rand((), generator=generator)) >= odds:
            return 0
        return super().draw_visual_rows(num_visual_rows, progress, generator)
