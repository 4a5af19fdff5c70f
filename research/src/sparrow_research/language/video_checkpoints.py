"""Checkpoints of the two trainings of the video LLM: a state, and the settings that it was trained with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from sparrow_hf.artifacts import atomic_path, check_made_alike
from sparrow_hf.errors import TrainingOptionsError


def save_checkpoint(file: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes a checkpoint. `settings` are what decides the trained weights, in numbers and words."""
    with atomic_path(file) as partial:
        torch.save({**state, "settings": settings}, partial)


def load_checkpoint(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint. Warns if it is an earlier version's, which wrote no settings.

    Raises:
        TrainingOptionsError: It was trained with other settings.
    """
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if "settings" in state:
        remedy = "repeat the options of the first run, or delete it to start anew"
        check_made_alike(file, state["settings"], settings, TrainingOptionsError, remedy)
    else:
        warnings.warn(
            f"{file} was written by an earlier version, without settings: nothing tells whether these are the options "
            "of the first run",
            UserWarning,
            stacklevel=2,
        )
    return state
