"""Training a draft: arguments, data, the passes of multi-token prediction, their losses, and the trainer."""

from ..data.datasets import load_rows
from ..data.prepare import append_answer
from ..extras import require

# Before the files below import what may not be there.
require("train", "Training a draft")

from .arguments import ALL_VISUAL_ROWS, DRAFT_PRESETS, TRAINING_PRESETS, SparrowTrainingArguments
from .callbacks import DecodingCallback
from .curves import plot_curves
from .data import SparrowDataCollator, TrainingStates, read_with_target
from .leakage import media_keys, refuse_shared_media
from .trainer import SparrowTrainer
from .vocabulary import load_vocabulary

__all__ = [
    "ALL_VISUAL_ROWS",
    "DRAFT_PRESETS",
    "TRAINING_PRESETS",
    "DecodingCallback",
    "SparrowDataCollator",
    "SparrowTrainer",
    "SparrowTrainingArguments",
    "TrainingStates",
    "append_answer",
    "load_rows",
    "load_vocabulary",
    "media_keys",
    "plot_curves",
    "read_with_target",
    "refuse_shared_media",
]
