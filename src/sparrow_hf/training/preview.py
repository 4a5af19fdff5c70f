"""`sparrow train --inspect` and `--dry-run`: the draft's inputs of one sample, and the cost of a training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._transformers import on_device
from ..clocks import now
from ..draft_inputs import visual_mask
from .trainer import SparrowTrainer

#: Number of rows that a dry run measures, spread evenly over the training set.
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

    Attributes:
        draft_parameters: Numbers that are trained.
        target_bytes: Weights of the target.
        training_bytes: Weights, gradients and optimiser state of the draft.
        peak_bytes: Peak memory of the accelerator during the measured steps, weights included; `None` on a CPU.
        checkpoint_bytes: Disk of one checkpoint.
        checkpoints_bytes: Disk of all checkpoints that are kept.
        seconds: The whole training, evaluation left out.
        optimizer_steps: Number of steps of the whole training.
        measured_rows: Number of rows that were measured, with forward and backward pass.
        longest_row: Tokens of the longest of them.
    """

    draft_parameters: int
    target_bytes: int
    training_bytes: int
    peak_bytes: int | None
    checkpoint_bytes: int
    checkpoints_bytes: int
    seconds: float
    optimizer_steps: int
    measured_rows: int
    longest_row: int


def estimate_cost(trainer: SparrowTrainer, target: nn.Module) -> CostEstimate:
    """Takes a few steps forward and backward, without an optimiser step, and scales them up.

    The draft and the random state are left as they were; the first row is not timed.

    Args:
        trainer: The trainer that would be started.
        target: Its target.
    """
    draft, args = trainer.draft, trainer.args
    rows = _some_rows(trainer)
    on_cuda = args.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds, longest = [], 0
    for row in rows:
        start = now(args.device)
        inputs = trainer.data_collator([row])
        for sample in inputs["samples"]:
            longest = max(longest, sample["input_ids"].shape[-1])
        draft.train()
        trainer.compute_loss(draft, on_device(trainer, inputs)).backward()
        seconds.append(now(args.device) - start)
    draft.zero_grad()
    trainer._pass_counts = {}

    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    steps, per_step = args.max_steps, args.train_batch_size * args.gradient_accumulation_steps
    if steps <= 0:
        # Without a dataset of known length there is no number of epochs to count.
        steps = round(args.num_train_epochs * len(trainer.train_dataset) / (per_step * args.world_size))
    # Weights, and Adam's two averages of them.
    checkpoint = 3 * weights
    kept = args.save_total_limit or (round(steps / args.save_steps) if args.save_steps >= 1 else 1)
    typical = sum(seconds[1:]) / len(seconds[1:]) if len(seconds) > 1 else seconds[0]
    return CostEstimate(
        draft_parameters=sum(parameter.numel() for parameter in trained),
        target_bytes=sum(parameter.numel() * parameter.element_size() for parameter in target.parameters()),
        training_bytes=4 * weights,
        peak_bytes=torch.cuda.max_memory_allocated(args.device) if on_cuda else None,
        checkpoint_bytes=checkpoint,
        checkpoints_bytes=checkpoint * max(kept, 1),
        seconds=typical * per_step * steps,
        optimizer_steps=steps,
        measured_rows=len(rows),
        longest_row=longest,
    )


def _some_rows(trainer: SparrowTrainer) -> list[Any]:
    """A few training rows, evenly spread where their number is known."""
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        iterator = iter(dataset)
        return [row for _, row in zip(range(DRY_RUN_ROWS), iterator, strict=False)]
    count = min(DRY_RUN_ROWS, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]
