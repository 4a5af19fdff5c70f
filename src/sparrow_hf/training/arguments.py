"""`SparrowTrainingArguments`: what to optimise, which rows a step sees, and the two recipes."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from .losses import SCORE_LOSSES, STATE_LOSSES

#: `num_visual_rows_*`: every visual row of the sample.
ALL_VISUAL_ROWS = -1

#: Named recipes, as fields of [`SparrowTrainingArguments`]. `"paper"` is Sparrow's: every visual row in training
#: (IVSB), passes by causal re-input, and the losses and optimiser of ViSpec, whose code it descends from (its own are
#: not published). `"default"` is the glimpse's: nothing measured better on the testbed (docs/recipes.md).
TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "probability_l1_weight": 10.0,
        "list_mle_weight": 0.1,
        "soft_cross_entropy_weight": 0.0,
        "feature_smooth_l1_weight": 0.0,
        "hidden_state_noise": 0.2,
        "num_visual_rows_min": ALL_VISUAL_ROWS,
        "num_visual_rows_max": ALL_VISUAL_ROWS,
        "mtp_attention": "reinput",
        "learning_rate": 3e-5,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
    },
    "default": {},
}

#: What the recipes say of the draft itself, as fields of [`SparrowDraftConfig`].
DRAFT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"num_mtp_steps": 2, "num_glimpse_tokens": 0},
    "default": {},
}


@dataclass
class SparrowTrainingArguments(TrainingArguments):
    r"""Arguments of a [`SparrowTrainer`]: those of [`~transformers.TrainingArguments`], the loss mix and the recipe.

    The number of passes (MTP) and everything else that shapes the draft is read from `draft.config`, so that a
    checkpoint says how it was trained. The loss of a step is the sum over passes of the weighted losses below, summed
    over the pass's rows and divided by the number of rows of the first pass.

    Raises:
        ValueError: A weight is negative, all weights are zero, or a range is empty.
    """

    soft_cross_entropy_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy against the target's probabilities."}
    )
    probability_l1_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the L1 distance of the two probability vectors, summed over the vocabulary."},
    )
    list_mle_weight: float = field(
        default=0.0, metadata={"help": "Weight of ListMLE on the order of the target's ten most probable tokens."}
    )
    feature_smooth_l1_weight: float = field(
        default=0.2,
        metadata={
            "help": "Weight of the smooth L1 distance to the target's post-norm state, averaged over its width."
        },
    )
    hidden_state_noise: float = field(
        default=0.0,
        metadata={
            "help": "Scale a of the uniform noise (U[0,1) − 0.5)·a·512/T on the target's text states; T is the number "
            "of rows of the draft's sequence."
        },
    )
    num_visual_rows_min: int = field(
        default=0,
        metadata={"help": "Fewest random visual rows a sample shows the draft in one step; −1: all of them."},
    )
    num_visual_rows_max: int = field(
        default=64,
        metadata={
            "help": "Most random visual rows a sample shows the draft in one step. −1 for both bounds: every row, as "
            "in the paper (IVSB); 0 for both: text rows only."
        },
    )
    mtp_attention: Literal["exact", "reinput"] = field(
        default="exact",
        metadata={
            "help": "What later passes attend to: 'exact' is what decoding sees (training-time test); 'reinput' lets "
            "every pass see its own keys only (paper)."
        },
    )
    mtp_loss_decay: float = field(
        default=1.0, metadata={"help": "Weight of pass s is this to the power s; 1.0 weighs every pass the same."}
    )

    on_bad_row: Literal["refuse", "skip"] = field(
        default="refuse",
        metadata={"help": "Bad rows end the training ('refuse'), or are left out and reported ('skip')."},
    )
    fps: float | None = field(
        default=None, metadata={"help": "Frames per second to read of video files; by default every frame."}
    )
    max_frames: int | None = field(default=None, metadata={"help": "Most frames to read of each video file."})

    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without gradient in every pass; there are none."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Send the draft's buffers around in every pass; they never change."}
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Written to the draft's configuration: it decodes with a cache."}
    )
    # Rows are dictionaries that no model signature describes.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the columns go to the target's processor, not the draft."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # accelerate would cut streamed batches along their tensors' first dimension, which here is not the row:
            # every process reads the stream and takes its own rows instead.
            self.accelerator_config.dispatch_batches = False
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the draft's signature names none of the columns")
        weights = self.loss_weights
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"loss weights must not be negative, and one must be positive; found {weights}")
        low, high = self.num_visual_rows_min, self.num_visual_rows_max
        if not (low == high == ALL_VISUAL_ROWS or 0 <= low <= high):
            raise ValueError(
                "num_visual_rows_min and num_visual_rows_max must be 0 ≤ min ≤ max, or both −1; found "
                f"{low} and {high}"
            )
        if self.mtp_attention not in ("exact", "reinput"):
            raise ValueError(f"mtp_attention must be 'exact' or 'reinput', found {self.mtp_attention!r}")
        if self.on_bad_row not in ("refuse", "skip"):
            raise ValueError(f"on_bad_row must be 'refuse' or 'skip', found {self.on_bad_row!r}")

    def draw_visual_rows(self, num_visual_rows: int, progress: float, generator: torch.Generator) -> int:
        """How many of a sample's visual rows the draft is shown in one step.

        Args:
            num_visual_rows: How many the sample has.
            progress: Share (0 … 1) of the training's steps that are done; a curriculum may depend on it.
            generator: The sample's, in this step.
        """
        if self.num_visual_rows_max == ALL_VISUAL_ROWS:
            return num_visual_rows
        low, high = self.num_visual_rows_min, self.num_visual_rows_max
        return int(torch.randint(low, high + 1, (), generator=generator))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Name of each loss in `losses.py` → its weight."""
        return {name: getattr(self, f"{name}_weight") for name in (*SCORE_LOSSES, *STATE_LOSSES)}
