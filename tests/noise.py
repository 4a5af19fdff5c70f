"""Prompts of noise for untrained targets, and the length of their answers."""

from transformers import BatchFeature, PreTrainedModel

from families import FAMILY_BY_NAME

LENGTH = 10


def read(target: PreTrainedModel, num_frames: int, seed: int) -> BatchFeature:
    return BatchFeature(FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target, num_frames=num_frames, seed=seed))
