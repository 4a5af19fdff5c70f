"""The embedded default: a tiny video LLM of a real architecture, its trained draft, and the video world both know.

Usable right after installation, offline: `load()` gives the models, `make_clip()` a video they have not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .nano import ASSETS, content_accuracy, load_target
from .world import EVALUATION_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, Clip, make_clip

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    from ..modeling_sparrow import SparrowDraftModel


def load() -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, SparrowDraftModel]:
    """The trained target, its processor and its draft, in fp32 evaluation mode."""
    from ..modeling_sparrow import SparrowDraftModel

    target, processor = load_target()
    return target, processor, SparrowDraftModel.from_pretrained(ASSETS / "draft").eval()


__all__ = [
    "EVALUATION_SEEDS",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Clip",
    "content_accuracy",
    "load",
    "load_target",
    "make_clip",
]
