"""Clips with prompts for a draft of the video LLM: mp4 files, and the conversations that ask about them.

    python -m sparrow_research.language.video_clips --output FOLDER [--train N] [--validation N]

Every clip is asked two things, of two kinds (`video_facts.PROMPTS`). Training clips come after those of the target's
own training, validation clips from their own seeds. Most are short, some have up to 3,000 visual tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sparrow_hf.artifacts import write_text
from sparrow_hf.testbed.world import FRAMES_PER_STEP, VALIDATION_SEEDS, make_clip, messages_for

from .video_facts import PROMPTS, SLOTS

FIRST_SEED = 500_000
"""Of training clips."""
SHORT, LONG, LONG_SHARE = 160, 3_000, 0.1


def length_of(rng: np.random.Generator) -> int:
    """Visual tokens of a clip: log-uniform up to 800, some up to 3,000."""
    low, high = (800, LONG) if rng.random() < LONG_SHARE else (SHORT, 800)
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def rows_of(seed: int, folder: Path) -> list[dict[str, Any]]:
    """Writes the clip `seed`, if it is missing; returns its conversations, with paths as beside the folder."""
    rng = np.random.default_rng([seed, 17])
    file = folder / f"{seed}.mp4"
    tokens = length_of(rng)
    if not file.exists():
        make_clip(file, seed, tokens, FRAMES_PER_STEP * SLOTS)
    kinds = [tuple(PROMPTS.values())[int(index)] for index in rng.choice(len(PROMPTS), 2, replace=False)]
    return [
        {"messages": messages_for(f"{folder.name}/{file.name}", prompts[int(rng.integers(len(prompts)))])}
        for prompts in kinds
    ]


def write_split(output: Path, name: str, seeds: range) -> None:
    """Writes `NAME.jsonl` and the clips it names."""
    folder = output / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for seed in seeds for row in rows_of(seed, folder)]
    write_text(output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=300, help="clips")
    parser.add_argument("--validation", type=int, default=16, help="clips")
    options = parser.parse_args(arguments)
    write_split(options.output, "train", range(FIRST_SEED, FIRST_SEED + options.train))
    write_split(options.output, "validation", VALIDATION_SEEDS[1000 : 1000 + options.validation])


if __name__ == "__main__":
    main()
