"""Trainings that would train nothing, little, or on the answers of others: refused or warned of."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._transformers import uses_vllm_positions
from ..checksums import read_json
from ..data.answers import PROVENANCE_FILE, REMEDY
from ..errors import TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView


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


def check_answers(source: str | os.PathLike[str], target: TargetView) -> None:
    """Warns of answers that another target wrote or that are unfinished, and refuses those written at other positions.

    Args:
        source: Rows, as [`load_rows`] takes them. What is no folder of `sparrow regenerate` is not compared.
        target: Of the draft that is trained on them.

    Raises:
        TrainingDataError: The answers were written with `--vllm-positions`, and this target has others, or the other
            way round.
    """
    described = Path(source) / PROVENANCE_FILE
    if not described.is_file():
        return
    found = read_json(described, TrainingDataError, REMEDY)
    # Without the option it is not named.
    in_vllm = bool(found.get("vllm_positions"))
    if in_vllm != uses_vllm_positions(target.model):
        how = f"with{'' if in_vllm else 'out'} --vllm-positions"
        raise TrainingDataError(
            f"the answers in {source} were written {how}: go on {how} too, or run `sparrow regenerate` again into "
            "another folder"
        )
    wrote = found.get("target_sha256")
    # An earlier version did not name it.
    if wrote is not None and wrote != target.sha256:
        warnings.warn(
            f"another target, or this one in another dtype, wrote the answers in {source} "
            f"({found.get('target') or 'unnamed'} in {found.get('dtype')}, sha256 {wrote[:12]}…; this one is in "
            f"{target.dtype}, {target.sha256[:12]}…): a draft accepts most on its target's own answers, which "
            "`sparrow regenerate` writes",
            UserWarning,
            stacklevel=3,
        )
    rows, size = (found.get(name) for name in ("rows", "shard_size"))
    if isinstance(rows, int) and isinstance(size, int):
        shards = (Path(source) / f"answers-{number:05d}.jsonl" for number in range(-(-rows // size)))
        done = sum(min(size, rows - number * size) for number, shard in enumerate(shards) if shard.is_file())
        if done < rows:
            warnings.warn(
                f"{source} holds the answers to {done} of {rows} rows: `sparrow regenerate`, with the same options, "
                "writes the others",
                UserWarning,
                stacklevel=3,
            )
