"""`sparrow analyze`: where a target attends, which layers need visual tokens, and how many of them a draft needs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import MissingDependencyError
from .common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FpsOption,
    MaxFramesOption,
    MaxNewTokensOption,
    ProcessorOption,
    PromptsOption,
    SplitOption,
    count_kept,
    quiet_transformers,
)


def analyze(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="The video LLM to analyze: a folder or a Hub id.")],
    prompts: PromptsOption,
    output: Annotated[
        Path, typer.Option(help="Folder to write the results to. The same command continues a stopped run.")
    ],
    draft: Annotated[
        str | None, typer.Option(help="A draft of the target, to measure how many visual tokens it needs.")
    ] = None,
    split: SplitOption = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of prompts to read (default: all).")] = None,
    max_new_tokens: MaxNewTokensOption = 256,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
) -> None:
    """Measures where a target attends on your prompts, and recommends the layers that its draft should read.

    Writes analysis.json and, if matplotlib is installed, figures.
    """
    from .. import SparrowDraftModel
    from ..analysis import analyze as run_analysis
    from ..analysis import draw_figures, read_conversations
    from ..analysis.removal import layer_grid
    from ..artifacts import write_json
    from ..evaluation.provenance import provenance
    from ..loading import load_target
    from ..targets import TargetView

    quiet_transformers()
    console = Console()
    conversations = read_conversations(prompts, split, limit)
    model, its_processor = load_target(target, processor, dtype.value, device)
    layers = layer_grid(len(TargetView(model).layers))
    console.print(f"{len(conversations)} prompts: one answer and {len(layers) + 1} forwards each; results in {output}")
    context.obj.keeps(
        lambda: count_kept(output, len(list((output / "prompts").glob("*.json"))), "prompt", of=len(conversations))
    )
    summary = run_analysis(
        model,
        its_processor,
        conversations,
        output,
        draft=None if draft is None else SparrowDraftModel.from_pretrained(draft).eval(),
        layers=layers,
        max_new_tokens=max_new_tokens,
        fps=fps,
        max_frames=max_frames,
    )
    report = {"provenance": provenance(model, target_id=target, draft_id=draft, prompts=prompts)} | summary
    write_json(output / "analysis.json", report, indent=2)
    print_summary(summary, console)
    try:
        drawn = ", ".join(path.name for path in draw_figures(summary, output))
        console.print(f"analysis.json, {drawn} in {output}")
    except MissingDependencyError as error:
        console.print(f"analysis.json in {output}; no figures: {error}", style="yellow", markup=False)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints one table per measurement, with a column per length, and the recommendation."""
    lengths = summary["lengths"]
    heads = [f"{pooled['visual_tokens']['mean']:,.0f} visual tokens" for pooled in lengths]

    def show(title: str, first: str, rows: dict[str, list[str]]) -> None:
        table = Table(first, *heads, title=title)
        for name, cells in rows.items():
            table.add_row(name, *cells)
        console.print(table)

    def mass(pooled: dict[str, Any], group: int) -> str:
        layers = pooled["attention"]["last_instruction"]
        shares = [head[group] for layer in layers for head in layer]
        return f"{sum(shares) / len(shares):.1%}"

    show(
        "Attention of the last instruction token, all layers and heads",
        "attends to",
        {
            name: [mass(pooled, index) for pooled in lengths]
            for index, name in enumerate(("instruction", "visual", "text"))
        },
    )
    show(
        "Tokens of the answer that stay the same if visual tokens are hidden from layer x on",
        "x",
        {layer: [f"{pooled['agreement'][layer]:.1%}" for pooled in lengths] for layer in lengths[0]["agreement"]},
    )
    for name, shares in lengths[0].get("retention", {}).items():
        show(
            f"Tokens per target forward (τ), the draft's visual tokens chosen by {name.replace('_', ' ')}",
            "kept",
            {
                f"{float(share):.0%}": [f"{p['retention'][name][share]['tau']:.2f}" for p in lengths]
                for share in shares
            },
        )
    advice = summary["recommendation"]
    console.print(
        f"The target needs its visual tokens in {advice['needed_layers']} layers. Recommended settings: "
        f"visual_bridge_layer={advice['visual_bridge_layer']}, feature_layers={advice['feature_layers']}",
        markup=False,
    )
