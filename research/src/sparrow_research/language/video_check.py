"""Does the video LLM see? Its short answers on unseen clips of every length, with the clip and blind.

    python -m sparrow_research.language.video_check --target FOLDER --smollm2 FOLDER --work DIR --output FILE

All questions of a clip that have one exact answer are asked behind the same clip, decoded from an mp4 file. An answer
is right if greedy decoding gives exactly its tokens. That is so if every token of it is the likeliest after those
before it, so one forward tells. Blind, all frames are black. Beside it: what the model says at length, how much of it
repeats itself, and what plain text costs it against SmolLM2. Every clip is a line of a file; run it again to go on.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from sparrow_hf._transformers import CACHE
from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.data.messages import messages_for
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.line_file import LineFile
from sparrow_hf.loading import load_target
from sparrow_hf.testbed.world import EVALUATION_SEEDS, FRAMES_PER_STEP, make_clip
from sparrow_hf.video import prepare_inputs

from .road import DATA
from .video_answers import EVERY_PROMPT, faithfulness, story_of
from .video_facts import SLOTS, Question, questions
from .video_rows import IGNORED, Asked, Packed, pack_clip

LENGTHS = {400: 16, 3_000: 8, 13_000: 6, 25_000: 6}
"""Visual tokens → clips."""
LONG = {"max_new_tokens": 160, "do_sample": True, "temperature": 0.8, "top_k": 50}


def exact_questions(tokenizer: Any, seed: int) -> tuple[list[Question], list[Asked]]:
    """All questions of a clip that have an exact answer, and their answers as ids."""
    every = list(questions(story_of(seed)))
    end = tokenizer.eos_token_id
    return every, [Asked(each.text, [*tokenizer(each.answer)["input_ids"], end]) for each in every]


@torch.no_grad()
def answered(target: Any, packed: Packed, pixels: Tensor) -> list[bool]:
    """For every segment whether all its labels are the likeliest tokens.

    The clip is read as `generate()` reads it, then all questions at once behind its cache.
    """
    packed, pixels = packed.to(target.device), pixels.to(target.device)
    length = packed.prefix
    cache = DynamicCache(config=target.config.text_config)
    ids = packed.input_ids[None]
    target(input_ids=ids[:, :length], pixel_values=pixels, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    own = packed.segments[length:]
    rows = torch.arange(len(own), device=own.device)
    seen = (own[:, None] == own[None]) & (rows[:, None] >= rows[None])
    mask = torch.cat([torch.ones(len(own), length, dtype=torch.bool, device=own.device), seen], dim=1)[None, None]
    logits = target(
        input_ids=ids[:, length:],
        attention_mask=mask,
        position_ids=packed.positions[None, length:],
        use_cache=True,
        **{CACHE: cache},
    ).logits[0]
    labels = packed.labels[length:]
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return [bool(right[own == owner].all()) for owner in range(1, int(own.max()) + 1)]


def repeated(ids: list[int], size: int = 4) -> float:
    """Share of an answer's runs of `size` tokens that it had before."""
    runs = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def look(target: Any, processor: Any, seed: int, visual_tokens: int, folder: Path) -> dict[str, Any]:
    """Everything that is measured on one clip."""
    file = folder / f"clip-{seed}-{visual_tokens}.mp4"
    make_clip(file, seed, visual_tokens, FRAMES_PER_STEP * SLOTS)
    prompt = EVERY_PROMPT[seed % len(EVERY_PROMPT)]
    inputs = prepare_inputs(processor, messages_for(str(file), prompt), target=target)
    pixels = inputs["pixel_values"]
    every, asked = exact_questions(processor.tokenizer, seed)
    packed = pack_clip(processor.tokenizer, pixels.shape[1], asked)
    with_clip, blind = (answered(target, packed, each) for each in (pixels, torch.full_like(pixels, -1.0)))
    torch.manual_seed(seed)
    output = target.generate(**inputs, **LONG)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    answer = processor.tokenizer.decode(ids, skip_special_tokens=True)
    file.unlink()
    return {
        "seed": seed,
        "visual_tokens": pixels.shape[1] * SLOTS,
        "rows": inputs["input_ids"].shape[1],
        "kinds": [each.kind for each in every],
        "right": with_clip,
        "blind": blind,
        "prompt": prompt,
        "answer": answer,
        "repeated": repeated(ids),
        "named": faithfulness(answer, story_of(seed)),
    }


def shares(kinds: Iterable[str], right: Iterable[bool]) -> dict[str, float]:
    """Share that is right, of all and of every kind."""
    counts: dict[str, list[bool]] = {"all": []}
    for kind, each in zip(kinds, right, strict=True):
        counts["all"].append(each)
        counts.setdefault(kind, []).append(each)
    return {kind: round(float(np.mean(each)), 4) for kind, each in counts.items()}


@torch.no_grad()
def text_cost(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Mean negative log-likelihood of SmolLM2's own answers, nats a token."""
    total, tokens = 0.0, 0
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        asked, answer = tokenizer(text)["input_ids"], row["answer_ids"]
        ids = torch.tensor([[*asked, *answer]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(asked) - 1 : -1].float()
        total += functional.cross_entropy(logits, ids[0, len(asked) :], reduction="sum").item()
        tokens += len(answer)
    return total / tokens


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every length."""
    rows = []
    for asked in sorted({line["asked"] for line in lines}):
        group = [line for line in lines if line["asked"] == asked]
        kinds = [kind for line in group for kind in line["kinds"]]
        rows.append(
            {
                "visual_tokens": asked,
                "clips": len(group),
                "questions": len(kinds),
                "rows": int(np.mean([line["rows"] for line in group])),
                **{key: shares(kinds, [each for line in group for each in line[key]]) for key in ("right", "blind")},
                "repeated": round(float(np.mean([line["repeated"] for line in group])), 4),
                "named": np.sum([line["named"] for line in group], axis=0).tolist(),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="folder that language.video_target made")
    parser.add_argument("--smollm2", type=Path, help="beside it plain text is measured")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--clips", type=int, nargs="+", help="of each length")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    target, processor = load_target(options.target, dtype="bfloat16", device=options.device)
    made = {"target_sha256": tensor_digest(target.state_dict())}
    clips = options.clips or [LENGTHS.get(length, 2) for length in options.lengths]
    with LineFile(options.work / "clips.jsonl", made, BenchmarkError, "a clip of video_check") as file:
        done = {(line["asked"], line["seed"]) for line in file.lines}
        for length, number in zip(options.lengths, clips, strict=True):
            for seed in EVALUATION_SEEDS[:number]:
                if (length, seed) not in done:
                    line = look(target, processor, seed, length, options.work)
                    file.append({"asked": length, **line, "provenance": made})
                    print(length, seed, np.mean(line["right"]), np.mean(line["blind"]), flush=True)
    result: dict[str, Any] = {**made, "lengths": summary(file.lines)}
    if options.smollm2 is not None:
        with gzip.open(DATA / "answers" / "validation.jsonl.gz", "rt") as kept:
            rows = [json.loads(line) for line in kept][:32]
        plain = AutoModelForCausalLM.from_pretrained(options.smollm2, dtype=torch.bfloat16)
        plain.to(options.device).eval()
        models = {"smollm2": plain, "video": target}
        result["text_nats"] = {name: text_cost(model, processor.tokenizer, rows) for name, model in models.items()}
    write_json(options.output, result, indent=1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
