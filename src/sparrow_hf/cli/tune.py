"""`sparrow tune`: measures a draft on this machine and writes the tree that pays into its configuration."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import BenchmarkError
from ..extras import require
from .common import (
    MAX_FRAMES_HELP,
    Dtype,
    DtypeOption,
    FamilyOption,
    FpsOption,
    MaxNewTokensOption,
    OneDeviceOption,
    ProcessorOption,
    VllmPositionsOption,
    built_in_family,
    quiet_transformers,
)


def tune(
    draft: Annotated[
        str | None,
        typer.Option(
            help="The draft: its folder, which the shape is written to (default: a built-in one, unchanged)."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The video LLM: a folder or a Hub id (default: a built-in one).")
    ] = None,
    family: FamilyOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Data set whose rows hold 'messages', as sparrow bench reads it (default: generated clips, for "
            "built-in targets)."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of --prompts to read, where it has several (default: train).")
    ] = None,
    visual_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=4,
            help="Length of the generated clips in visual tokens (default: 400 and 3000). Repeat the option for "
            "several lengths.",
        ),
    ] = None,
    max_frames: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"{MAX_FRAMES_HELP} Repeat the option for several lengths."),
    ] = None,
    fps: FpsOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts of each length.")] = 4,
    trees: Annotated[
        list[str] | None,
        typer.Option(
            help="A tree, NODES-LEVELS-BEAM, to consider beside chains (default: 24-8-4). Repeat the option for "
            "several trees."
        ),
    ] = None,
    verify: Annotated[int, typer.Option(min=1, help="Number of predicted shapes that decode once more.")] = 3,
    max_new_tokens: MaxNewTokensOption = 128,
    repeats: Annotated[
        int,
        typer.Option(min=1, help="Number of times every shape decodes each prompt. The call of median time counts."),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the choice and write nothing.")] = False,
    processor: ProcessorOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: OneDeviceOption = None,
    vllm_positions: VllmPositionsOption = False,
) -> None:
    """Measures a draft on this machine, and writes the tree that pays into the draft's configuration.

    Says first how long it takes. The weights of the draft stay as they are.
    """
    require("video", "sparrow tune")
    from tqdm import tqdm

    from .. import SparrowDraftModel
    from ..data.prepare import tokenizer_of
    from ..evaluation.prompts import conversation_prompts, read_conversations
    from ..evaluation.provenance import provenance
    from ..loading import load_target, told_if_not_loaded
    from ..testbed import named_or_built_in
    from ..testbed.benchmark_prompts import clip_prompts
    from ..tree_shapes import tree_name
    from ..tuning import TREES, write_shape
    from ..tuning import tune as choose_shape

    quiet_transformers()
    console = Console()
    if prompts is None and (max_frames or fps is not None or split is not None):
        raise BenchmarkError("generated clips have --visual-tokens: leave out --max-frames, --fps and --split")
    if prompts is not None and visual_tokens:
        raise BenchmarkError("--visual-tokens is for generated clips: set the length of --prompts with --max-frames")
    family = built_in_family(family, target)
    written = None if dry_run or draft is None else Path(draft)
    if written is not None and not written.is_dir():
        raise BenchmarkError(
            f"the shape is written into the draft's folder, and {draft} is none: download the draft and give its "
            "folder, or only look with --dry-run"
        )
    target, draft, device = named_or_built_in(target, draft, device, family, BenchmarkError)
    conversations = None if prompts is None else read_conversations(prompts, split, limit)
    model, its_processor = load_target(target, processor, dtype.value, device, vllm_positions=vllm_positions)
    with told_if_not_loaded("draft", draft, BenchmarkError):
        its_draft = SparrowDraftModel.from_pretrained(draft).eval()
    if conversations is None:
        chosen = clip_prompts(model, its_processor, limit, visual_tokens or [400, 3000])
    else:
        chosen = conversation_prompts(its_processor, conversations.rows, max_frames or [], fps)
    lengths: dict[str, list[Any]] = {}
    for prompt in chosen:
        lengths.setdefault("whole prompt" if prompt.length is None else str(prompt.length), []).append(prompt.read)

    with tqdm(desc="tuning", unit="call", leave=False) as bar:

        def progress(done: int, total: int, seconds: float) -> None:
            if not done:
                with tqdm.external_write_mode():
                    console.print(
                        f"{len(chosen)} prompts, {total} calls of up to {max_new_tokens} tokens: at most about "
                        f"{duration(seconds)}"
                    )
            bar.total = total
            bar.update(done - bar.n)

        tuning = choose_shape(
            its_draft,
            model,
            lengths,
            trees=TREES if trees is None else trees,
            num_verified=verify,
            repeats=repeats,
            max_new_tokens=max_new_tokens,
            progress=progress,
            tokenizer=tokenizer_of(its_processor),
        )
    console.print(costs_table(tuning), shapes_table(tuning))
    name, before = tree_name(tuning.shape), tree_name(tuning.configured)
    speeds = tuning.measured
    console.print(
        f"best: {name}, {speeds[tuning.shape]:.2f} × plain generate() after the prefill; configured: {before}, "
        f"{speeds[tuning.configured]:.2f} ×"
    )
    if written is None:
        console.print("nothing was written")
        return
    write_shape(
        written,
        tuning.shape,
        tuning.evidence(prompts=prompts or "generated clips", vllm_positions=vllm_positions, **provenance(model)),
    )
    console.print(f"{name} is written into {written / 'config.json'}", soft_wrap=True)


def duration(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def costs_table(tuning: Any) -> Table:
    """What was measured, one line per length; costs in steps of plain generate()."""
    table = Table("length", title="costs, in steps of plain generate()", title_justify="left", box=None)
    for name in ("plain, ms/token", "draft level", "fixed", "draft prefill"):
        table.add_column(name, justify="right")
    table.add_column("verify (shape: steps)")
    table.add_column("accepted, given the one before")
    for name, length in tuning.evidence()["costs"].items():
        plain = length["plain_ms_per_token"]
        table.add_row(
            name,
            f"{plain:.2f}",
            *(f"{length[each] / plain:.3f}" for each in ("draft_level_ms", "draft_fixed_ms", "draft_prefill_ms")),
            ", ".join(f"{shape}: {seconds / plain:.2f}" for shape, seconds in length["verify_ms"].items()),
            " ".join(f"{share:.2f}".removeprefix("0") for share in length["acceptance"]),
        )
    return table


def shapes_table(tuning: Any) -> Table:
    """The shapes that decoded again: predicted and measured."""
    table = Table("length", "shape", title="shapes, predicted and measured", title_justify="left", box=None)
    for name in ("τ", "round, plain steps", "tokens/s"):
        for kind in ("predicted", "measured"):
            table.add_column(f"{name}, {kind}", justify="right")
    for row in tuning.rows():
        table.add_row(
            row["length"],
            row["shape"],
            *(
                f"{row[f'{kind}_{name}']:.{digits}f}"
                for name, digits in (("tau", 2), ("round", 2), ("tokens_per_second", 1))
                for kind in ("predicted", "measured")
            ),
        )
    return table
