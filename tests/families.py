"""The supported architectures, as tiny targets: the nine of the first release here, the others in files beside.

Everything a family needs is one entry: its configuration, its processor, and what a prompt holds where a video goes.
No other test code depends on the family.
"""

import transformers as hf
from family_parts import (
    LLAVA_PROMPTS,
    LLAVA_TOKENS,
    LONGEST_EDGE,
    MROPE,
    PAD_TOKENS,
    PINPOINTS,
    PIXELS,
    PLACEHOLDERS,
    QWEN_PROMPTS,
    QWEN_TOKENS,
    QWEN_VISION_SIZES,
    SHORTEST_EDGE,
    SQUARE,
    VIDEO_PIXELS,
    VISION_SIZES,
    llava_ids,
    qwen_ids,
    qwen_processor,
)
from hybrid_families import HYBRID_FAMILIES
from more_families import MORE_FAMILIES
from recurrent_families import RECURRENT_FAMILIES
from refused_families import REFUSED_FAMILIES

from tiny_targets import FRAME_SIZE, HIDDEN_SIZE, PATCH_SIZE, Family

#: The nine that every test of a family runs on.
FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen2_5_vl",
        model_class=hf.Qwen2_5_VLForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": MROPE},
            # Windows of one merged patch, full attention in the last block: both kinds of block run.
            vision_config=QWEN_VISION_SIZES
            | {"window_size": 2 * PATCH_SIZE, "fullatt_block_indexes": [1], "tokens_per_second": 2},
            **qwen_ids(tokens),
        ),
        processor=qwen_processor(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, PIXELS),
        named_tokens=QWEN_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **QWEN_PROMPTS,
    ),
    Family(
        name="llava_onevision",
        model_class=hf.LlavaOnevisionForConditionalGeneration,
        config=lambda text, tokens: hf.LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=VISION_SIZES
            | {"model_type": "siglip_vision_model", "image_size": FRAME_SIZE, "vision_use_head": False},
            image_grid_pinpoints=PINPOINTS,
            **llava_ids(tokens),
        ),
        processor=lambda tokenizer: hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
            tokenizer=tokenizer,
            video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE),
            num_image_tokens=(FRAME_SIZE // PATCH_SIZE) ** 2,
            vision_feature_select_strategy="full",
        ),
        named_tokens=LLAVA_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **LLAVA_PROMPTS,
    ),
    Family(
        name="internvl",
        model_class=hf.InternVLForConditionalGeneration,
        config=lambda text, tokens: hf.InternVLConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=VISION_SIZES | {"image_size": FRAME_SIZE},
            image_token_id=tokens["context_image_token"],
            image_seq_length=4,
            # The smallest InternVL models share embedding and head; one family here must do so too.
            tie_word_embeddings=True,
        ),
        processor=lambda tokenizer: hf.InternVLProcessor(
            image_processor=hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=2),
            tokenizer=tokenizer,
            video_processor=hf.InternVLVideoProcessor(size=SQUARE),
            image_seq_length=4,
        ),
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        placeholder_tokens=("context_image_token",),
        video_prompt="<video>\n",
        image_prompt="<IMG_CONTEXT>\n",
    ),
    Family(
        name="qwen2_vl",
        model_class=hf.Qwen2VLForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen2VLConfig(
            text_config=text | {"rope_parameters": MROPE},
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": HIDDEN_SIZE,
                "num_heads": 2,
                "patch_size": PATCH_SIZE,
            },
            **qwen_ids(tokens),
        ),
        processor=qwen_processor(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, PIXELS),
        named_tokens=QWEN_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **QWEN_PROMPTS,
    ),
    Family(
        name="qwen3_vl",
        model_class=hf.Qwen3VLForConditionalGeneration,
        config=lambda text, tokens: hf.Qwen3VLConfig(
            text_config=text
            | {
                "head_dim": HIDDEN_SIZE // text["num_attention_heads"],
                "rope_parameters": MROPE | {"mrope_interleaved": True},
            },
            vision_config=QWEN_VISION_SIZES
            | {
                "num_position_embeddings": (FRAME_SIZE // PATCH_SIZE) ** 2,
                # Deepstack: features of both blocks are added inside the decoder.
                "deepstack_visual_indexes": [0, 1],
            },
            **qwen_ids(tokens),
        ),
        processor=qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, VIDEO_PIXELS),
        named_tokens=QWEN_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **QWEN_PROMPTS,
    ),
    Family(
        name="llava_next_video",
        model_class=hf.LlavaNextVideoForConditionalGeneration,
        config=lambda text, tokens: hf.LlavaNextVideoConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=VISION_SIZES | {"model_type": "clip_vision_model", "image_size": FRAME_SIZE},
            image_grid_pinpoints=PINPOINTS,
            **llava_ids(tokens),
        ),
        processor=lambda tokenizer: hf.LlavaNextVideoProcessor(
            image_processor=hf.LlavaNextImageProcessor(**SHORTEST_EDGE, image_grid_pinpoints=PINPOINTS),
            tokenizer=tokenizer,
            video_processor=hf.LlavaNextVideoVideoProcessor(**SHORTEST_EDGE),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        named_tokens=LLAVA_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **LLAVA_PROMPTS,
    ),
    Family(
        name="video_llava",
        model_class=hf.VideoLlavaForConditionalGeneration,
        config=lambda text, tokens: hf.VideoLlavaConfig(
            text_config=text | {"model_type": "llama"},
            # No pooling follows this tower, so its patches are larger: 4 and a class token per frame.
            vision_config=VISION_SIZES
            | {"model_type": "clip_vision_model", "image_size": FRAME_SIZE, "patch_size": FRAME_SIZE // 2},
            **llava_ids(tokens),
        ),
        processor=lambda tokenizer: hf.VideoLlavaProcessor(
            image_processor=hf.VideoLlavaImageProcessor(**SHORTEST_EDGE),
            tokenizer=tokenizer,
            video_processor=hf.VideoLlavaVideoProcessor(**SHORTEST_EDGE),
            patch_size=FRAME_SIZE // 2,
        ),
        named_tokens=LLAVA_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        **LLAVA_PROMPTS,
    ),
    Family(
        name="smolvlm",
        model_class=hf.SmolVLMForConditionalGeneration,
        config=lambda text, tokens: hf.SmolVLMConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=VISION_SIZES | {"image_size": FRAME_SIZE},
            image_token_id=tokens["image_token"],
            scale_factor=2,
            pad_token_id=text["pad_token_id"],
        ),
        processor=lambda tokenizer: hf.SmolVLMProcessor(
            image_processor=hf.SmolVLMImageProcessor(**LONGEST_EDGE, do_image_splitting=False),
            tokenizer=tokenizer,
            video_processor=hf.SmolVLMVideoProcessor(**LONGEST_EDGE),
            image_seq_len=4,
        ),
        named_tokens=LLAVA_TOKENS
        | {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
        placeholder_tokens=("image_token",),
        video_prompt="<video>",
        image_prompt="<image>",
        # Its processor writes images and videos under one key.
        mixes_modalities=False,
    ),
    Family(
        name="video_llama_3",
        model_class=hf.VideoLlama3ForConditionalGeneration,
        config=lambda text, tokens: hf.VideoLlama3Config(
            text_config=text | {"model_type": "qwen2"}, vision_config=VISION_SIZES, **qwen_ids(tokens)
        ),
        processor=lambda tokenizer: hf.VideoLlama3Processor(
            image_processor=hf.VideoLlama3ImageProcessor(patch_size=PATCH_SIZE, size=PIXELS),
            tokenizer=tokenizer,
            video_processor=hf.VideoLlama3VideoProcessor(patch_size=PATCH_SIZE, size=VIDEO_PIXELS),
        ),
        named_tokens=PAD_TOKENS,
        placeholder_tokens=PLACEHOLDERS,
        video_prompt="<|video_pad|>\n",
        image_prompt="<|image_pad|>\n",
        # Its projector takes the features of a whole video.
        takes_chunks=False,
    ),
)

#: All that this version of transformers has.
ALL_FAMILIES: tuple[Family, ...] = (
    *FAMILIES,
    *MORE_FAMILIES,
    *HYBRID_FAMILIES,
    *REFUSED_FAMILIES,
    *RECURRENT_FAMILIES,
)

#: The same, by name.
FAMILY_BY_NAME: dict[str, Family] = {family.name: family for family in ALL_FAMILIES}
