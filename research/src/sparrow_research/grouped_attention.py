"""Measures what the verification of drafts costs where query heads share KV heads, in plain steps.

    python -m sparrow_research.grouped_attention --output research/data/grouped_attention.json

The heads are those of a 7B Qwen2.5-VL, 28 query and 4 KV heads of 128; weights and cache are random. Measured are one
attention function and one decoder layer, in the CPU time of this thread, which other programs disturb little. The
variants take turns within a run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

from sparrow_hf._transformers import CACHE, drop_newest
from sparrow_hf.artifacts import write_json
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.generation.grouped_attention import fold
from sparrow_hf.generation.tree import CandidateTree, build_tree
from sparrow_hf.generation.verification import tree_attention_mask

HEADS, KV_HEADS, HEAD_SIZE = 28, 4, 128
GROUPS = HEADS // KV_HEADS
CACHED_ROWS = (3_000, 13_000, 25_000)
NODES = (6, 16, 48)

#: What a forward is measured with; a variant is called with nodes (1: a plain step) and says nothing.
Variant = Callable[[int], Any]


def a_tree(size: int) -> CandidateTree:
    """Every node has up to two children: sdpa's work does not depend on the shape."""
    return build_tree(list(range(size)), [(node - 1) // 2 if node else -1 for node in range(size)])


def masks(cached: int) -> dict[int, Tensor]:
    """Nodes → the mask of a tree."""
    return {size: tree_attention_mask(a_tree(size), cached, torch.float32) for size in NODES}


def random_target(mlp_width: int) -> PreTrainedModel:
    """A Qwen2.5-VL of one decoder layer with the widths of the 7B one, a small vocabulary and a tiny tower."""
    text = {
        "vocab_size": 512,
        "hidden_size": HEADS * HEAD_SIZE,
        "intermediate_size": mlp_width,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def attention_alone(cached: int) -> dict[str, Variant]:
    """Variants of one call of the attention function."""
    module = SimpleNamespace(num_key_value_groups=GROUPS, is_causal=True)
    queries = {size: torch.randn(1, HEADS, size, HEAD_SIZE) for size in (1, *NODES)}
    states = {size: torch.randn(2, 1, KV_HEADS, cached + size, HEAD_SIZE) for size in (1, *NODES)}
    plain_masks = masks(cached)
    folded = {size: fold(mask, GROUPS) for size, mask in plain_masks.items()}

    def variant(name: str, of_nodes: dict[int, Tensor]) -> Variant:
        attend = AttentionInterface()[name]
        return lambda size: attend(module, queries[size], *states[size], of_nodes.get(size))

    return {
        "plain": variant("sdpa", {}),
        "plain, grouped": variant("sdpa_grouped", {}),
        "expanded": variant("sdpa", plain_masks),
        "folded": variant("sdpa", folded),
    }


def decoder_layer(target: PreTrainedModel, cached: int) -> dict[str, Variant]:
    """Variants of a forward of the decoder; its cache ends as it was."""
    decoder, cache = target.get_decoder(), DynamicCache()
    cache.update(*torch.randn(2, 1, KV_HEADS, cached, HEAD_SIZE), 0)
    plain_masks = masks(cached)
    folded = {size: fold(mask, GROUPS) for size, mask in plain_masks.items()}
    embeds = {size: torch.randn(1, size, HEADS * HEAD_SIZE) for size in (1, *NODES)}

    def variant(name: str, of_nodes: dict[int, Tensor]) -> Variant:
        def run(size: int) -> None:
            decoder.config._attn_implementation = name
            depths = a_tree(size).depths
            decoder(
                inputs_embeds=embeds[size],
                position_ids=(cached + depths).expand(4, 1, size),
                attention_mask={"full_attention": of_nodes.get(size)},
                use_cache=True,
                **{CACHE: cache},
            )
            drop_newest(cache, size)

        return run

    return {
        "plain": variant("sdpa", {}),
        "plain, grouped": variant("sdpa_grouped", {}),
        "expanded": variant("sdpa", plain_masks),
        "folded": variant("sdpa", folded),
    }


@torch.no_grad()
def measured(variants: dict[str, Variant], repeats: int, what: str) -> dict[str, Any]:
    """Milliseconds of a plain step of both kinds, and of every forward its time in plain steps: median and range."""
    wanted = [
        ("plain", 1),
        ("plain, grouped", 1),
        *((name, size) for name in ("expanded", "folded") for size in NODES),
    ]
    seconds: dict[tuple[str, int], list[float]] = {each: [] for each in wanted}
    for repeat in tqdm(range(repeats + 1), desc=what):
        for name, size in wanted:
            started = time.thread_time()
            variants[name](size)
            if repeat > 0:
                seconds[name, size].append(time.thread_time() - started)
    step, grouped = median(seconds["plain", 1]), median(seconds["plain, grouped", 1])
    return {
        "plain_ms": round(step * 1000, 2),
        "plain_grouped_ms": round(grouped * 1000, 2),
        "in_plain_steps": {
            f"{name}, {size} nodes": {
                "median": round(median(found) / step, 2),
                "range": [round(min(found) / step, 2), round(max(found) / step, 2)],
                "in_grouped_steps": round(median(found) / grouped, 2),
            }
            for (name, size), found in seconds.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure verification with grouped heads.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cached-rows", type=int, nargs="+", default=CACHED_ROWS)
    parser.add_argument("--mlp-width", type=int, default=18_944, help="of the decoder layer")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    target = random_target(options.mlp_width)
    results: dict[str, dict[str, Any]] = {"attention": {}, "decoder layer": {}}
    for cached in options.cached_rows:
        found = measured(attention_alone(cached), options.repeats, f"attention, {cached} rows")
        results["attention"][str(cached)] = found
        found = measured(decoder_layer(target, cached), options.repeats, f"decoder layer, {cached} rows")
        results["decoder layer"][str(cached)] = found
    for what, of_rows in results.items():
        for cached, found in of_rows.items():
            print(f"{what}, {cached} rows: a plain step {found['plain_ms']} ms")
            for name, ratios in found["in_plain_steps"].items():
                print(f"  {name:22} {ratios['median']:6.2f} {ratios['range']} {ratios['in_grouped_steps']:6.2f}")
    details = {"heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE, "mlp_width": options.mlp_width}
    write_json(
        options.output,
        provenance(
            target, **details, weights="random", clock="thread CPU time", repeats=options.repeats, results=results
        ),
        indent=2,
    )


if __name__ == "__main__":
    main()
