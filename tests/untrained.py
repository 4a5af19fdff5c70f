"""A target of the testbed's architecture that has learned nothing, as files."""

from pathlib import Path

from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.testbed.nano import build_processor, build_target


def save_target(folder: Path) -> PreTrainedModel:
    """Saves target and processor into one folder."""
    processor = build_processor()
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    # It would now and then write a placeholder, which is no text.
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    target.save_pretrained(folder)
    processor.save_pretrained(folder)
    return target


def save_models(folder: Path) -> tuple[object, ...]:
    """Saves a target and a draft of it; the options that name them."""
    target = save_target(folder / "target")
    SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(folder / "draft")
    return "--target", folder / "target", "--draft", folder / "draft"
