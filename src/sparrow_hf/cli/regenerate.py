"""`sparrow regenerate`: the target writes the answers that a draft is trained on."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..extras import require
from .common import (
    DeviceOption,
    DoSampleOption,
    Dtype,
    DtypeOption,
    FpsOption,
    MaxFramesOption,
    MaxNewTokensOption,
    OnBadRow,
    OnBadRowOption,
    ProcessorOption,
    PromptsOption,
    SeedOption,
    SplitOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    VllmPositionsOption,
    count_kept,
    launched_processes,
    quiet_transformers,
    report_skipped,
    sampling_of,
    size,
)


def regenerate(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="The video LLM that answers: a folder or a Hub id.")],
    prompts: PromptsOption,
    output: Annotated[
        Path, typer.Option(help="Folder to write the answers to. The same command continues a stopped run.")
    ],
    split: SplitOption = "train",
    max_new_tokens: MaxNewTokensOption = 1024,
    do_sample: DoSampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = 0,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts answered in one batch.")] = 1,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Number of answers per file. A stopped run loses at most one file.")
    ] = 64,
    draft: Annotated[
        str | None, typer.Option(help="A draft of the target, to write the answers faster: a folder or a Hub id.")
    ] = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    vllm_positions: VllmPositionsOption = False,
    on_bad_row: OnBadRowOption = OnBadRow.refuse,
) -> None:
    """Lets the target answer prompts: its own answers are the text that a draft should be trained on.

    With accelerate launch -m sparrow_hf.cli, several processes share the work.
    They write the same files as one process.
    """
    require("train", "sparrow regenerate")
    from .. import SparrowDraftModel
    from ..data import load_rows
    from ..data.answers import read_answers, read_skipped
    from ..loading import load_target
    from ..training.regenerate import estimate_answer_bytes
    from ..training.regenerate import regenerate as write_answers

    quiet_transformers()
    processes = launched_processes(device)
    console = Console(quiet=not processes.is_main_process)
    rows = load_rows(prompts, split)
    console.print(
        f"{len(rows)} prompts; answers of up to {max_new_tokens} tokens take at most about "
        f"{size(estimate_answer_bytes(rows, max_new_tokens))} in {output}"
    )

    def kept() -> str:
        done = sum(1 for _ in read_answers(output)) + len(read_skipped(output))
        return count_kept(output, done, "row", of=len(rows))

    context.obj.keeps(kept)
    model, its_processor = load_target(
        target, processor, dtype.value, device or processes.device, vllm_positions=vllm_positions
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
        **sampling_of(do_sample, temperature, top_p, top_k),
    )
    processes.wait_for_everyone()
    report_skipped(console, read_skipped(output), len(rows))
    console.print(f"{len(shards)} files of answers in {output}")
