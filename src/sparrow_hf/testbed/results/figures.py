"""The pictures of docs/results.md: what becomes of every draft as videos grow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...analysis import draw_figures
from ...plotting import COLOURS, INK, dress, new_figure, save
from .table import NAMES, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Arm → what a legend calls it.
CURVES = {
    "draft:sparrow@chain-5": "Sparrow, glimpse of 64",
    "draft:paper@chain-5": "Sparrow as published",
    "draft:all-rows@chain-5": "all middle-layer rows",
    "draft:msd@chain-5": "MSD-like",
    "draft:msd@chain-5/glimpse=0": "MSD-like, rows deleted",
    "draft:vispec@chain-5": "ViSpec-like",
    "draft:hivis@chain-5": "HiViS-like",
    "prompt-lookup": "prompt lookup",
}


def draw_all(results: Results, folder: Path) -> dict[str, list[Path]]:
    """Draws everything; model type (or `""` for all families together) → files."""
    if not results.families:
        return {}
    drawn = {
        "": [
            save(draw_lengths(results, "tau", "τ, tokens per target forward"), folder / "tau.png"),
            save(draw_lengths(results, "dsr", "DSR, decode speed-up"), folder / "dsr.png"),
        ]
    }
    for family in results.families:
        analysis = results.analysis(family)
        if analysis is not None:
            drawn[family] = draw_figures(analysis, folder / family)
    return drawn


def draw_lengths(results: Results, name: str, label: str) -> Figure:
    """One figure of every arm by visual length, over the clips all lengths share; a panel per family."""
    figure, panels = new_figure(len(results.families))
    for axes, family in zip(panels, results.families, strict=True):
        lengths = results.lengths(family)
        for index, (arm, curve) in enumerate(CURVES.items()):
            points = [(length, row[name]) for length, row in sorted(results.by_length(family, arm).items())]
            if points:
                width = 3 if arm.startswith("draft:sparrow") else 1.3
                axes.plot(*zip(*points, strict=True), color=COLOURS[index], marker="o", ms=3, lw=width, label=curve)
        axes.axhline(1, color=INK, lw=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axes.minorticks_off()
        dress(axes, NAMES.get(family, family), "visual tokens", label)
    return figure
