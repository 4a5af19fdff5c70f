"""Three kinds of targets that the testbed has no trained ones of: Qwen3.5-like, Gemma-4-like and GLM-4.xV-like.

They are real classes with the testbed's words. As small as they are, they can learn a few clips by heart: `kinds.py`.
"""

from __future__ import annotations

from typing import Any

import transformers as hf

from sparrow_hf.testbed.families import Family
from sparrow_hf.testbed.tokenizer import CHAT_TEMPLATE, VOCABULARY_SIZE
from sparrow_hf.testbed.world import TOKENS_PER_STEP

WIDTH, WINDOW = 128, 64
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4]}
PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
FRAME = {"shortest_edge": 64**2, "longest_edge": 64**2}
CLIP = {"shortest_edge": 64**2, "longest_edge": 1024 * 64**2}
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 16}


class Kind(Family):
    """A kind of target, with the testbed's words.

    Attributes:
        tokens: Special tokens under the attribute names the processor looks for.
        video: A video's place in a prompt.
        grows_trees: Whether trees are verified, and not only chains.
    """

    tokens_per_step = TOKENS_PER_STEP
    tokens: dict[str, str]
    video: str
    grows_trees = True

    def text(self, tokenizer: Any, num_hidden_layers: int, **fields: Any) -> dict[str, Any]:
        """Configuration of the decoder."""
        return {
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **fields,
        }

    def token_ids(self, tokenizer: Any) -> dict[str, int]:
        """Ids of `tokens`, as configurations name them."""
        return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in self.tokens.items()}

    def words(self, tokenizer: Any) -> dict[str, Any]:
        """What every processor is made with; adds `tokens` to the tokenizer."""
        tokenizer.add_tokens(list(self.tokens.values()), special_tokens=True)
        for name, value in {**self.tokens, **self.token_ids(tokenizer)}.items():
            setattr(tokenizer, name, value)
        template = CHAT_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", self.video)
        return {"tokenizer": tokenizer, "chat_template": template}


class Qwen35(Kind):
    """Three of four layers are recurrent."""

    name = "qwen3.5"
    model_class = hf.Qwen3_5ForConditionalGeneration
    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    grows_trees = False

    def config(self, tokenizer: Any, num_hidden_layers: int) -> Any:
        text = self.text(
            tokenizer,
            num_hidden_layers,
            rope_parameters=MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
            layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (num_hidden_layers // 4),
            linear_conv_kernel_dim=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        )
        vision = VISION | {"out_hidden_size": WIDTH, "num_position_embeddings": 16}
        return hf.Qwen3_5Config(text_config=text, vision_config=vision, **self.token_ids(tokenizer))

    def processor(self, tokenizer: Any) -> Any:
        return hf.Qwen3VLProcessor(
            image_processor=hf.Qwen2VLImageProcessor(**PATCHES, size=FRAME),
            video_processor=hf.Qwen3VLVideoProcessor(**PATCHES, size=CLIP, cap_pixels_per_frame=False),
            **self.words(tokenizer),
        )


class Gemma4(Kind):
    """Three of four layers have a window, shorter than any prompt; every layer reads an embedding of its own."""

    name = "gemma-4"
    model_class = hf.Gemma4ForConditionalGeneration
    tokens = {f"{name}_token": f"<|{name}|>" for name in ("image", "video", "audio", "boi", "eoi", "boa", "eoa")}
    video = "<|video|>"

    def config(self, tokenizer: Any, num_hidden_layers: int) -> Any:
        text = self.text(
            tokenizer,
            num_hidden_layers,
            per_layer_config={},
            sliding_window=WINDOW,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * (num_hidden_layers // 4),
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCABULARY_SIZE,
            tie_word_embeddings=False,
        )
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        }
        ids = self.token_ids(tokenizer)
        ids["eoa_token_index"] = ids.pop("eoa_token_id")
        del ids["eoi_token_id"]
        return hf.Gemma4Config(
            text_config=text, vision_config=vision, audio_config=None, tie_word_embeddings=False, **ids
        )

    def processor(self, tokenizer: Any) -> Any:
        pixels = {"patch_size": 16, "max_soft_tokens": 70, "pooling_kernel_size": 2, "do_resize": False}
        return hf.Gemma4Processor(
            feature_extractor=hf.Gemma4AudioFeatureExtractor(),
            image_processor=hf.Gemma4ImageProcessor(**pixels),
            video_processor=hf.Gemma4VideoProcessor(**pixels),
            **self.words(tokenizer),
        )


class Glm4V(Kind):
    """Full attention in every layer, norms behind attention and MLP too."""

    name = "glm-4.xv"
    model_class = hf.Glm4vForConditionalGeneration
    tokens = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    video = "<|begin_of_video|><|video|><|end_of_video|>"

    def config(self, tokenizer: Any, num_hidden_layers: int) -> Any:
        text = self.text(tokenizer, num_hidden_layers, rope_parameters=MROPE)
        vision = VISION | {"out_hidden_size": WIDTH, "image_size": 64}
        return hf.Glm4vConfig(text_config=text, vision_config=vision, **self.token_ids(tokenizer))

    def processor(self, tokenizer: Any) -> Any:
        return hf.Glm4vProcessor(
            image_processor=hf.Glm4vImageProcessor(**PATCHES, size=FRAME),
            video_processor=hf.Glm4vVideoProcessor(**PATCHES, size=CLIP),
            **self.words(tokenizer),
        )


KINDS: tuple[Kind, ...] = (Qwen35(), Gemma4(), Glm4V())
