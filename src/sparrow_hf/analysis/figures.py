"""The pictures of an analysis."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plotting import COLOURS, INK, dress, new_figure, save
from .answered import GROUPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Names of the scores of visual tokens in a legend.
SCORES = {"last_instruction": "last instruction token", "all_text": "all text", "strided": "even strides"}


def draw_figures(summary: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Draws what [`~sparrow_hf.analysis.analyze`] returned: `attention.png`, `heads.png`, `removal.png`,
    `similarity.png`, and with a draft `retention.png`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figures = {
        "attention": _attention(summary["lengths"]),
        "heads": _heads(summary["lengths"]),
        "removal": _removal(summary),
        "similarity": _similarity(summary["all"]),
    }
    if "retention" in summary["all"]:
        figures["retention"] = _retention(summary["lengths"])
    return [save(figure, Path(folder) / f"{name}.png") for name, figure in figures.items()]


def _attention(lengths: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, panels = new_figure(len(lengths))
    for axes, pooled in zip(panels, lengths, strict=True):
        mass = np.asarray(pooled["attention"]["last_instruction"]).mean(axis=1)  # (layers, 3)
        for index, name in enumerate(GROUPS):
            label = f"{name} ({mass[:, index].mean():.0%} over all layers)"
            axes.plot(range(len(mass)), mass[:, index], color=COLOURS[index], label=label)
        dress(axes, f"Last instruction token, {_length(pooled)}", "layer", "attention mass")
    return figure


def _heads(lengths: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, panels = new_figure(len(lengths))
    for axes, pooled in zip(panels, lengths, strict=True):
        visual = np.asarray(pooled["attention"]["answer"])[..., 1]  # (layers, heads)
        image = axes.imshow(visual.T, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(0, visual.shape[1], max(1, visual.shape[1] // 8)))
        bar = figure.colorbar(image, ax=axes)
        bar.ax.tick_params(colors=INK)
        bar.outline.set_edgecolor(INK)
        dress(axes, f"Answer on visual rows, {_length(pooled)}", "layer", "head")
    return figure


def _removal(summary: Mapping[str, Any]) -> "Figure":
    figure, (axes,) = new_figure(1)
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
    dress(axes, "Visual rows hidden from layer x on", "x", "share of the answer that stays")
    return figure


def _similarity(pooled: Mapping[str, Any]) -> "Figure":
    figure, (axes,) = new_figure(1)
    for index, (kind, cosines) in enumerate(pooled["similarity"].items()):
        axes.plot(range(1, len(cosines) + 1), cosines, color=COLOURS[index], label=f"{kind} rows")
    dress(axes, "States and what entered the decoder", "after so many layers", "cosine similarity")
    return figure


def _retention(lengths: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, panels = new_figure(len(lengths))
    for axes, pooled in zip(panels, lengths, strict=True):
        for index, (name, shares) in enumerate(pooled["retention"].items()):
            ascending = sorted(shares, key=float)
            taus = [shares[share]["tau"] for share in ascending]
            # Curves often coincide: a thinner one leaves the others to be seen.
            width = 3.5 - index
            axes.plot(range(len(taus)), taus, color=COLOURS[index], lw=width, marker="o", ms=3, label=SCORES[name])
            axes.set_xticks(range(len(taus)), [f"{float(share):.0%}" for share in ascending])
        # τ is 1 without a draft. An axis from the smallest value would exaggerate small differences.
        highest = max(kept["tau"] for shares in pooled["retention"].values() for kept in shares.values())
        axes.set_ylim(1, 1 + 1.1 * max(highest - 1, 0.1))
        dress(axes, f"Visual rows in the draft, {_length(pooled)}", "rows kept", "τ")
    return figure


def _length(pooled: Mapping[str, Any]) -> str:
    return f"{pooled['visual_tokens']['mean']:,.0f} visual tokens"
