"""The former name of [`sparrow_hf.training.run`]: its names stay importable from here, with a warning."""

import warnings

from .run import DDP_CONFIG
from .run import TrainingRun as Launch
from .run import prepare_training as prepare

__all__ = ["DDP_CONFIG", "Launch", "prepare"]

warnings.warn(
    "sparrow_hf.training.launch is now sparrow_hf.training.run, its Launch is TrainingRun and its prepare is "
    "prepare_training: import these instead.",
    FutureWarning,
    stacklevel=2,
)
