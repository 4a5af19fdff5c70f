"""`sparrow record`: the target reads every answered row once; drafts then train without it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..extras import require
from .common import Dtype, OnBadRow, errors_as_sentences, quiet_transformers, report_skipped, size


def record(
    target: Annotated[str, typer.Option(help="The video LLM to draft for: folder or Hub id.")],
    answers: Annotated[str, typer.Option(help="Answered rows: the folder of `sparrow regenerate`, or any rows.")],
    output: Annotated[Path, typer.Option(help="Folder of the recording. Run again to go on where it was stopped.")],
    split: Annotated[str, typer.Option(help="Split of --answers.")] = "train",
    feature_layers: Annotated[
        list[int] | None, typer.Option(help="Layer that drafts read (repeat for several); −1 is the last.")
    ] = None,
    bridge_layer: Annotated[
        int | None, typer.Option(help="Layer of the visual rows (default: the middle one).")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="No visual rows: small, for drafts that never see one.")
    ] = False,
    max_disk_gb: Annotated[float | None, typer.Option(min=0.0, help="Most disk to use, in GB.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.01, help="Frames per second to see, at most.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames to see of a video, at most.")] = None,
    processor: Annotated[str | None, typer.Option(help="Processor of --target, if it lies elsewhere.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the target computes in.")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; auto spreads over all GPUs.")] = None,
    on_bad_row: Annotated[OnBadRow, typer.Option(help="Stop at a bad row, or leave it out.")] = OnBadRow.refuse,
) -> None:
    """Stores the hidden states of answered rows, so that drafts can be trained without the target.

    Says how much disk it will take before it starts.
    """
    with errors_as_sentences():
        require("train", "sparrow record")
        from accelerate import PartialState

        from .. import SparrowDraftModel
        from ..data import load_rows
        from ..loading import load_target
        from ..training.data import SparrowDataCollator
        from ..training.recording import check_disk_budget, estimate_recording_bytes
        from ..training.recording import record as write_recording

        quiet_transformers()
        processes = PartialState()
        console = Console(quiet=not processes.is_main_process)
        rows = load_rows(answers, split)
        model, its_processor = load_target(target, processor, dtype.value, device or processes.device)
        # Only its configuration counts: which layers are kept.
        draft = SparrowDraftModel.from_target(model, feature_layers=feature_layers, visual_bridge_layer=bridge_layer)
        collator = SparrowDataCollator(
            its_processor, draft.config.visual_token_ids, on_bad_row.value, fps=fps, max_frames=max_frames
        )
        expected = estimate_recording_bytes(draft, rows, collator, visual_rows=not text_only)
        console.print(f"{len(rows)} rows; the recording takes about {size(expected)} in {output}")
        check_disk_budget(expected, max_disk_gb)
        skipped = write_recording(
            draft,
            rows,
            output,
            collator,
            visual_rows=not text_only,
            max_disk_gb=max_disk_gb,
            show_progress=processes.is_main_process,
        )
        report_skipped(Console(), skipped, len(rows))
        processes.wait_for_everyone()
        console.print(f"recorded in {output}")
