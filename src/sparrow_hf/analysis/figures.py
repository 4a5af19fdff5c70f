"""The pictures of an analysis. Grey ink on a transparent ground: readable on white and on black pages."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import is_matplotlib_available

from ..errors import MissingDependencyError
from .prompts import GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808080"
COLOURS = ("#0a84c1", "#d55e00", "#1a9b74", "#b5679a", "#a88a00", "#5b8def", "#c0504d", "#6b9c3c")

#: What scores of visual rows are called in a legend.
SCORES = {"last_instruction": "last instruction token", "all_text": "all text", "strided": "even strides"}


def draw_figures(summary: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Draws what [`~sparrow_hf.analysis.analyze`] returned: `attention.png`, `heads.png`, `removal.png`,
    `similarity.png`, and with a draft `retention.png`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if not is_matplotlib_available():
        raise MissingDependencyError(
            'Drawing figures needs matplotlib, not installed here. Install it with: pip install "sparrow-hf[plot]"'
        )
    figures = {
        "attention": _attention(summary["lengths"]),
        "heads": _heads(summary["lengths"]),
        "removal": _removal(summary),
        "similarity": _similarity(summary["all"]),
    }
    if "retention" in summary["all"]:
        figures["retention"] = _retention(summary["lengths"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], transparent=True, dpi=150)
    return paths


def _panels(count: int) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.9), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _attention(lengths: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, panels = _panels(len(lengths))
    for axes, pooled in zip(panels, lengths, strict=True):
        mass = np.asarray(pooled["attention"]["last_instruction"]).mean(axis=1)  # (layers, 3)
        for index, name in enumerate(GROUPS):
            label = f"{name} ({mass[:, index].mean():.0%} over all layers)"
            axes.plot(range(len(mass)), mass[:, index], color=COLOURS[index], label=label)
        _dress(axes, f"Last instruction token, {_length(pooled)}", "layer", "attention mass")
    return figure


def _heads(lengths: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, panels = _panels(len(lengths))
    for axes, pooled in zip(panels, lengths, strict=True):
        visual = np.asarray(pooled["attention"]["answer"])[..., 1]  # (layers, heads)
        image = axes.imshow(visual.T, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(0, visual.shape[1], max(1, visual.shape[1] // 8)))
        bar = figure.colorbar(image, ax=axes)
        bar.ax.tick_params(colors=INK)
        bar.outline.set_edgecolor(INK)
        _dress(axes, f"Answer on visual rows, {_length(pooled)}", "layer", "head")
    return figure


def _removal(summary: Mapping[str, Any]) -> "Figure":
    figure, (axes,) = _panels(1)
    for index, pooled in enumerate(summary["lengths"]):
        colour = COLOURS[index % len(COLOURS)]
        for figures, style, kind in ((pooled["agreement"], "-", "agreement"), (pooled.get("score"), "--", "score")):
            if figures:
                points = sorted((int(layer), value) for layer, value in figures.items())
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=colour,
                    marker="o",
                    ms=3,
                    label=f"{kind}, {_length(pooled)}",
                )
    axes.axvline(summary["recommendation"]["needed_layers"], color=INK, linestyle=":")
    _dress(axes, "Visual rows hidden from layer x on", "x", "share of the answer that stays")
    return figure


def _similarity(pooled: Mapping[str, Any]) -> "Figure":
    figure, (axes,) = _panels(1)
    for index, (kind, cosines) in enumerate(pooled["similarity"].items()):
        axes.plot(range(1, len(cosines) + 1), cosines, color=COLOURS[index], label=f"{kind} rows")
    _dress(axes, "States and what entered the decoder", "after so many layers", "cosine similarity")
    return figure


def _retention(lengths: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, panels = _panels(len(lengths))
    for axes, pooled in zip(panels, lengths, strict=True):
        for index, (name, shares) in enumerate(pooled["retention"].items()):
            ascending = sorted(shares, key=float)
            taus = [shares[share]["tau"] for share in ascending]
            # Curves often coincide: a thinner one leaves the others to be seen.
            width = 3.5 - index
            axes.plot(range(len(taus)), taus, color=COLOURS[index], lw=width, marker="o", ms=3, label=SCORES[name])
            axes.set_xticks(range(len(taus)), [f"{float(share):.0%}" for share in ascending])
        _dress(axes, f"Visual rows in the draft, {_length(pooled)}", "rows kept", "τ")
    return figure


def _length(pooled: Mapping[str, Any]) -> str:
    return f"{pooled['visual_tokens']['mean']:,.0f} visual tokens"


def _dress(axes: "Axes", title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.grid(color=INK, alpha=0.25, linewidth=0.5)
        # Below the axes, where no curve can run through it.
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
