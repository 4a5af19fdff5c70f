"""Measures what recurrent layers cost a round: forwards of a few rows, and what the strategies of carrying make of it.

    python -m sparrow_research.recurrent_cost --output research/data/recurrent_cost.json
    python -m sparrow_research.recurrent_cost --counts --output research/data/recurrent_counts.json

The target is a random Qwen3.5 of the size asked for; its text does not matter. The time of a forward over n rows is
the median of interleaved ones, each with the copies that `RecurrentCache` makes. From these times follows the speed of
each strategy, by simulating rounds in which every draft is accepted with the same probability. With `--counts`, the
same is made of what does not depend on the machine: forwards, rows of forwards, and calls of PyTorch's functions.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from sparrow_hf._transformers import CACHE
from sparrow_hf.artifacts import write_json
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.generation.caches import RecurrentCache
from sparrow_hf.generation.tree import build_tree

LEVELS = 5
BUDGETS = (0, 4, 8, 16, 32, 64)
ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)
#: Tokens that a chain gives, where nothing shortens it.
TAUS = (2.0, 2.5, 3.0)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80)


def random_target(layers: int, width: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Qwen3.5 with heads of the real sizes (256, and 128 in linear-attention layers) and a small vocabulary."""
    text: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 256,
        "num_key_value_heads": max(width // 1024, 1),
        "linear_num_key_heads": width // 128,
        "linear_num_value_heads": width // 128,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    with torch.device(device):
        return Qwen3_5ForConditionalGeneration._from_config(config, dtype=dtype).eval()


def rejected_rounds(target: PreTrainedModel, prompt_length: int) -> Callable[[int], None]:
    """Runs a forward over so many rows. They are rejected, so the states are put back each time."""
    ids = torch.randint(8000, (1, prompt_length), device=target.device)
    cache = target(input_ids=ids, use_cache=True, logits_to_keep=1)[CACHE]
    held = RecurrentCache(cache, max_carried=0)

    def run(rows: int) -> None:
        chain = build_tree(list(range(rows + 1)), list(range(-1, rows)), target.device)
        with held.verifying(chain) as path:
            ids = chain.token_ids[:, :rows]
            target(input_ids=ids, use_cache=True, logits_to_keep=LEVELS + 1, **{CACHE: cache})["logits"].sum().item()
            path.append(0)
        held.carried = []

    return run


@torch.no_grad()
def forward_seconds(target: PreTrainedModel, prompt_length: int, repeats: int) -> dict[int, float]:
    """Rows of a forward → median seconds."""
    run = rejected_rounds(target, prompt_length)
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for repeat in tqdm(range(repeats + 1), desc="forwards"):
        for rows in ROWS:
            started = time.perf_counter()
            run(rows)
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[rows].append(time.perf_counter() - started)
    return {rows: median(found) for rows, found in seconds.items()}


class Calls(TorchDispatchMode):
    """Counts the calls of PyTorch's functions inside of it."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def forward_calls(target: PreTrainedModel, prompt_length: int) -> dict[int, float]:
    """Rows of a forward → calls of PyTorch's functions."""
    run, found = rejected_rounds(target, prompt_length), {}
    for rows in ROWS:
        with Calls() as calls:
            run(rows)
        found[rows] = float(calls.count)
    return found


def acceptance_for(tau: float) -> float:
    """With which probability each draft of a chain must be accepted for it to give this many tokens."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**level for level in range(LEVELS + 1)) < tau else (low, middle)
    return low


def counted(calls: dict[int, float]) -> dict[str, dict[str, dict[str, float]]]:
    """What is counted → strategy → τ of the chains → how much of it a token takes, in plain steps."""
    costs: dict[str, Callable[[int], float]] = {"forwards": lambda rows: 1, "rows": float, "calls": between(calls)}
    return {
        name: {
            str(strategy): {str(tau): round(1 / speed(cost, acceptance_for(tau), strategy), 3) for tau in TAUS}
            for strategy in ("rows", "reread", *BUDGETS)
        }
        for name, cost in costs.items()
    }


def between(seconds: dict[int, float]) -> Callable[[int], float]:
    """Seconds of any number of rows, interpolated."""
    known = sorted(seconds)

    def cost(rows: int) -> float:
        above = next((each for each in known if each >= rows), known[-1])
        below = next((each for each in reversed(known) if each <= rows), known[0])
        share = (rows - below) / (above - below) if above > below else 0.0
        return seconds[below] + share * (seconds[above] - seconds[below])

    return cost


def speed(cost: Callable[[int], float], acceptance: float, strategy: str | int, rounds: int = 20_000) -> float:
    """Tokens per plain step's time, drafting left out.

    Args:
        strategy: How many tokens may be carried; `"reread"` reads accepted tokens again at once, in a forward of
            their own; `"rows"` is a cache that can drop rows, for comparison.
    """
    generator = random.Random(0)
    spent, tokens, carried = 0.0, 0, 0
    for _ in range(rounds):
        levels = 0 if isinstance(strategy, int) and carried > strategy else LEVELS
        accepted = next((level for level in range(levels) if generator.random() >= acceptance), levels)
        spent += cost(carried + 1 + levels)
        tokens += accepted + 1
        if accepted == levels or strategy == "rows":
            carried = 0
        elif strategy == "reread":
            spent += cost(accepted + 1)
        else:
            carried += accepted + 1
    return tokens * cost(1) / spent


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure rounds on a target with recurrent layers.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 256")
    parser.add_argument("--prompt", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--counts", action="store_true", help="count instead of timing")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    target = random_target(options.layers, options.width, getattr(torch, options.dtype), options.device)
    if options.counts:
        calls = forward_calls(target, options.prompt)
        of_token = counted(calls)
        for name, strategies in of_token.items():
            print(f"{name} per token, in plain steps, at a τ of", *TAUS)
            for strategy, of_strategy in strategies.items():
                print(f"{strategy:8}", *(f"{each:.2f}" for each in of_strategy.values()))
        write_json(options.output, provenance(target, calls=calls, per_token=of_token), indent=2)
        return
    seconds = forward_seconds(target, options.prompt, options.repeats)
    cost = between(seconds)
    speeds = {
        str(strategy): {str(acceptance): round(speed(cost, acceptance, strategy), 3) for acceptance in ACCEPTANCE}
        for strategy in ("rows", "reread", *BUDGETS)
    }
    for rows, found in seconds.items():
        print(f"{rows:3} rows  {found * 1000:8.1f} ms  {found / seconds[1]:.2f} steps")
    print("tokens per step's time, at an acceptance of", *ACCEPTANCE)
    for strategy, of_strategy in speeds.items():
        print(f"{strategy:8}", *(f"{each:.2f}" for each in of_strategy.values()))
    results = provenance(target, seconds=seconds, speeds=speeds)
    write_json(options.output, results, indent=2)


if __name__ == "__main__":
    main()
