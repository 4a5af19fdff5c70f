"""`sparrow analyze`: where a target attends, how far up it needs its visual rows, and what they do to a draft."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import MissingDependencyError
from .common import Dtype, errors_as_sentences, quiet_transformers


def analyze(
    target: Annotated[str, typer.Option(help="The video LLM to look into: folder or Hub id.")],
    prompts: Annotated[
        str, typer.Option(help="Rows with 'messages': .jsonl, .parquet, a folder of save_to_disk, or a Hub id.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results. Run again to go on where it was stopped.")],
    draft: Annotated[str | None, typer.Option(help="A draft of the target: what visual rows do to it.")] = None,
    split: Annotated[str, typer.Option(help="Split of --prompts.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 256,
    fps: Annotated[float | None, typer.Option(min=0.01, help="Frames per second to see, at most.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames to see of a video, at most.")] = None,
    processor: Annotated[str | None, typer.Option(help="Processor of --target, if it lies elsewhere.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the target computes in.")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; auto spreads over all GPUs.")] = None,
) -> None:
    """Looks into a target over some prompts, and recommends the layers that a draft of it should read.

    Writes analysis.json and, if matplotlib is installed, figures.
    """
    with errors_as_sentences():
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
        console.print(
            f"{len(conversations)} prompts, each answered once and read {len(layers) + 1} times; results in {output}"
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
    """One table per question, a column per length, and the recommendation."""
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
        "on rows of",
        {
            name: [mass(pooled, index) for pooled in lengths]
            for index, name in enumerate(("instruction", "visual", "text"))
        },
    )
    show(
        "Tokens of the answer that stay if visual rows are hidden from layer x on",
        "x",
        {layer: [f"{pooled['agreement'][layer]:.1%}" for pooled in lengths] for layer in lengths[0]["agreement"]},
    )
    for name, shares in lengths[0].get("retention", {}).items():
        show(
            f"Tokens per target forward (τ), the draft's visual rows chosen by {name.replace('_', ' ')}",
            "kept",
            {
                f"{float(share):.0%}": [f"{p['retention'][name][share]['tau']:.2f}" for p in lengths]
                for share in shares
            },
        )
    advice = summary["recommendation"]
    console.print(
        f"The target needs its visual rows in {advice['needed_layers']} layers. To start from: "
        f"visual_bridge_layer={advice['visual_bridge_layer']}, feature_layers={advice['feature_layers']}",
        markup=False,
    )
