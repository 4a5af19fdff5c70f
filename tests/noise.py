"""An untrained target, prompts of noise for it, and the length of its answers."""

from transformers import BatchFeature, PreTrainedModel

from families import FAMILY_BY_NAME

LENGTH = 10


def build_target() -> PreTrainedModel:
    """Its answers hold no placeholders, which are no text, and are as long as they may be."""
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    target.generation_config.suppress_tokens = family.visual_token_ids
    target.generation_config.eos_token_id = None
    return target


def read(target: PreTrainedModel, num_frames: int, seed: int) -> BatchFeature:
    return BatchFeature(FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target, num_frames=num_frames, seed=seed))
