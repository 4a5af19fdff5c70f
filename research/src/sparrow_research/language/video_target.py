"""A video LLM that writes English: SmolVLM's architecture around SmolLM2, with a small vision tower of our own.

    python -m sparrow_research.language.video_target --smollm2 FOLDER --parts FOLDER --output FOLDER

puts the target together from SmolLM2's folder and the trained parts, which hold none of SmolLM2's weights: tower and
connector (`video_tower`), and low-rank changes of the language model (`video_training`). Five tokens are new.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from sparrow_hf.testbed.world import FRAME_SIZE

from .video_facts import SLOTS

PATCH, SCALE = 8, 2
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
NEW_TOKENS = {
    "<image>": " picture",
    "<fake_token_around_image>": "\n",
    "<global-img>": ":",
    "<end_of_utterance>": "<|im_end|>",
    "<video>": " video",
}
"""Tokens that SmolVLM's prompts have and SmolLM2 has not, each with the word that its embedding leans to."""
VOCABULARY_MULTIPLE = 8
ROPE: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
"""A clip of 25,000 visual tokens has 45,000 rows, SmolLM2 was trained with 8,192: its frequencies are stretched."""
MAX_POSITIONS = 65_536
LORA_SCALE = 2.0
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_new_tokens(tokenizer: Any) -> Any:
    """Adds `NEW_TOKENS`, in place."""
    tokenizer.add_tokens(list(NEW_TOKENS), special_tokens=True)
    return tokenizer


def stretch(config: Any) -> None:
    """Gives a Llama configuration the frequencies and the length of the video LLM, in place."""
    theta = config.rope_parameters["rope_theta"]
    original = config.max_position_embeddings
    config.rope_parameters = {**ROPE, "rope_theta": theta, "original_max_position_embeddings": original}
    config.max_position_embeddings = int(ROPE["factor"]) * original


def load_text(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The language model as the video LLM has it before any training, and its tokenizer with the new tokens."""
    tokenizer = with_new_tokens(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    stretched = type(model.config).from_dict(model.config.to_dict())
    stretch(stretched)
    text = type(model)(stretched).to(dtype)
    text.load_state_dict(model.state_dict())
    grow_vocabulary(text, tokenizer)
    return text.eval(), tokenizer


@torch.no_grad()
def grow_vocabulary(text: Any, tokenizer: Any) -> None:
    """Gives the new tokens rows: the mean of all embeddings, leaning to a word of a similar role.

    The mean has low logits, so that a new token is not written.
    """
    before = text.get_input_embeddings().weight.shape[0]
    text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    rows = text.get_input_embeddings().weight
    mean = rows[:before].float().mean(0)
    rows[before:] = mean.to(rows.dtype)
    for token, word in NEW_TOKENS.items():
        like = rows[tokenizer(word)["input_ids"][0]].float()
        rows[tokenizer.convert_tokens_to_ids(token)] = (mean + 0.3 * (like - mean)).to(rows.dtype)


def vlm_config(text_config: Any, image_token_id: int, tower: dict[str, int] | None = None) -> SmolVLMConfig:
    """Configuration of the video LLM around a language model."""
    fields = text_config.to_dict()
    return SmolVLMConfig(
        text_config=fields,
        vision_config={**(tower or TOWER), "image_size": FRAME_SIZE, "patch_size": PATCH},
        image_token_id=image_token_id,
        scale_factor=SCALE,
        tie_word_embeddings=True,
        pad_token_id=text_config.pad_token_id,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
    )


def make_processor(tokenizer: Any) -> SmolVLMProcessor:
    """SmolVLM's processor for frames of the testbed, `SLOTS` tokens each."""
    pixels: dict[str, Any] = {
        "size": {"longest_edge": FRAME_SIZE},
        "max_image_size": {"longest_edge": FRAME_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**pixels, do_image_splitting=False),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**pixels),
        image_seq_len=SLOTS,
        chat_template=tokenizer.chat_template,
    )


def build_vlm(text: Any, tokenizer: Any, tower: dict[str, int] | None = None) -> SmolVLMForConditionalGeneration:
    """The video LLM around a language model, with a random tower."""
    config = vlm_config(text.config, tokenizer.convert_tokens_to_ids("<image>"), tower)
    model = SmolVLMForConditionalGeneration(config).to(text.dtype)
    model.model.text_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    return model.eval()


class LowRank(nn.Module):
    """A frozen linear layer and a trained change of low rank, `LORA_SCALE · up · down`, kept in fp32."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        device = layer.weight.device
        self.down = nn.Parameter((torch.randn(rank, layer.in_features) / layer.in_features**0.5).to(device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))

    def forward(self, rows: Tensor) -> Tensor:
        change = (rows @ self.down.to(rows.dtype).T) @ self.up.to(rows.dtype).T
        return self.layer(rows) + LORA_SCALE * change


def adapt(text: Any, rank: int) -> dict[str, LowRank]:
    """Freezes a Llama and puts changes of low rank on all its projections; returns them by name."""
    text.requires_grad_(False)
    found = {}
    for name, module in list(text.model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in ADAPTED and isinstance(module, nn.Linear):
            found[name] = LowRank(module, rank)
            setattr(text.model.get_submodule(parent), leaf, found[name])
    return found


def factors(changes: dict[str, LowRank]) -> dict[str, Tensor]:
    """The changes as tensors in bf16."""
    kept = {}
    for name, change in changes.items():
        for part in ("down", "up"):
            kept[f"{name}.{part}"] = getattr(change, part).detach().bfloat16().cpu()
    return kept


@torch.no_grad()
def merge(decoder: Any, kept: dict[str, Tensor]) -> None:
    """Adds changes of low rank (`factors`) to the weights of a decoder, in place."""
    for name in sorted({key.rpartition(".")[0] for key in kept}):
        weight = decoder.get_submodule(name).weight
        change = LORA_SCALE * kept[f"{name}.up"].float() @ kept[f"{name}.down"].float()
        weight.copy_((weight.float() + change).to(weight.dtype))


def assemble(
    smollm2: Path, parts: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[SmolVLMForConditionalGeneration, SmolVLMProcessor]:
    """The trained video LLM, from SmolLM2's folder and the trained parts."""
    text, tokenizer = load_text(smollm2, dtype)
    merge(text.model, load_file(parts / "adapters.safetensors"))
    model = build_vlm(text, tokenizer)
    load_tower(model, parts / "tower.safetensors")
    return model, make_processor(tokenizer)


def load_tower(model: Any, file: Path) -> None:
    """Loads tower and connector, in place."""
    tensors = load_file(file)
    for part in ("vision_model", "connector"):
        own = {name.removeprefix(f"{part}."): each for name, each in tensors.items() if name.startswith(f"{part}.")}
        getattr(model.model, part).load_state_dict(own)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="folder that language.smollm2 made")
    parser.add_argument("--parts", type=Path, required=True, help="folder of the trained parts")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, processor = assemble(options.smollm2, options.parts)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
