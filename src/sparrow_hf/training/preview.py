"""`sparrow train --inspect` and `--dry-run`: the draft's inputs of one sample, and the cost of a training."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from .._transformers import TrainingLength, as_trained, training_length
from ..clocks import now
from ..draft_inputs import visual_mask
from .refusals import all_left_out
from .trainer import SparrowTrainer

#: Number of rows that a dry run measures, spread evenly over the training set; more where two batches have more.
DRY_RUN_ROWS = 8


@dataclass(frozen=True)
class PreviewedRow:
    """One position of the draft's sequence in the first pass; `None` where a visual one has no token.

    Attributes:
        position: RoPE position.
        state_of: The token whose target state the draft reads there; `None` if it is visual.
        embedding_of: The token after it, whose embedding the draft reads there.
        predicts: The token after that, if there is a loss.
    """

    position: int
    state_of: str | None
    embedding_of: str | None
    predicts: str | None


@dataclass(frozen=True)
class SamplePreview:
    """The draft's sequence of one sample in one step.

    Attributes:
        rows: Its positions, in order.
        visual_runs: (index in the prompt, length) of every run of visual placeholders of the sample.
        num_visual_rows: Number of visual tokens that the draft reads in this step.
        num_loss_rows: Positions with a loss in the first pass; each later pass has one less.
    """

    rows: list[PreviewedRow]
    visual_runs: list[tuple[int, int]]
    num_visual_rows: int
    num_loss_rows: int


def preview_sample(
    trainer: SparrowTrainer, sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> SamplePreview:
    """The draft's sequence of one sample, with the random choices of the first step.

    Args:
        trainer: The trainer that would be started.
        sample: One sample of its collator.
        tokenizer: The target's; names the tokens.
    """
    batch = trainer.make_batch([sample], training=True)
    input_ids = sample["input_ids"].flatten().to(batch.next_ids.device)
    names = tokenizer.convert_ids_to_tokens
    is_visual = visual_mask(input_ids, trainer.draft.config.visual_token_ids or [])
    first_loss, num_loss = int(batch.first_loss), int(batch.num_losses)
    positions = batch.position_ids[0].tolist()
    rows = [PreviewedRow(position, None, None, None) for position in positions]
    next_ids, answer = batch.next_ids[0].tolist(), input_ids[int(sample["answer_start"]) :].tolist()
    # The text before the next token of the first position is the first kept token of the prompt.
    states = [int(input_ids[~is_visual][0]), *next_ids[:-1]]
    for index, at in enumerate(batch.text_positions[0].tolist()):
        loss_row = index - first_loss
        predicts = names(answer[loss_row + 1]) if 0 <= loss_row < num_loss else None
        rows[at] = PreviewedRow(positions[at], names(states[index]), names(next_ids[index]), predicts)
    starts = (is_visual & ~torch.cat((is_visual.new_zeros(1), is_visual[:-1]))).nonzero().flatten().tolist()
    ends = (is_visual & ~torch.cat((is_visual[1:], is_visual.new_zeros(1)))).nonzero().flatten().tolist()
    return SamplePreview(
        rows=rows,
        visual_runs=[(start, end - start + 1) for start, end in zip(starts, ends, strict=True)],
        num_visual_rows=batch.visual_positions.shape[1],
        num_loss_rows=num_loss,
    )


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of a training, in bytes and seconds. Times and peak were measured on `measured_rows` rows.

    The optimiser is taken to keep two averages of every trained number, as Adam does.

    Attributes:
        draft_parameters: Numbers that are trained.
        target_bytes: Weights of the target.
        training_bytes: Weights, gradients and optimiser state of the draft.
        peak_bytes: Peak memory of the accelerator during the measured steps, weights included, plus the optimiser
            state, which these steps do not have; `None` on a CPU.
        checkpoint_bytes: Disk of one checkpoint.
        num_checkpoints: Number of checkpoints that are kept; with `save_strategy="best"`, at most.
        seconds: The whole training, evaluation left out.
        optimizer_steps: Number of steps of the whole training.
        measured_rows: Number of rows that were measured, with forward and backward pass.
        batch_size: Number of rows of one forward and backward pass.
        longest_row: Tokens of the longest of the measured rows.
    """

    draft_parameters: int
    target_bytes: int
    training_bytes: int
    peak_bytes: int | None
    checkpoint_bytes: int
    num_checkpoints: int
    seconds: float
    optimizer_steps: int
    measured_rows: int
    batch_size: int
    longest_row: int

    @property
    def checkpoints_bytes(self) -> int:
        """Disk of all checkpoints that are kept."""
        return self.num_checkpoints * self.checkpoint_bytes


def estimate_cost(trainer: SparrowTrainer, target: nn.Module) -> CostEstimate:
    """Takes a few steps forward and backward, without an optimiser step, and scales them up.

    The steps are those of the training: its batches, mixed precision and checkpointing. The draft and the random state
    are left as they were; the first batch is not timed, unless it is the only one.

    Args:
        trainer: The trainer that would be started.
        target: Its target.

    Raises:
        ValueError: See [`training_length`].
        TrainingDataError: None of the measured rows can be used.
    """
    draft, args = trainer.draft, trainer.args
    rows, batch_size = _some_rows(trainer), args.train_batch_size
    on_cuda = args.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    timed, longest, skipped = [], 0, []
    with as_trained(trainer) as model:
        for first in range(0, len(rows), batch_size):
            start = now(args.device)
            batch = rows[first : first + batch_size]
            inputs = trainer.data_collator(batch)
            longest = max([longest, *(sample["input_ids"].shape[-1] for sample in inputs["samples"])])
            skipped += inputs.get("skipped", [])
            trainer.training_step(model, inputs)
            timed.append((now(args.device) - start, len(batch)))
    if not longest:
        raise all_left_out(f"{len(rows)} training rows", skipped)
    draft.zero_grad()
    trainer._pass_counts = {}
    seconds, timed_rows = (sum(each) for each in zip(*(timed[1:] or timed), strict=True))

    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    gradients, weights = _bytes_of(trained), _bytes_of(draft.state_dict().values())
    averages = 2 * gradients
    length = training_length(trainer)
    return CostEstimate(
        draft_parameters=sum(parameter.numel() for parameter in trained),
        target_bytes=_bytes_of(target.parameters()),
        training_bytes=weights + gradients + averages,
        peak_bytes=torch.cuda.max_memory_allocated(args.device) + averages if on_cuda else None,
        checkpoint_bytes=weights if args.save_only_model else weights + averages,
        num_checkpoints=_checkpoints_kept(args, length),
        seconds=seconds / timed_rows * length.rows / args.world_size,
        optimizer_steps=length.steps,
        measured_rows=len(rows),
        batch_size=batch_size,
        longest_row=longest,
    )


def _some_rows(trainer: SparrowTrainer) -> list[Any]:
    """A few training rows, two batches at least, evenly spread where their number is known."""
    dataset: Any = trainer.train_dataset
    count = max(DRY_RUN_ROWS, 2 * trainer.args.train_batch_size)
    if not hasattr(dataset, "__len__"):
        return list(islice(dataset, count))
    count = min(count, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _checkpoints_kept(args: TrainingArguments, length: TrainingLength) -> int:
    """Number of checkpoints that a training leaves."""
    if args.save_strategy == "best":
        # At every evaluation, if each is better than all before.
        strategy, interval = args.eval_strategy, args.eval_steps
    else:
        strategy, interval = args.save_strategy, args.save_steps
    if strategy == "no":
        return 0
    if strategy == "epoch":
        interval = length.steps_per_epoch
    elif interval < 1:
        # A share of the training.
        interval = ceil(interval * length.steps)
    # The end is saved too. An interval of no steps leaves that one alone.
    written = ceil(length.steps / interval) if interval else 1
    limit = args.save_total_limit or 0
    return min(written, limit) if limit > 0 else written
