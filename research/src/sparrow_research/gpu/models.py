"""The target and its draft, with random weights made on the device, and prompts for them."""

import math

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sparrow_hf import SparrowDraftModel

from .sizes import Sizes

#: Size of the vocabulary → its first special token; text ids lie below it.
_FIRST_SPECIAL = {152064: 151643, 512: 500}


def random_target(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Qwen2.5-VL of these text shapes with a vision tower of no size; greedy text varies and never ends."""
    special = _FIRST_SPECIAL[sizes.text["vocab_size"]]
    text = sizes.text | {"bos_token_id": None, "eos_token_id": special, "pad_token_id": special}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=False,
        **{name: special + 2 + number for number, name in enumerate(names)},
    )
    # Initialised on the device itself: 7 billion numbers take a CPU minutes.
    with torch.device(device):
        target = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    randomize(target)
    # As a real model has one, so that it is looked for; its logit is 0, which is never the highest.
    target.get_output_embeddings().weight.data[special] = 0
    target.generation_config = GenerationConfig(do_sample=False, eos_token_id=special, pad_token_id=special)
    return target.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Matrices keep the variance of what they map; embeddings have variance one, and logits one above it."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            spread = 1.0 if "embed_tokens" in name else 1 / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, 1.5 * spread if "lm_head" in name else spread)
        elif parameter.ndim == 1 and name.endswith("bias"):
            parameter.normal_(0.0, 0.1)


def random_draft(target: PreTrainedModel, shape: str) -> SparrowDraftModel:
    """A draft of `target`, bound to it, that proposes trees of `shape`; its tokens are hardly ever accepted."""
    draft = SparrowDraftModel.from_target(target)
    randomize(draft)
    draft.config.set_tree_shape(shape)
    return draft


def prompt(target: PreTrainedModel, sizes: Sizes, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `generate()`: placeholders with random embeddings of the video, then random text.

    ids      video … video | text … text
    rows     length − text | text_rows
    """
    generator = torch.Generator(target.device).manual_seed(seed)
    special = _FIRST_SPECIAL[sizes.text["vocab_size"]]
    text_rows = min(sizes.text_rows, length // 2)
    ids = torch.randint(special, (1, length), device=target.device, generator=generator)
    ids[:, :-text_rows] = target.config.video_token_id
    embeds = target.get_input_embeddings()(ids).detach()
    visual = embeds[:, :-text_rows]
    visual.copy_(torch.randn(visual.shape, device=target.device, generator=generator))
    return {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
