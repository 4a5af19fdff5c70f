"""The model `sparrow` of lmms-eval: a video LLM, with or without a Sparrow draft."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: its entry-point group `lmms_eval.models` names this function."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="sparrow", chat_class_path="sparrow_lmms_eval.model.Sparrow")
