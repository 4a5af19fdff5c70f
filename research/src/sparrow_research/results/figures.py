"""The pictures of docs/results.md: what becomes of every draft as videos grow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparrow_hf.analysis import draw_figures
from sparrow_hf.plotting import COLOURS, INK, dress, new_figure, save

from .arms import CURVES, DEFAULT, legend_of
from .table import NAMES, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        for index, arm in enumerate(CURVES):
            points = [(length, row[name]) for length, row in sorted(results.by_length(family, arm).items())]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[index],
                    marker="o",
                    ms=3,
                    lw=3 if arm == DEFAULT else 1.3,
                    label=legend_of(arm),
                )
        axes.axhline(1, color=INK, lw=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axes.minorticks_off()
        dress(axes, NAMES.get(family, family), "visual tokens", label)
    return figure
