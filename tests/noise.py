"""Prompts of noise, for targets that have learned nothing, and how long their answers are."""

from transformers import BatchFeature, PreTrainedModel

from families import FAMILY_BY_NAME

LENGTH = 10


def read(target: PreTrainedModel, num_frames: int, seed: int) -> BatchFeature:
    return BatchFeature(FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target, num_frames=num_frames, seed=seed))
