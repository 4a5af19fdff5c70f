"""Training a draft: arguments, data, the passes of multi-token prediction, their losses, and the trainer."""

from .arguments import ALL_VISUAL_ROWS, TRAINING_PRESETS, SparrowTrainingArguments
from .data import SparrowDataCollator, TrainingStates, append_answer, read_with_target
from .dataset import load_rows, media_keys, refuse_shared_media
from .trainer import SparrowTrainer

__all__ = [
    "ALL_VISUAL_ROWS",
    "TRAINING_PRESETS",
    "SparrowDataCollator",
    "SparrowTrainer",
    "SparrowTrainingArguments",
    "TrainingStates",
    "append_answer",
    "load_rows",
    "media_keys",
    "refuse_shared_media",
    "read_with_target",
]
