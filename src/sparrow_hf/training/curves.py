"""The curves of a training as one picture, from what the trainer has logged."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingDataError
from ..plotting import COLOURS, dress, new_figure, save

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
    panels = [panel for panel in _panels(log_history) if panel[2]]
    if not panels:
        raise TrainingDataError("the log holds neither a loss nor an evaluation: there is nothing to draw yet")
    figure, all_axes = new_figure(len(panels))
    for axes, (title, unit, curves) in zip(all_axes, panels, strict=True):
        for index, (label, points) in enumerate(curves.items()):
            # A curve of few points shows where they are.
            marker = "o" if len(points) <= 30 else ""
            axes.plot(
                *zip(*points, strict=True), label=label, color=COLOURS[index % len(COLOURS)], marker=marker, ms=3
            )
        dress(axes, title, "step", unit, legend_columns=3)
    save(figure, Path(path))


def _panels(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, list[tuple[int, float]]]]]:
    """Title, unit and curves (label → step and value) of each panel; curves without a point are left out."""
    logged = {name for entry in log for name in entry}
    prefix = "eval_decoded_accepted_" if "eval_decoded_accepted_1" in logged else "eval_accepted_"
    positions = sorted(int(name.removeprefix(prefix)) for name in logged if name.startswith(prefix))
    accepted = {f"token {position}": f"{prefix}{position}" for position in positions}
    kind = "decoded" if "decoded" in prefix else "teacher-forced"
    return [
        ("Loss", "sum over the passes of training, per answer token", _curves(log, LOSSES)),
        ("Tokens per target forward", "τ", _curves(log, TAUS)),
        (f"Accepted drafts ({kind})", "share of rounds", _curves(log, accepted)),
    ]


def _curves(log: Sequence[Mapping[str, Any]], figures: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
    curves = {
        label: [(entry["step"], entry[name]) for entry in log if name in entry] for label, name in figures.items()
    }
    return {label: points for label, points in curves.items() if points}
