"""What is measured: the shapes of the target, the lengths of its prompts, how often each figure is taken."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Shapes and lengths of one run.

    Attributes:
        text: Fields of the target's text configuration.
        lengths: Rows of the prompts, ascending: short, middle, long, longest.
        text_rows: Text tokens at the end of each prompt; all others are visual placeholders.
        rows: Rows of one verification, the root included.
        few_tokens, many_tokens: New tokens of two calls; a round is timed as what the second takes beyond the first.
        repeats: How often a figure is taken.
        reduced_vocabulary: Tokens of a draft's smaller head.
        identity_tokens, identity_prompts: New tokens, and prompts, that are compared with plain `generate()`.
    """

    text: dict[str, Any]
    lengths: tuple[int, int, int, int]
    text_rows: int
    rows: tuple[int, ...]
    few_tokens: int
    many_tokens: int
    repeats: int
    reduced_vocabulary: int
    identity_tokens: int
    identity_prompts: int


def full_sizes(layers: int) -> Sizes:
    """The text decoder of Qwen2.5-VL-7B (28 layers)."""
    return Sizes(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        lengths=(400, 3000, 13000, 25000),
        text_rows=200,
        rows=(1, 6, 8, 11, 16, 32, 48, 64),
        few_tokens=9,
        many_tokens=33,
        repeats=5,
        reduced_vocabulary=32768,
        identity_tokens=64,
        identity_prompts=6,
    )


def small_sizes() -> Sizes:
    """A target that a CPU runs in seconds, to try the benchmark itself; its figures say nothing."""
    return Sizes(
        text={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        lengths=(32, 64, 96, 128),
        text_rows=16,
        rows=(1, 6),
        few_tokens=3,
        many_tokens=13,
        repeats=2,
        reduced_vocabulary=128,
        identity_tokens=8,
        identity_prompts=1,
    )
