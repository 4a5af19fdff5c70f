"""The style of this package's figures: grey on a transparent background, readable on white and on black pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import atomic_path
from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808080"
COLOURS = ("#0a84c1", "#d55e00", "#1a9b74", "#b5679a", "#a88a00", "#5b8def", "#c0504d", "#6b9c3c")


def new_figure(count: int) -> tuple[Figure, Sequence[Axes]]:
    """An empty picture of some panels, side by side.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("plot", "Drawing figures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.9), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def dress(axes: Axes, title: str, x_label: str, y_label: str, legend_columns: int = 1) -> None:
    """Gives a panel its titles, and its legend if it has named curves."""
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK, which="both")
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.grid(color=INK, alpha=0.25, linewidth=0.5)
        # Below the axes, where no curve can run through it.
        axes.legend(
            frameon=False,
            labelcolor=INK,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=legend_columns,
        )


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture, `.png` or `.svg`; its folder is made. The same picture gives the same file."""
    from matplotlib import rc_context

    # Without ids and dates, the same curves always give the same file.
    with rc_context({"svg.hashsalt": "sparrow"}), atomic_path(path) as partial:
        figure.savefig(
            partial,
            format=path.suffix[1:],
            transparent=True,
            dpi=150,
            metadata={"Date": None} if path.suffix == ".svg" else None,
        )
    return path
