"""`sparrow record`: stores the target's states of every answered row, so that drafts train without the target."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..extras import require
from .common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FpsOption,
    MaxFramesOption,
    OnBadRow,
    OnBadRowOption,
    ProcessorOption,
    VllmPositionsOption,
    count_kept,
    launched_processes,
    quiet_transformers,
    report_skipped,
    size,
)


def record(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="The video LLM to draft for: a folder or a Hub id.")],
    answers: Annotated[
        str, typer.Option(help="Answered rows: a folder written by `sparrow regenerate`, or another data set.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder to write the recording to. The same command continues a stopped one.")
    ],
    split: Annotated[str, typer.Option(help="Split of --answers to read.")] = "train",
    feature_layers: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer whose text states drafts read; -1 is the state after the final norm. Repeat the option for "
            "several layers (default: those of a new draft, and the last layer but one, for `sparrow train "
            "--copy-last-layer`)."
        ),
    ] = None,
    bridge_layer: Annotated[
        int | None, typer.Option(help="Layer whose visual states drafts read (default: the middle one).")
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option("--text-only", help="Store no visual states, for drafts that read text only. Takes less disk."),
    ] = False,
    max_disk_gb: Annotated[float | None, typer.Option(min=0.0, help="Maximum disk space to use, in GB.")] = None,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    vllm_positions: VllmPositionsOption = False,
    on_bad_row: OnBadRowOption = OnBadRow.refuse,
) -> None:
    """Stores the target's hidden states of answered rows, so that drafts can be trained without the target.

    Prints the disk space it will take before it starts.
    """
    require("train", "sparrow record")
    from .. import SparrowDraftConfig, SparrowDraftModel
    from ..data import load_rows
    from ..loading import load_target
    from ..training.checkpoints import digest_of_rows
    from ..training.data import SparrowDataCollator
    from ..training.first_weights import entry_layer
    from ..training.recording import record as write_recording
    from ..training.recording_size import check_disk_budget, estimate_recording_bytes
    from ..training.refusals import check_answers

    quiet_transformers()
    processes = launched_processes(device)
    console = Console(quiet=not processes.is_main_process)
    rows = load_rows(answers, split)
    model, its_processor = load_target(
        target, processor, dtype.value, device or processes.device, vllm_positions=vllm_positions
    )
    if feature_layers is None:
        usual = SparrowDraftConfig.from_target_config(model.config)
        feature_layers = sorted({*usual.feature_layer_ids, entry_layer(usual)} - {0})
    # Only its configuration counts: which layers are kept.
    draft = SparrowDraftModel.from_target(model, feature_layers=feature_layers, visual_bridge_layer=bridge_layer)
    check_answers(answers, draft.target)
    collator = SparrowDataCollator(
        its_processor, draft.config.visual_token_ids, on_bad_row.value, fps=fps, max_frames=max_frames
    )
    expected = estimate_recording_bytes(draft, rows, collator, visual_rows=not text_only)
    console.print(f"{len(rows)} rows; the recording takes about {size(expected)} in {output}")
    check_disk_budget(expected, max_disk_gb)
    context.obj.keeps(
        lambda: count_kept(output, len(list((output / "rows").glob("row-*.safetensors"))), "row", of=len(rows))
    )
    skipped = write_recording(
        draft,
        rows,
        output,
        collator,
        visual_rows=not text_only,
        max_disk_gb=max_disk_gb,
        show_progress=processes.is_main_process,
        source={"answers": digest_of_rows(answers), "split": split},
    )
    report_skipped(Console(), skipped, len(rows))
    processes.wait_for_everyone()
    console.print(f"recorded in {output}")
