"""The curves of a training as one picture, from what the trainer has logged."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import is_matplotlib_available

from ..errors import MissingDependencyError, TrainingDataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#808080"
"""Of text and axes. Grey and colours of medium brightness on a transparent ground read on white and on black pages."""
COLOURS = ("#0a84c1", "#d55e00", "#1a9b74", "#b5679a", "#a88a00", "#5b8def", "#c0504d", "#6b9c3c")

#: Label → the logged figure; the curves of the first two panels.
LOSSES = {"training": "loss", "held out": "eval_loss"}
TAUS = {"teacher-forced": "eval_tau", "decoded": "eval_decoded_tau"}


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the loss, τ, and how often each drafted token was accepted, over the steps of a training.

    Acceptance is the decoded one where a [`DecodingCallback`] measured it, the teacher-forced one otherwise.

    Args:
        log_history: `trainer.state.log_history`, or the `log_history` of a checkpoint's `trainer_state.json`.
        path: The file, `.png` or `.svg`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TrainingDataError: Nothing was logged that could be drawn.
    """
    if not is_matplotlib_available():
        raise MissingDependencyError(
            "Drawing the curves of a training needs matplotlib, not installed here. "
            'Install it with: pip install "sparrow-hf[plot]"'
        )
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [panel for panel in _panels(log_history) if panel[2]]
    if not panels:
        raise TrainingDataError("the log holds neither a loss nor an evaluation: there is nothing to draw yet")
    # Ids and dates in the file would make two pictures of the same curves differ.
    with rc_context({"svg.hashsalt": "sparrow"}):
        figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
        for axes, (title, unit, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, title, unit, curves)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panels(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, list[tuple[int, float]]]]]:
    """Title, unit and curves (label → step and value) of each panel; curves without a point are left out."""
    logged = {name for entry in log for name in entry}
    prefix = "eval_decoded_accepted_" if "eval_decoded_accepted_1" in logged else "eval_accepted_"
    positions = sorted(int(name.removeprefix(prefix)) for name in logged if name.startswith(prefix))
    accepted = {f"token {position}": f"{prefix}{position}" for position in positions}
    kind = "decoded" if "decoded" in prefix else "teacher-forced"
    return [
        ("Loss", "loss of all passes per row", _curves(log, LOSSES)),
        ("Tokens per target forward", "τ", _curves(log, TAUS)),
        (f"Accepted drafts ({kind})", "share of rounds", _curves(log, accepted)),
    ]


def _curves(log: Sequence[Mapping[str, Any]], figures: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
    curves = {
        label: [(entry["step"], entry[name]) for entry in log if name in entry] for label, name in figures.items()
    }
    return {label: points for label, points in curves.items() if points}


def _draw(axes: "Axes", title: str, unit: str, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    for index, (label, points) in enumerate(curves.items()):
        # A curve of few points shows where they are.
        marker = "o" if len(points) <= 30 else ""
        axes.plot(*zip(*points, strict=True), label=label, color=COLOURS[index % len(COLOURS)], marker=marker, ms=3)
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.5)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)
    # Below the axes, where no curve can run through it.
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
