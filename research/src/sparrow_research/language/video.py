"""The whole of docs/language-video.md as one command: a video LLM of SmolLM2, and its draft.

    python -m sparrow_research.language.video --smollm2 FOLDER --work FOLDER [--device cuda] [--dry-run]

It prints its steps and about how long they take before it starts. Run it again to go on where it was stopped: files
that are there are not made again, and answers, trainings, recordings and measurements go on by themselves.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME

from . import video_check, video_tau
from .rivals import VIDEO_RIVALS
from .road import VOCABULARY, training_words
from .steps import Step, run_steps, tell
from .video_clips import LENGTHS


@dataclass(frozen=True)
class Scale:
    """How much is made on a kind of device.

    Attributes:
        answers: Long answers that the target is trained with, written `answer_batch` at once.
        text_steps, text_clips, longest: Steps of the language model's training, short clips of each, and the most
            temporal steps of a clip.
        clips: That the draft is trained with, two answers each, written `row_batch` at once.
        draft_steps, draft_rows, learning_rate: Of the draft's training; rows are those of a step.
        workers: Processes that render and prepare clips.
    """

    answers: int
    answer_batch: int
    tower_steps: int
    text_steps: int
    text_clips: int
    longest: int
    clips: int
    row_batch: int
    draft_steps: int
    draft_rows: int
    learning_rate: float
    workers: int


SCALES = {
    "cpu": Scale(
        answers=1536,
        answer_batch=96,
        tower_steps=900,
        text_steps=500,
        text_clips=1,
        longest=94,
        clips=300,
        row_batch=8,
        draft_steps=400,
        draft_rows=8,
        learning_rate=5e-4,
        workers=0,
    ),
    "cuda": Scale(
        answers=2048,
        answer_batch=512,
        tower_steps=1000,
        text_steps=400,
        text_clips=8,
        longest=430,
        clips=600,
        row_batch=64,
        draft_steps=300,
        draft_rows=32,
        learning_rate=1e-3,
        workers=6,
    ),
}
SECONDS = {"answer": 0.9, "tower": 1.1, "text": 12.0, "draft": 0.54}
"""Estimates for one CPU thread with bf16 arithmetic: an answer, steps of the trainings (of one clip), and a row of the
draft's training."""
TRAINING_LENGTH = 700
"""Visual tokens of a clip of the draft's set, as a root mean square: what it costs grows with the square."""
PACKAGE = "sparrow_research.language"


def seconds_of(clips: int, visual_tokens: int, reads: int) -> float:
    """About how long clips take that the target reads so many times, one CPU thread with bf16 arithmetic.

    A recording took 2.4 s at 400 visual tokens and, beside other work, 48 s at 3,000; a prefill with the attention of
    `video_long` 4 to 7 minutes at 13,000 and 14 to 15 at 25,000, and torch's kernel takes 1.4 times as long. So: 1 s a
    read, 3 s for every thousand tokens (the layers), 1.6 s for the square of it (attention).
    """
    thousands = visual_tokens / 1000
    return clips * reads * (1 + 3 * thousands + 1.6 * thousands**2)


def plan(smollm2: Path, work: Path, device: str = "cpu") -> list[Step]:
    """The commands, in their order."""
    scale = SCALES[device.partition(":")[0]]
    there, workers = ("--device", device), ("--workers", str(scale.workers))
    parts, target = work / "parts", work / "target"
    text, on = ("--smollm2", str(smollm2)), ("--target", str(target))
    answers = work / "answers.jsonl"
    sampled = "--do-sample --temperature 0.8 --top-k 50 --max-new-tokens 200".split()
    greedy = "--max-new-tokens 96".split()
    found = [
        Step(
            (
                *(f"{PACKAGE}.video_answers", "--target", str(smollm2), "--output", str(answers), *there),
                *("--rows", str(scale.answers), "--batch-size", str(scale.answer_batch)),
            ),
            # With the kept parts in the work folder nothing is left to be learned from answers.
            parts / "adapters.safetensors",
            scale.answers * SECONDS["answer"],
        ),
        Step(
            (
                *(f"{PACKAGE}.video_tower", *text, "--output", f"{parts}/tower.safetensors"),
                *("--steps", str(scale.tower_steps), *workers, *there),
            ),
            parts / "tower.safetensors",
            scale.tower_steps * SECONDS["tower"],
        ),
        Step(
            (
                *(f"{PACKAGE}.video_training", *text, "--tower", f"{parts}/tower.safetensors"),
                *("--answers", str(answers), "--output", f"{parts}/adapters.safetensors"),
                *("--steps", str(scale.text_steps), "--clips", str(scale.text_clips)),
                *("--longest", str(scale.longest), *workers, *there),
            ),
            parts / "adapters.safetensors",
            scale.text_steps * scale.text_clips * SECONDS["text"],
        ),
        Step(
            (f"{PACKAGE}.video_target", *text, "--parts", str(parts), "--output", str(target)),
            target / SAFE_WEIGHTS_NAME,
            10,
        ),
        Step(
            (
                *(f"{PACKAGE}.video_check", *on, *text, *there),
                *("--work", f"{work}/check", "--output", f"{work}/check.json"),
            ),
            work / "check.json",
            # A clip with its questions, a black one with them, and a long answer.
            sum(seconds_of(clips, length, 3) for length, clips in video_check.LENGTHS.items()),
        ),
        Step(
            (
                *(f"{PACKAGE}.video_clips", "--output", f"{work}/prompts", "--train", str(scale.clips)),
                *("--workers", str(max(1, scale.workers))),
            ),
            work / "prompts" / "validation.jsonl",
            scale.clips * 0.2,
        ),
    ]
    seen = ("--dtype", "bfloat16", *there)
    sets = {"train": (2 * scale.clips, TRAINING_LENGTH, sampled), "validation": (32, TRAINING_LENGTH, sampled)}
    sets |= {f"length-{length}": (clips, length, greedy) for length, clips in LENGTHS.items()}
    for name, (count, length, decoded) in sets.items():
        written = ("--prompts", f"{work}/prompts/{name}.jsonl", "--output", f"{work}/answers-{name}")
        recorded = ("--answers", f"{work}/answers-{name}", "--output", f"{work}/recording-{name}")
        batch = 1 if decoded is greedy else scale.row_batch
        found += [
            Step(
                ("sparrow_hf.cli", "regenerate", *on, *written, *decoded, "--batch-size", str(batch), *seen),
                None,
                seconds_of(count, length, 1),
            ),
            Step(("sparrow_hf.cli", "record", *on, *recorded, *seen), None, seconds_of(count, length, 1)),
        ]
    vocabulary = work / "vocabulary.safetensors"
    size = ("--size", str(VOCABULARY))
    found.append(
        Step(
            ("sparrow_hf.cli", "vocab", *on, "--answers", f"{work}/answers-train", *size, "--output", str(vocabulary)),
            vocabulary,
            20,
        )
    )
    drafts = {"sparrow": None} | {name: name for name in VIDEO_RIVALS}
    for name, rival in drafts.items():
        folder = work / "drafts" / name
        words = training_words(
            rival,
            str(target),
            folder,
            train=work / "recording-train",
            held_out=work / "recording-validation",
            vocabulary=vocabulary,
            steps=scale.draft_steps,
            rows=scale.draft_rows,
            learning_rate=scale.learning_rate,
            dtype="bfloat16",
            device=device,
        )
        seconds = scale.draft_steps * scale.draft_rows * SECONDS["draft"]
        found.append(Step(words, folder / SAFE_WEIGHTS_NAME, seconds))
    folders = [str(work / "drafts" / name) for name in drafts]
    found += [
        Step(
            (
                *(f"{PACKAGE}.video_lengths", *on, "--recordings", str(work), "--drafts", *folders),
                *("--output", f"{work}/lengths.json", *there),
            ),
            work / "lengths.json",
            len(drafts) * 60,
        ),
        Step(
            (
                *(f"{PACKAGE}.video_tau", *on, "--draft", folders[0]),
                *("--work", f"{work}/tau", "--output", f"{work}/tau.json", *there),
            ),
            None,
            sum(seconds_of(clips, length, 1) for length, clips in video_tau.LENGTHS.items()),
        ),
    ]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line of the road."""
    parser = argparse.ArgumentParser(description="Make a video LLM of SmolLM2, and a draft of it; measure both.")
    parser.add_argument("--smollm2", type=Path, required=True, help="folder that language.smollm2 made")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--device", default="cpu", help="cuda makes more of everything")
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time; a GPU has room for several")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    options = parser.parse_args(arguments)
    missing = [step for step in plan(options.smollm2, options.work, options.device) if not step.is_done]
    tell(missing)
    if not options.dry_run:
        (options.work / "parts").mkdir(parents=True, exist_ok=True)
        run_steps(missing, options.jobs, options.work / "logs")


if __name__ == "__main__":
    main()
