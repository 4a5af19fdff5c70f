"""The families that the testbed has targets of, both of the paper's: architecture and processor of each.

Tokenizer, chat template, text decoder (depth × 96, one KV head) and video world are shared. A temporal step of the
world is two frames of 64 × 64 pixels; what differs is what becomes of it:

    Qwen2.5-VL        both frames together → 4 × 4 patches → merged 2 × 2           4 visual tokens per step
    LLaVA-OneVision   each frame by itself → 4 × 4 patches → pooled 2 × 2           8 per step, one newline per video

Both see every frame, so one number of visual tokens means half as many seconds of video for LLaVA-OneVision: a frame
left out would hide glyphs that blink, which are gone in every second one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ..errors import UnsupportedTargetError
from .tokenizer import CHAT_TEMPLATE, VOCABULARY_SIZE
from .world import FRAME_SIZE, FRAMES_PER_STEP, TOKENS_PER_STEP

PATCH_SIZE = 16
MERGE_SIZE = 2
GRID = FRAME_SIZE // PATCH_SIZE
VISION_SIZES = {"hidden_size": 96, "intermediate_size": 256}


def _text_config(tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int, **rope: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 65_536,
        "rms_norm_eps": 1e-6,
        # As in the real checkpoints. With 10,000 every dimension rotates too fast to attend by content to positions
        # far back in a long video: LLaVA-OneVision's captions were wrong beyond 3,000 visual tokens.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, **rope},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


class Family(ABC):
    """One architecture of video LLMs as the testbed has it.

    Attributes:
        name: As the command line takes it.
        model_class: The target's class.
        tokens_per_step: Visual tokens of one temporal step of the world.
    """

    name: str
    model_class: type[PreTrainedModel]
    tokens_per_step: int

    @abstractmethod
    def config(self, tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int) -> PreTrainedConfig:
        """A target's configuration: `num_hidden_layers` decoder layers × 96 with one KV head, vision 2 × 96."""

    @abstractmethod
    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        """A target's processor."""


class Qwen2_5_VL(Family):
    """Qwen2.5-VL: a tower over two frames at a time, three-dimensional positions."""

    name = "qwen2.5-vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    tokens_per_step = TOKENS_PER_STEP

    def config(self, tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int) -> Qwen2_5_VLConfig:
        token_id = tokenizer.convert_tokens_to_ids
        return Qwen2_5_VLConfig(
            text_config=_text_config(tokenizer, num_hidden_layers, mrope_section=[8, 4, 4]),
            vision_config={
                **VISION_SIZES,
                "depth": 2,
                "num_heads": 3,
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE_SIZE,
                "temporal_patch_size": FRAMES_PER_STEP,
                "window_size": 2 * FRAME_SIZE,
                "fullatt_block_indexes": [0, 1],
                "tokens_per_second": 4,
                "out_hidden_size": 96,
            },
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            tie_word_embeddings=False,
            dtype="float32",
        )

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
        patches: dict[str, Any] = {
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": FRAMES_PER_STEP,
            "merge_size": MERGE_SIZE,
            "size": {"shortest_edge": FRAME_SIZE**2, "longest_edge": FRAME_SIZE**2},
        }
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**patches),
            video_processor=Qwen2VLVideoProcessor(
                **patches, max_frames=1_000_000, do_sample_frames=False, cap_pixels_per_frame=False
            ),
            tokenizer=tokenizer,
            chat_template=CHAT_TEMPLATE,
        )


class LlavaOnevision(Family):
    """LLaVA-OneVision: a SigLIP tower over single frames, one-dimensional positions, a newline row after each video.

    Unlike the real checkpoints' template, the shared one puts the video between `<|vision_start|>` and
    `<|vision_end|>`.
    """

    name = "llava-onevision"
    model_class = LlavaOnevisionForConditionalGeneration
    tokens_per_step = FRAMES_PER_STEP * (GRID // 2) ** 2

    def config(self, tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int) -> LlavaOnevisionConfig:
        token_id = tokenizer.convert_tokens_to_ids
        return LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **_text_config(tokenizer, num_hidden_layers)},
            vision_config={
                **VISION_SIZES,
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "patch_size": PATCH_SIZE,
                "image_size": FRAME_SIZE,
                "vision_use_head": False,
            },
            image_token_index=token_id("<|image_pad|>"),
            video_token_index=token_id("<|video_pad|>"),
            image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
            dtype="float32",
        )

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionProcessor:
        # The statistics of SigLIP and of the real checkpoints; the classes' own defaults are CLIP's.
        pixels: dict[str, Any] = {
            "size": {"height": FRAME_SIZE, "width": FRAME_SIZE},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]]),
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            tokenizer=tokenizer,
            num_image_tokens=GRID**2,
            vision_feature_select_strategy="full",
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            chat_template=CHAT_TEMPLATE,
        )


QWEN2_5_VL, LLAVA_ONEVISION = Qwen2_5_VL(), LlavaOnevision()
FAMILIES: tuple[Family, ...] = (QWEN2_5_VL, LLAVA_ONEVISION)


def family_of(target: PreTrainedModel) -> Family:
    """The family of a target of the testbed.

    Raises:
        UnsupportedTargetError: The testbed has no targets of this class.
    """
    for family in FAMILIES:
        if isinstance(target, family.model_class):
            return family
    known = " and ".join(family.model_class.__name__ for family in FAMILIES)
    raise UnsupportedTargetError(
        f"The testbed knows targets of {known}, not of {type(target).__name__}. Build one with build_target()."
    )
