"""Measures batches on the built-in targets: plain `generate()` and the draft, the same clips one by one and together.

    python -m sparrow_research.batches --output research/data/batches.json

Clips have different lengths, so the shorter ones are padded. Every size of batch captions all clips. Of each batch the
fastest of interleaved repetitions counts, because other programs only slow one down. Memory is that of the target's
cache, rows of rejected drafts included.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparrow_hf._transformers import CACHE, cache_tensors
from sparrow_hf.artifacts import write_json
from sparrow_hf.clocks import StopWatch, now
from sparrow_hf.data.prepare import prepare_inputs
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.testbed import EVALUATION_SEEDS, FAMILIES, QWEN2_5_VL, family_of, load, make_clip
from sparrow_hf.training.batched_answers import left_pad

SIZES = (1, 2, 4, 8)
NUM_CLIPS = 8


def prompts(target: Any, processor: Any, visual_tokens: int, number: int = NUM_CLIPS) -> list[dict[str, Tensor]]:
    """The first `number` processed prompts about clips of `visual_tokens`, down to half as many."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(number):
            # LLaVA-OneVision's processor joins clips of one length only.
            shrunk = 1 - index / (2 * NUM_CLIPS) if family_of(target) is QWEN2_5_VL else 1
            length = round(visual_tokens * shrunk)
            path = Path(folder) / f"{index}.mp4"
            clip = make_clip(path, EVALUATION_SEEDS[index], length, family_of(target).tokens_per_step)
            found.append(dict(prepare_inputs(processor, clip.messages).to(target.device)))
    return found


class CacheWatch:
    """Notes how large the target's cache gets."""

    def __init__(self, target: Any):
        self.peak_bytes = 0
        self._hook = target.register_forward_hook(self._note)

    def _note(self, module: Any, args: Any, output: Any) -> None:
        tensors = [each for pair in cache_tensors(output[CACHE]) for each in pair]
        self.peak_bytes = max(self.peak_bytes, sum(each.numel() * each.element_size() for each in tensors))

    def close(self) -> None:
        self._hook.remove()


@torch.no_grad()
def run(target: Any, batches: list[dict[str, Tensor]], end: int, **kwargs: Any) -> dict[str, Any]:
    """Generates for all batches; the new tokens of every clip up to its end, and what they cost."""
    watch = CacheWatch(target)
    answers, seconds, decode_seconds, forwards = [], [], [], 0
    for inputs in batches:
        started = now(target.device)
        with StopWatch(target) as clock:
            found = target.generate(**inputs, **kwargs, streamer=clock)
        took = now(target.device) - started
        forwards += clock.rounds
        seconds.append(took)
        decode_seconds.append(took - clock.prefill_seconds)
        ids = found if isinstance(found, Tensor) else found.sequences
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            answers.append(row[: row.index(end) + 1] if end in row else row)
    watch.close()
    return {
        "answers": answers,
        "seconds": seconds,
        "decode": decode_seconds,
        "forwards": forwards,
        "cache_bytes": watch.peak_bytes,
    }


def fastest(runs: list[dict[str, Any]], part: str) -> float:
    """Seconds for all batches, of each the fastest."""
    return sum(map(min, zip(*(each[part] for each in runs), strict=True)))


def measure(family: str, visual_tokens: int, repeats: int, max_new_tokens: int, device: str) -> dict[str, Any]:
    """The figures of one built-in target: size of the batch → arm → figures."""
    target, processor, draft = load(family)
    target, draft = target.to(device), draft.to(device)
    draft.config.set_tree_shape("chain-5")
    clips, pad = prompts(target, processor, visual_tokens), processor.tokenizer.pad_token_id
    end = target.generation_config.eos_token_id
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    # What is returned with the ids is that of columns, so all rows go in step.
    arms: dict[str, dict[str, Any]] = {
        "plain": {},
        "draft": {"assistant_model": draft},
        "in step": {"assistant_model": draft, "return_dict_in_generate": True},
    }
    runs: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for repeat in tqdm(range(repeats + 1), desc=family):
        for size in SIZES:
            batches = [left_pad(clips[start : start + size], pad) for start in range(0, NUM_CLIPS, size)]
            for arm, settings in arms.items():
                found = run(target, batches, end, **kwargs, **settings)
                if repeat > 0:
                    runs[size, arm].append(found)
    figures: dict[str, Any] = {}
    for (size, arm), repeated in runs.items():
        answers = repeated[0]["answers"]
        tokens = sum(map(len, answers))
        after_first = tokens - NUM_CLIPS
        figures.setdefault(str(size), {})[arm] = {
            "tokens": tokens,
            "tokens_per_second": round(tokens / fastest(repeated, "seconds"), 2),
            "decode_tokens_per_second": round(after_first / fastest(repeated, "decode"), 2),
            "forwards_after_prefill": repeated[0]["forwards"],
            "cache_bytes": repeated[0]["cache_bytes"],
            "identical_to_plain": answers == runs[size, "plain"][0]["answers"],
            "identical_to_single_calls": answers == runs[1, "plain"][0]["answers"],
        }
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure batches on the built-in targets.")
    parser.add_argument("--visual-tokens", type=int, default=240, help="length of the longest clip")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="about the machine, kept with the figures")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)

    found = {}
    for family in FAMILIES:
        name = family.name
        found[name] = measure(name, options.visual_tokens, options.repeats, options.max_new_tokens, options.device)
        for size, arms in found[name].items():
            speeds = (f"{arm} {figures['tokens_per_second']}" for arm, figures in arms.items())
            print(f"{name} B={size}, tokens per second: {', '.join(speeds)}")
    target = load()[0].to(options.device)
    write_json(options.output, provenance(target, note=options.note, families=found), indent=2)


if __name__ == "__main__":
    main()
