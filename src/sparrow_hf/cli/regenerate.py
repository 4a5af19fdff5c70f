"""`sparrow regenerate`: the target writes its own answers, to be trained on."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..extras import require
from .common import Dtype, OnBadRow, errors_as_sentences, quiet_transformers, report_skipped, size


def regenerate(
    target: Annotated[str, typer.Option(help="The video LLM that answers: folder or Hub id.")],
    prompts: Annotated[
        str, typer.Option(help="Rows with 'messages': .jsonl, .parquet, a folder of save_to_disk, or a Hub id.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the answers. Run again to go on where it was stopped.")],
    split: Annotated[str, typer.Option(help="Split of --prompts.")] = "train",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 1024,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample instead of greedy text.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --do-sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --do-sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    fps: Annotated[float | None, typer.Option(min=0.01, help="Frames per second to see, at most.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames to see of a video, at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Answers per file; a stop loses at most one file.")] = 64,
    draft: Annotated[str | None, typer.Option(help="A draft of the target, to write faster.")] = None,
    processor: Annotated[str | None, typer.Option(help="Processor of --target, if it lies elsewhere.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the target computes in.")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; auto spreads over all GPUs.")] = None,
    on_bad_row: Annotated[OnBadRow, typer.Option(help="Stop at a bad row, or leave it out.")] = OnBadRow.refuse,
) -> None:
    """Lets the target write long answers to prompts: the text a draft should be trained on.

    Started by accelerate launch -m sparrow_hf.cli, processes share the work and write the same files.
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
