"""Clips with prompts for a draft of the video LLM: mp4 files, and the conversations that ask about them.

    python -m sparrow_research.language.video_clips --output FOLDER [--train N] [--validation N]

Every clip is asked two things, of two kinds (`video_facts.PROMPTS`). Training clips come after those of the target's
own training, validation clips from their own seeds. Most are short, some have up to 3,000 visual tokens. Evaluation
clips are asked one thing, and the same stories are shown at every length of `LENGTHS`.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from sparrow_hf.artifacts import write_text
from sparrow_hf.data.messages import messages_for
from sparrow_hf.testbed.world import EVALUATION_SEEDS, FRAMES_PER_STEP, VALIDATION_SEEDS, make_clip

from .video_answers import EVERY_PROMPT
from .video_facts import PROMPTS, SLOTS

FIRST_SEED = 500_000
"""Of training clips."""
SHORT, LONG, LONG_SHARE = 160, 3_000, 0.1


LENGTHS = {400: 24, 3_000: 16, 13_000: 12, 25_000: 12}
"""Visual tokens of evaluation clips → clips; the clips of a longer length are the first ones of a shorter."""
FIRST_EVALUATED = 2000
"""Of the evaluation clips: those before are asked by `video_check` and `video_tau`."""


def length_of(seed: int) -> int:
    """Visual tokens of a clip: log-uniform up to 800, some up to 3,000."""
    rng = np.random.default_rng([seed, 17])
    low, high = (800, LONG) if rng.random() < LONG_SHARE else (SHORT, 800)
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def rows_of(seed: int, folder: Path) -> list[dict[str, Any]]:
    """Writes the clip `seed`, if it is missing; returns its conversations, with paths as beside the folder."""
    rng = np.random.default_rng([seed, 19])
    file = folder / f"{seed}.mp4"
    if not file.exists():
        make_clip(file, seed, length_of(seed), FRAMES_PER_STEP * SLOTS)
    kinds = [tuple(PROMPTS.values())[int(index)] for index in rng.choice(len(PROMPTS), 2, replace=False)]
    return [
        {"messages": messages_for(f"{folder.name}/{file.name}", prompts[int(rng.integers(len(prompts)))])}
        for prompts in kinds
    ]


def row_of_length(seed: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Writes the clip `seed` with so many visual tokens, if it is missing; returns its conversation."""
    file = folder / f"{seed}-{tokens}.mp4"
    if not file.exists():
        make_clip(file, seed, tokens, FRAMES_PER_STEP * SLOTS)
    return {"messages": messages_for(f"{folder.name}/{file.name}", EVERY_PROMPT[seed % len(EVERY_PROMPT)])}


def write_lengths(output: Path, workers: int) -> None:
    """Writes `length-N.jsonl` for every length, and the clips they name."""
    folder = output / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as processes:
        for tokens, clips in LENGTHS.items():
            seeds = EVALUATION_SEEDS[FIRST_EVALUATED : FIRST_EVALUATED + clips]
            rows = processes.map(row_of_length, seeds, repeat(tokens), repeat(folder))
            write_text(output / f"length-{tokens}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_split(output: Path, name: str, seeds: range, workers: int) -> None:
    """Writes `NAME.jsonl` and the clips it names, short ones first: what is answered in one batch is padded."""
    folder = output / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as processes:
        rows = [row for found in processes.map(rows_of, sorted(seeds, key=length_of), repeat(folder)) for row in found]
    write_text(output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=300, help="clips")
    parser.add_argument("--validation", type=int, default=16, help="clips")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    options = parser.parse_args(arguments)
    write_split(options.output, "train", range(FIRST_SEED, FIRST_SEED + options.train), options.workers)
    write_lengths(options.output, options.workers)
    write_split(options.output, "validation", VALIDATION_SEEDS[1000 : 1000 + options.validation], options.workers)


if __name__ == "__main__":
    main()
