"""The testbed's targets: built untrained or loaded from a folder in standard layout, and their caption accuracy.

Both families' trained targets load with plain `from_pretrained`; Qwen2.5-VL's ships in `assets/target`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedTokenizerFast

from ..data.prepare import prepare_inputs
from .captions import content_score
from .families import QWEN2_5_VL, Family, family_of
from .tokenizer import build_tokenizer
from .world import make_clip

ASSETS = Path(__file__).parent / "assets"
MAX_CAPTION_TOKENS = 256
"""Longer than any caption of the world."""


def build_processor(family: Family = QWEN2_5_VL) -> Any:
    """The processor of a family's target, made of the classes that the family itself uses.

    Frames of any size are brought to about 64 × 64 pixels, and no frame is ever left out.
    """
    return family.processor(build_tokenizer())


@torch.no_grad()
def build_target(
    tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int = 24, seed: int = 0, family: Family = QWEN2_5_VL
) -> Any:
    """An untrained target in fp32 evaluation mode, its weights drawn from `seed`.

    Linear layers keep the variance of their input, and the two that write into the residual stream are scaled down
    with depth: transformers' constant 0.02 is for models ten times as wide, and training does not converge with it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = family.model_class(family.config(tokenizer, num_hidden_layers))
        for name, parameter in target.named_parameters():
            if parameter.ndim < 2:
                continue
            deviation = 1 / math.sqrt(parameter[0].numel())
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= math.sqrt(2 * num_hidden_layers)
            elif name.endswith("embed_tokens.weight"):
                deviation = 0.5
            parameter.normal_(std=deviation)
    target.generation_config = GenerationConfig(
        eos_token_id=target.config.text_config.eos_token_id,
        pad_token_id=target.config.text_config.pad_token_id,
        do_sample=False,
    )
    return target.eval()


def load_target(folder: str | PathLike[str] | None = None) -> tuple[Any, Any]:
    """Loads a target and its processor, in fp32 evaluation mode, from `folder` or from the package's own weights.

    The family is the one the folder's `config.json` names.
    """
    folder = ASSETS / "target" if folder is None else Path(folder)
    target = AutoModelForImageTextToText.from_pretrained(folder)
    return target.eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def content_accuracy(target: Any, processor: Any, seeds: Iterable[int] | Sequence[int], visual_tokens: int) -> float:
    """Share of what clips show (entities, colours, motions, places, order) that greedy captions get right.

    Every seed's clip is written as an mp4, read back and captioned freely with plain `generate()`. Claims that are
    missing, wrong or invented all count against the caption.
    """
    tokens_per_step = family_of(target).tokens_per_step
    right = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            clip = make_clip(Path(folder) / "clip.mp4", seed, visual_tokens, tokens_per_step)
            inputs = prepare_inputs(processor, clip.messages)
            output = target.generate(**inputs, max_new_tokens=MAX_CAPTION_TOKENS)
            caption = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            agreed, claimed = content_score(caption, clip.caption)
            right, total = right + agreed, total + claimed
    return right / total
