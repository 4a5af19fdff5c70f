"""Untrained targets of two layers, saved as the built-in ones are."""

from pathlib import Path

from sparrow_hf.testbed.families import Family
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_research.pretrain import export


def save_small_target(folder: Path, family: Family, min_new_tokens: int) -> Path:
    """Writes target and processor; what it writes has at least so many tokens, none of them a placeholder."""
    processor = build_processor(family)
    target = build_target(processor.tokenizer, num_hidden_layers=2, family=family)
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    target.generation_config.min_new_tokens = min_new_tokens
    export(target, processor, folder)
    return folder
