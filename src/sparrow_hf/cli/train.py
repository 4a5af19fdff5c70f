"""`sparrow train`: a draft for your target, from answered rows or a recording."""

import inspect
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._transformers import on_device
from ..errors import TrainingOptionsError
from ..extras import require
from .common import (
    EXIT_CODES,
    Dtype,
    quiet_transformers,
    size,
)

#: Positions of a preview that are shown before and after the part left out.
SHOWN_ROWS = 12
HELP = "--help"


def train(context: typer.Context) -> None:
    """Trains a draft. The options are the fields of TrainingOptions and SparrowTrainingArguments.

    sparrow train --target ID --train ANSWERS --output DRAFT [--held-out ROWS] [--preset default|paper]
    [--config FILE.yaml] [--vocabulary FILE] [--warm-start DRAFT [--lora RANK]] [--resume] [--dry-run]
    [--inspect N] [--OPTION VALUE]

    An option on the command line replaces the same option in the YAML file, and that one replaces the preset's.
    """
    require("train", "sparrow train")
    if HELP in context.args:
        show_options(Console(), context)
        return
    from accelerate import PartialState

    from ..data.prepare import tokenizer_of
    from ..loading import load_target
    from ..training.checkpoints import last_checkpoint
    from ..training.options import parse_options
    from ..training.preview import estimate_cost, preview_sample
    from ..training.run import prepare_training

    options, arguments = parse_options(context.args)
    quiet_transformers()
    # Reading it sets up the processes as the options say.
    device = options.device_of(arguments)
    processes = PartialState()
    console = Console(quiet=not processes.is_main_process)
    if options.target_dtype not in Dtype.__members__:
        raise TrainingOptionsError(
            f"--target-dtype must be one of {', '.join(Dtype.__members__)}, found {options.target_dtype!r}"
        )
    target, processor = load_target(
        options.target,
        options.processor,
        dtype=options.target_dtype,
        device=device,
        revision=options.target_revision,
        vllm_positions=options.vllm_positions,
    )
    run = prepare_training(options, arguments, target, processor)
    trainer = run.trainer
    for choice in run.choices:
        console.print(choice, soft_wrap=True)
    if options.inspect is not None:
        sample = sample_of(trainer, options.inspect)
        show_preview(console, preview_sample(trainer, sample, tokenizer_of(processor)))
    elif options.dry_run:
        show_cost(console, estimate_cost(trainer, target))
    else:
        parameters = sum(parameter.numel() for parameter in trainer.draft.parameters() if parameter.requires_grad)
        console.print(f"training {parameters / 1e6:.3g} M parameters into {run.output}")
        checkpoints = Path(options.output) / "checkpoints"
        context.obj.keeps(
            lambda: kept_in(checkpoints), lambda: ["--resume"] if last_checkpoint(checkpoints) is not None else []
        )
        run.run()
        console.print(f"the draft is in {run.output}", *run.notes, sep="\n")


def show_options(console: Console, context: typer.Context) -> None:
    """Prints the help: all options that are not inherited from transformers, with their defaults."""
    from ..training.arguments import UNSUPPORTED
    from ..training.options import describe_options

    console.print(inspect.getdoc(context.command.callback), highlight=False)
    for group, options in describe_options().items():
        table = Table("option", "default", "", title=group, title_justify="left", box=None)
        for name, default, text in options:
            table.add_row(Text(name, no_wrap=True), Text(default), Text(text))
        console.print(table)
    console.print(EXIT_CODES, highlight=False)
    refused = [f"--{name.replace('_', '-')}" for name in ("output_dir", "resume_from_checkpoint", *UNSUPPORTED)]
    console.print(
        "Options of transformers.TrainingArguments work too, such as --learning-rate and --max-steps, except "
        f"{', '.join(refused[:-1])} and {refused[-1]}."
    )


def kept_in(checkpoints: Path) -> str:
    """What is left of a training that was stopped."""
    from ..training.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(checkpoints)
    return "no checkpoint was saved yet" if checkpoint is None else f"the training is kept up to {checkpoint}"


def sample_of(trainer: Any, index: int) -> dict[str, Any]:
    """The sample of training row `index`, on the trainer's device."""
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        raise TrainingOptionsError(
            f"--inspect {index}: the rows of a stream have no numbers to choose one by; leave out --streaming"
        )
    if not 0 <= index < len(dataset):
        raise TrainingOptionsError(
            f"--inspect {index}: the training set has no such row; give a number from 0 to {len(dataset) - 1}"
        )
    samples = on_device(trainer, trainer.data_collator([dataset[index]]))["samples"]
    if not samples:
        raise TrainingOptionsError(
            f"--inspect {index}: this row cannot be used and would be left out; inspect another one"
        )
    return samples[0]


def show_preview(console: Console, preview: Any) -> None:
    """Prints the draft's sequence of one sample."""
    runs = ", ".join(f"{length} from token {start}" for start, length in preview.visual_runs) or "none"
    console.print(f"visual runs: {runs}; the draft reads {preview.num_visual_rows} of their tokens in this step")
    console.print(
        f"the draft's sequence: {len(preview.rows)} positions, {preview.num_loss_rows} with a loss in pass 0"
    )
    table = Table("row", "position", "state of", "embedding of", "learns to predict")
    for index, row in enumerate(preview.rows):
        first_loss = len(preview.rows) - preview.num_loss_rows
        if SHOWN_ROWS <= index < first_loss - 2 or first_loss + SHOWN_ROWS <= index < len(preview.rows) - 2:
            if index in (SHOWN_ROWS, first_loss + SHOWN_ROWS):
                table.add_row("…")
            continue
        names = [Text("visual token", "dim") if row.state_of is None else Text(row.state_of)]
        names += [Text(name or "") for name in (row.embedding_of, row.predicts)]
        table.add_row(str(index), str(row.position), *names)
    console.print(table)


def show_cost(console: Console, cost: Any) -> None:
    """Prints the estimated cost of a training."""
    table = Table(show_header=False)
    table.add_row("trained parameters", f"{cost.draft_parameters / 1e6:.3g} M")
    table.add_row("target weights", size(cost.target_bytes))
    table.add_row("draft weights, gradients, optimiser", size(cost.training_bytes))
    peak = "not measured on a CPU" if cost.peak_bytes is None else size(cost.peak_bytes)
    table.add_row("peak memory of a step", peak)
    table.add_row("one checkpoint", size(cost.checkpoint_bytes))
    table.add_row("checkpoints kept", f"{cost.num_checkpoints}: {size(cost.checkpoints_bytes)}")
    table.add_row("optimizer steps", str(cost.optimizer_steps))
    table.add_row("time, evaluation left out", f"{cost.seconds / 3600:.3g} hours")
    console.print(table)
    measured, note = "Time was", ""
    if cost.peak_bytes is not None:
        measured, note = "Time and peak were", " The peak includes Adam's averages."
    console.print(
        f"{measured} measured on the forward and backward of {cost.measured_rows} training rows in batches of "
        f"{cost.batch_size}, the longest row of {cost.longest_row} tokens.{note}",
        soft_wrap=True,
    )
