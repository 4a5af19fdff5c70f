"""τ of a draft of the video LLM over the length of the clip, and how much of it is kept.

    python -m sparrow_research.language.video_tau --target FOLDER --draft FOLDER --work DIR --output FILE

The same stories at every length, long answers, greedy, bf16: a text can differ from plain `generate()` there from a
near-tie on, so nothing is compared or timed here; `language.text --prompts` does both in fp32. Every call is
a line of a file; run it again to go on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparrow_hf import SparrowDraftModel
from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.data.messages import messages_for
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.line_file import LineFile
from sparrow_hf.loading import load_target
from sparrow_hf.metrics import bootstrap, count_reaching, per_position, tau
from sparrow_hf.testbed.world import EVALUATION_SEEDS, FRAMES_PER_STEP, make_clip
from sparrow_hf.video import prepare_inputs

from .video_answers import EVERY_PROMPT
from .video_facts import SLOTS

LENGTHS = {400: 24, 3_000: 12, 13_000: 6, 25_000: 6}
"""Visual tokens → clips; the clips of a longer length are the first ones of a shorter."""
FIRST = 1000
"""Of the evaluation clips: `video_check` asks about those before."""
SHAPE = "chain-3"
NEW_TOKENS = 96


def call(target: Any, processor: Any, draft: SparrowDraftModel, seed: int, length: int, work: Path) -> dict[str, Any]:
    """One answer about the clip `seed`."""
    file = work / f"{seed}-{length}.mp4"
    make_clip(file, seed, length, FRAMES_PER_STEP * SLOTS)
    prompt = EVERY_PROMPT[seed % len(EVERY_PROMPT)]
    inputs = prepare_inputs(processor, messages_for(str(file), prompt), target=target)
    file.unlink()
    output = target.generate(**inputs, assistant_model=draft, max_new_tokens=NEW_TOKENS, do_sample=False)
    stats = draft.last_generation
    assert stats is not None
    return {
        "length": length,
        "seed": seed,
        "tokens": output.shape[1] - inputs["input_ids"].shape[1] - 1,
        "accepted": list(stats.accepted),
    }


def pooled(calls: Sequence[dict[str, Any]]) -> float:
    """τ of several calls together: tokens after the prefill for every forward after it."""
    return tau(sum(each["tokens"] for each in calls), sum(len(each["accepted"]) for each in calls))


def retention(pairs: Sequence[tuple[Any, Any]], pooled: Callable[[Sequence[Any]], float]) -> dict[str, Any]:
    """τ at one length over τ at another, of clips that both have; the interval resamples clips.

    Args:
        pairs: What was counted of each clip at the one length and at the other.
        pooled: τ of several clips at one length together.
    """

    def ratio(chosen: Sequence[tuple[Any, Any]]) -> float:
        return pooled([long for long, _ in chosen]) / pooled([short for _, short in chosen])

    return {"clips": len(pairs), "ratio": ratio(pairs), "interval": bootstrap(pairs, ratio)}


def tables(calls: Sequence[dict[str, Any]], levels: int) -> dict[str, Any]:
    """τ of every length, and retention of the longer ones."""
    lengths = sorted({each["length"] for each in calls})
    rows = []
    for length in lengths:
        group = [each for each in calls if each["length"] == length]
        accepted = [count for each in group for count in each["accepted"]]
        shares = per_position(count_reaching(accepted, levels), len(accepted))
        rows.append(
            {
                "visual_tokens": length,
                "clips": len(group),
                "tau": pooled(group),
                "tau_interval": bootstrap(group, pooled),
                "per_position": shares,
            }
        )
    found = {(each["length"], each["seed"]): each for each in calls}
    seeds = sorted({each["seed"] for each in calls})
    kept = {}
    for length in lengths[1:]:
        shared = [seed for seed in seeds if (length, seed) in found and (lengths[0], seed) in found]
        kept[str(length)] = retention([(found[length, seed], found[lengths[0], seed]) for seed in shared], pooled)
    return {"lengths": rows, "retention": kept}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    target, processor = load_target(options.target, dtype="bfloat16", device=options.device)
    draft = SparrowDraftModel.from_pretrained(options.draft, dtype=torch.bfloat16).eval()
    draft.config.set_tree_shape(options.shape)
    digests = {"target_sha256": tensor_digest(target.state_dict()), "draft_sha256": tensor_digest(draft.state_dict())}
    made = {"shape": options.shape, **digests}
    with LineFile(options.work / "calls.jsonl", made, BenchmarkError, "a call of video_tau") as file:
        done = {(each["length"], each["seed"]) for each in file.lines}
        for length in options.lengths:
            for seed in EVALUATION_SEEDS[FIRST : FIRST + LENGTHS.get(length, 6)]:
                if (length, seed) not in done:
                    each = call(target, processor, draft, seed, length, options.work)
                    file.append({**each, "provenance": made})
    found = {**made, **tables(file.lines, draft.config.num_draft_levels)}
    write_json(options.output, found, indent=1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
