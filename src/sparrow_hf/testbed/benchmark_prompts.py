"""Prompts of a benchmark from rendered clips, each written as mp4 and read back when it is used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from ..data.prepare import prepare_prompt
from ..evaluation.benchmark import Prompt
from .captions import CLAIM_WORDS
from .families import family_of
from .world import EVALUATION_SEEDS, make_clip


def clip_prompts(target: Any, processor: ProcessorMixin, clips: int, lengths: Iterable[int]) -> list[Prompt]:
    """Unseen clips, the same stories at every length, shortest first.

    Args:
        target, processor: A target of the testbed, of either family.
        clips: How many clips of each length.
        lengths: Visual tokens that the processor makes of a clip.
    """
    return [
        Prompt(f"clip {seed}", length, partial(clip_inputs, target, processor, seed, length))
        for length in sorted(set(lengths))
        for seed in EVALUATION_SEEDS[:clips]
    ]


def clip_inputs(target: Any, processor: ProcessorMixin, seed: int, visual_tokens: int) -> BatchFeature:
    """The processed prompt of one clip, by way of an mp4 file."""
    tokens_per_step = family_of(target).tokens_per_step
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder) / "clip.mp4", seed, visual_tokens, tokens_per_step)
        return prepare_prompt(processor, {"messages": clip.messages})


def knows_the_world(processor: Any) -> bool:
    """Whether a tokenizer has the world's words as tokens, so that [`says_what_it_shows`] means something."""
    return set(CLAIM_WORDS) <= set(processor.tokenizer.get_vocab())


def says_what_it_shows(processor: Any) -> Callable[[int], bool]:
    """Whether a token id is a word that names a fact of a clip: the content words of the world."""
    return set(processor.tokenizer.convert_tokens_to_ids(sorted(CLAIM_WORDS))).__contains__
