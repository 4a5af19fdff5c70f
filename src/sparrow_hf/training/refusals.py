"""Trainings that would train nothing, or little: refused or warned of."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TrainingDataError
from ..modeling_sparrow import SparrowDraftModel


class RefuseNothing(TrainerCallback):
    """Ends a training whose first epoch had no row to train on, because all of them were left out.

    Args:
        trainer: A [`SparrowTrainer`].
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.is_resumed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rows before a checkpoint were trained on."""
        self.is_resumed = state.global_step > 0

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises if there was none."""
        if not self.trainer.has_trained and not self.is_resumed:
            raise all_left_out("training rows", self.trainer.skipped_rows)


def all_left_out(rows: str, skipped: Iterable[tuple[int | None, str]]) -> TrainingDataError:
    """The error of rows none of which can be used; their kind, and index and reason of each."""
    reasons = [reason for _, reason in skipped]
    told = f", for example: {min(reasons)}" if reasons else ""
    return TrainingDataError(f"{rows}: not one of them can be used{told}")


def warn_of_16_bits(draft: SparrowDraftModel) -> None:
    """Warns of weights that are trained in a dtype too coarse for it."""
    trained = {parameter.dtype for parameter in draft.parameters() if parameter.requires_grad}
    if low := trained & {torch.bfloat16, torch.float16}:
        warnings.warn(
            f"the draft is trained in {low.pop()}, which rounds most steps of a small learning rate away: give "
            "SparrowTrainer draft.float(), or sparrow train --draft-dtype float32; bf16=True computes in bf16 even so",
            UserWarning,
            stacklevel=3,
        )
