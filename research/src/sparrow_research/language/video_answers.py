"""Long answers about clips, written by the language model itself, which is told the facts of the clip as text.

    python -m sparrow_research.language.video_answers --target FOLDER --output FILE [--rows N]

The answers are later learned with the clip in the place of the facts, so that what the video LLM says about a clip
are the language model's own words. Rows are written batch by batch; run it again to go on.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.line_file import LineFile
from sparrow_hf.testbed.scenes import COLOURS, SHAPES, Story
from sparrow_hf.testbed.world import write_script

from .sampling import sample
from .video_facts import PROMPTS, as_text

SAMPLING: dict[str, Any] = {"max_new_tokens": 180, "temperature": 0.8, "top_k": 50}
EVERY_PROMPT = tuple(prompt for prompts in PROMPTS.values() for prompt in prompts)


def story_of(seed: int) -> Story:
    """The story of clip `seed`, at any length."""
    return write_script(seed, 400).story


def ask(seed: int) -> tuple[Story, str]:
    """The story of clip `seed`, and the prompt that is asked about it."""
    return story_of(seed), EVERY_PROMPT[int(np.random.default_rng([seed, 5]).integers(len(EVERY_PROMPT)))]


def faithfulness(answer: str, story: Story) -> tuple[int, int]:
    """How many colours and shapes of a story an answer names, and how many others."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    shown = {word for scene in story for word in (scene.glyph.colour, scene.glyph.shape)}
    dots = {scene.companion.colour for scene in story if scene.companion is not None}
    # "Frame" and "cross" are words of any text about videos.
    known = {*COLOURS, *SHAPES} - {"frame", "cross", "ring"}
    return len(words & shown), len((words & known) - shown - dots)


@torch.no_grad()
def write_answers(model: Any, tokenizer: Any, output: Path, rows: int, first_seed: int, batch_size: int) -> None:
    """Appends to `output` until it has `rows` lines of `seed`, `prompt`, `answer_ids`."""
    tokenizer.padding_side = "left"
    # What is sampled depends on the batch.
    made = {"target_sha256": tensor_digest(model.state_dict()), "first_seed": first_seed, "batch_size": batch_size}
    with LineFile(output, made, TrainingDataError, "an answer about a clip") as file:
        # A killed run may have left a part of a batch, which is written again.
        whole = len(file.lines) // batch_size * batch_size
        if len(file.lines) < rows:
            file.remove(lambda line: line["seed"] >= first_seed + whole)
        with tqdm(total=rows, initial=len(file.lines)) as progress:
            while len(file.lines) < rows:
                start = first_seed + len(file.lines)
                seeds = range(start, min(first_seed + rows, start + batch_size))
                for seed, prompt, ids in answered(model, tokenizer, seeds):
                    file.append({"seed": seed, "prompt": prompt, "answer_ids": ids, "provenance": made})
                progress.update(len(seeds))


def answered(model: Any, tokenizer: Any, seeds: range) -> Iterator[tuple[int, str, list[int]]]:
    """Seed, prompt and answer of a batch of clips."""
    asked = [ask(seed) for seed in seeds]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": as_text(*each)}], tokenize=False, add_generation_prompt=True
        )
        for each in asked
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    torch.manual_seed(seeds.start)
    answers = sample(model, batch.input_ids, batch.attention_mask, eos_token_id=tokenizer.eos_token_id, **SAMPLING)
    for seed, (_, prompt), ids in zip(seeds, asked, answers, strict=True):
        yield seed, prompt, ids


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=96, help="a GPU writes 512 at once in little more time")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.bfloat16).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    write_answers(model, tokenizer, options.output, options.rows, options.first_seed, options.batch_size)


if __name__ == "__main__":
    main()
