"""`sparrow regenerate`: the target writes the answers that a draft is trained on."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..extras import require
from .common import (
    DEVICE_HELP,
    DTYPE_HELP,
    FPS_HELP,
    MAX_FRAMES_HELP,
    ON_BAD_ROW_HELP,
    PROCESSOR_HELP,
    Dtype,
    OnBadRow,
    errors_as_sentences,
    quiet_transformers,
    report_skipped,
    size,
)


def regenerate(
    target: Annotated[str, typer.Option(help="The video LLM that answers: a folder or a Hub id.")],
    prompts: Annotated[
        str,
        typer.Option(
            help="Data set whose rows hold 'messages': a .jsonl or .parquet file, a folder written by save_to_disk, "
            "or a Hub id."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder to write the answers to. The same command continues a stopped run.")
    ],
    split: Annotated[str, typer.Option(help="Split of --prompts to read.")] = "train",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum length of an answer, in tokens.")] = 1024,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample the answers instead of decoding greedily.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of --do-sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus (top-p) of --do-sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --do-sample.")] = 0,
    fps: Annotated[float | None, typer.Option(min=0.01, help=FPS_HELP)] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help=MAX_FRAMES_HELP)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts answered in one batch.")] = 1,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Number of answers per file. A stopped run loses at most one file.")
    ] = 64,
    draft: Annotated[
        str | None, typer.Option(help="A draft of the target, to write the answers faster: a folder or a Hub id.")
    ] = None,
    processor: Annotated[str | None, typer.Option(help=PROCESSOR_HELP)] = None,
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    on_bad_row: Annotated[OnBadRow, typer.Option(help=ON_BAD_ROW_HELP)] = OnBadRow.refuse,
) -> None:
    """Lets the target answer prompts: its own answers are the text that a draft should be trained on.

    With accelerate launch -m sparrow_hf.cli, several processes share the work.
    They write the same files as one process.
    """
    with errors_as_sentences():
        require("train", "sparrow regenerate")
        from accelerate import PartialState

        from .. import SparrowDraftModel
        from ..data import load_rows
        from ..loading import load_target
        from ..training.regenerate import estimate_answer_bytes, read_skipped
        from ..training.regenerate import regenerate as write_answers

        quiet_transformers()
        processes = PartialState()
        console = Console(quiet=not processes.is_main_process)
        rows = load_rows(prompts, split)
        console.print(
            f"{len(rows)} prompts; answers of up to {max_new_tokens} tokens take at most about "
            f"{size(estimate_answer_bytes(rows, max_new_tokens))} in {output}"
        )
        model, its_processor = load_target(target, processor, dtype.value, device or processes.device)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if do_sample else {"do_sample": False}
        )
        shards = write_answers(
            model,
            its_processor,
            rows,
            output,
            draft=None if draft is None else SparrowDraftModel.from_pretrained(draft).eval(),
            shard_size=shard_size,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            fps=fps,
            max_frames=max_frames,
            on_bad_row=on_bad_row.value,
            show_progress=processes.is_main_process,
            **sampling,
        )
        processes.wait_for_everyone()
        report_skipped(console, read_skipped(output), len(rows))
        console.print(f"{len(shards)} files of answers in {output}")
