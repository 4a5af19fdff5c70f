"""The whole of the part "Video" of docs/language.md as one command: a video LLM of SmolLM2, and its draft.

    python -m sparrow_research.language.video --smollm2 FOLDER --work FOLDER [--dry-run]

It prints its steps and about how long they take before it starts. Run it again to go on where it was stopped: files
that are there are not made again, and answers, trainings, recordings and measurements go on by themselves.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME

from sparrow_hf.training.checkpoints import last_checkpoint

from .road import COMMON, VOCABULARY, Step

ANSWERS, TOWER_STEPS, TEXT_STEPS, DRAFT_STEPS, DRAFT_ROWS = 1536, 900, 500, 400, 8
CLIPS = 300
SECONDS = {"answer": 0.9, "tower": 1.1, "text": 8.0, "row": 1.0, "draft": 0.3, "check": 2400.0, "tau": 3600.0}
"""Estimates for one CPU thread with bf16 arithmetic: an answer, steps of the trainings, a row of the draft's set read
or written, a row of its training, and the two measurements."""
PACKAGE = "sparrow_research.language"


def plan(smollm2: Path, work: Path) -> list[Step]:
    """The commands, in their order."""
    parts, target, draft = work / "parts", work / "target", work / "draft"
    text, on = ("--smollm2", str(smollm2)), ("--target", str(target))
    answers = work / "answers.jsonl"
    sampled = "--do-sample --temperature 0.8 --max-new-tokens 200 --dtype bfloat16 --device cpu".split()
    rows = 2 * CLIPS
    found = [
        Step(
            (f"{PACKAGE}.video_answers", "--target", str(smollm2), "--output", str(answers), "--rows", str(ANSWERS)),
            None,
            ANSWERS * SECONDS["answer"],
        ),
        Step(
            (f"{PACKAGE}.video_tower", *text, "--output", f"{parts}/tower.safetensors", "--steps", str(TOWER_STEPS)),
            parts / "tower.safetensors",
            TOWER_STEPS * SECONDS["tower"],
        ),
        Step(
            (
                *(f"{PACKAGE}.video_training", *text, "--answers", str(answers)),
                *("--output", f"{parts}/adapters.safetensors", "--steps", str(TEXT_STEPS)),
            ),
            parts / "adapters.safetensors",
            TEXT_STEPS * SECONDS["text"],
        ),
        Step(
            (f"{PACKAGE}.video_target", *text, "--parts", str(parts), "--output", str(target)),
            target / SAFE_WEIGHTS_NAME,
            10,
        ),
        Step(
            (f"{PACKAGE}.video_check", *on, *text, "--work", f"{work}/check", "--output", f"{work}/check.json"),
            work / "check.json",
            SECONDS["check"],
        ),
        Step(
            (f"{PACKAGE}.video_clips", "--output", f"{work}/prompts", "--train", str(CLIPS)),
            work / "prompts" / "validation.jsonl",
            CLIPS * 0.2,
        ),
    ]
    for split in ("train", "validation"):
        count = rows if split == "train" else 32
        written = ("--prompts", f"{work}/prompts/{split}.jsonl", "--output", f"{work}/answers-{split}")
        recorded = ("--answers", f"{work}/answers-{split}", "--output", f"{work}/recording-{split}")
        found += [
            Step(
                ("sparrow_hf.cli", "regenerate", *on, *written, *sampled, "--batch-size", "8"),
                None,
                count * 4 * SECONDS["row"],
            ),
            Step(
                ("sparrow_hf.cli", "record", *on, *recorded, "--dtype", "bfloat16", "--device", "cpu"),
                None,
                count * SECONDS["row"],
            ),
        ]
    vocabulary = work / "vocabulary.safetensors"
    size = ("--size", str(VOCABULARY))
    resume = ("--resume",) if last_checkpoint(draft / "checkpoints") else ()
    found += [
        Step(
            ("sparrow_hf.cli", "vocab", *on, "--answers", f"{work}/answers-train", *size, "--output", str(vocabulary)),
            vocabulary,
            20,
        ),
        Step(
            (
                *("sparrow_hf.cli", "train", *on, "--train", f"{work}/recording-train"),
                *("--held-out", f"{work}/recording-validation", "--output", str(draft), "--target-dtype", "bfloat16"),
                *("--vocabulary", str(vocabulary), "--max-steps", str(DRAFT_STEPS), "--warmup-steps"),
                *(
                    str(DRAFT_STEPS // 20),
                    "--save-steps",
                    str(DRAFT_STEPS // 10),
                    "--bf16",
                    "true",
                    "--use-cpu",
                    "true",
                ),
                *("--per-device-train-batch-size", str(DRAFT_ROWS), *COMMON.split(), *resume),
            ),
            draft / SAFE_WEIGHTS_NAME,
            DRAFT_STEPS * DRAFT_ROWS * SECONDS["draft"],
        ),
        Step(
            (
                *(f"{PACKAGE}.video_tau", *on, "--draft", str(draft)),
                *("--work", f"{work}/tau", "--output", f"{work}/tau.json"),
            ),
            None,
            SECONDS["tau"],
        ),
    ]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line of the road."""
    parser = argparse.ArgumentParser(description="Make a video LLM of SmolLM2, and a draft of it; measure both.")
    parser.add_argument("--smollm2", type=Path, required=True, help="folder that language.smollm2 made")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    options = parser.parse_args(arguments)
    missing = [step for step in plan(options.smollm2, options.work) if not step.is_done]
    for step in missing:
        print(f"{step.seconds / 60:6.0f} min  python -m {shlex.join(step.words)}")
    print(f"{sum(step.seconds for step in missing) / 3600:.1f} hours on one CPU thread, estimated", flush=True)
    if options.dry_run:
        return
    (options.work / "parts").mkdir(parents=True, exist_ok=True)
    for step in missing:
        subprocess.run([sys.executable, "-m", *step.words], check=True)


if __name__ == "__main__":
    main()
