"""`SparrowTrainingArguments`: the losses, the visual tokens of a step, and the two recipes."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from .losses import SCORE_LOSSES, STATE_LOSSES

#: `num_visual_rows_*`: every visual token of the sample.
ALL_VISUAL_ROWS = -1

#: Named recipes, as fields of [`SparrowTrainingArguments`]. `"paper"` is Sparrow's: every visual token in training
#: (IVSB), passes by causal re-input, and the losses and optimiser of ViSpec: Sparrow's own code derives from it and is
#: not published. `"default"` uses the glimpse; no other recipe measured better on the testbed (docs/recipes.md).
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

#: What the recipes set in the draft, as fields of [`SparrowDraftConfig`].
DRAFT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"feature_layers": [-1], "num_mtp_steps": 2, "num_glimpse_tokens": 0},
    "default": {},
}

#: Fields of [`~transformers.TrainingArguments`] that a draft's training has no use for → the only value, and why.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "the draft's signature names none of the columns"),
    "label_smoothing_factor": (0.0, "the losses compare with the target's probabilities, not with labels"),
    "neftune_noise_alpha": (
        None,
        "the draft has no embedding of its own; hidden_state_noise adds noise to its states",
    ),
    "batch_eval_metrics": (False, "the figures of an evaluation are pooled over its rounds"),
    "eval_do_concat_batches": (True, "the figures of an evaluation are pooled over its rounds"),
    "include_num_input_tokens_seen": ("no", "a batch holds samples, in which the base class finds no tokens to count"),
}


@dataclass
class SparrowTrainingArguments(TrainingArguments):
    r"""Arguments of a [`SparrowTrainer`]: those of [`~transformers.TrainingArguments`], the loss mix and the recipe.

    The number of passes (MTP) and everything else about the draft is read from `draft.config`, so that a checkpoint
    records how it was trained. The loss of a step is the sum over passes of the weighted losses below, summed over the
    pass's loss positions and divided by the number of loss positions of the first pass.

    Raises:
        ValueError: A weight is negative, all weights are zero, a range is empty, or an argument has no effect here.
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
            "help": "Scale a of the uniform noise (U[0,1) − 0.5)·a·512/T that is added to the target's text states; T "
            "is the length of the draft's sequence."
        },
    )
    num_visual_rows_min: int = field(
        default=0,
        metadata={
            "help": "Minimum number of random visual tokens that the draft reads of a sample in one step; -1 is all."
        },
    )
    num_visual_rows_max: int = field(
        default=64,
        metadata={
            "help": "Maximum number of random visual tokens that the draft reads of a sample in one step. Set both "
            "bounds to -1 for every visual token, as in the paper (IVSB), or to 0 for text only."
        },
    )
    mtp_attention: Literal["exact", "reinput"] = field(
        default="exact",
        metadata={
            "help": "What later passes attend to: with 'exact', the same keys as in decoding (training-time test); "
            "with 'reinput', the keys of the same pass only (the paper)."
        },
    )
    mtp_loss_decay: float = field(
        default=1.0,
        metadata={
            "help": "Pass s has this number to the power s as its weight; 1.0 gives every pass the same weight."
        },
    )

    on_bad_row: Literal["refuse", "skip"] = field(
        default="refuse",
        metadata={
            "help": "What to do with a row that cannot be used: end the training ('refuse'), or leave the row out and "
            "report it ('skip')."
        },
    )
    fps: float | None = field(
        default=None,
        metadata={"help": "Maximum number of frames per second to read of a video; by default every frame is read."},
    )
    max_frames: int | None = field(
        default=None, metadata={"help": "Maximum number of frames to read of a video; by default every frame is read."}
    )

    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Search for parameters without a gradient in every pass; the draft has none."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "Send the draft's buffers to all processes in every pass; they never change."},
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Value of use_cache in the draft's configuration: it decodes with a cache."}
    )
    # Rows are dictionaries that no model signature describes.
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay false, because the columns go to the target's processor and not to the draft."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # accelerate would split streamed batches along the first dimension of their tensors, which is not the row
            # here. So every process reads the stream and takes its own rows.
            self.accelerator_config.dispatch_batches = False
        for name, (only, why) in UNSUPPORTED.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name} must stay {only}, found {getattr(self, name)!r}: {why}")
        if "inputs" in self.include_for_metrics:
            raise ValueError(
                "include_for_metrics must not name 'inputs': a batch holds samples, which are no one tensor"
            )
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy must not be 'group_by_length': rows have no length before they are read"
            )
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant must stay False: it would drop the gradients between the draft's passes")
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
        """Number of a sample's visual tokens that the draft reads in one step.

        Args:
            num_visual_rows: Number of visual tokens in the sample.
            progress: Share (0 … 1) of the training's steps that are done; a curriculum may depend on it.
            generator: Random generator of this sample in this step.
        """
        if self.num_visual_rows_max == ALL_VISUAL_ROWS:
            return num_visual_rows
        low, high = self.num_visual_rows_min, self.num_visual_rows_max
        return int(torch.randint(low, high + 1, (), generator=generator))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Name of each loss in `losses.py` → its weight."""
        return {name: getattr(self, f"{name}_weight") for name in (*SCORE_LOSSES, *STATE_LOSSES)}
