"""The whole of docs/language.md as one command: from the kept answers to drafts, rivals and tables.

    python -m sparrow_research.language.road --target smollm2 --work runs/language [--bf16] [--device cuda] [--dry-run]

It prints its steps and about how long they take before it starts. Run it again to go on where it was stopped: what is
complete is not made again, recordings and measurements go on by themselves, trainings from their last checkpoint. What
was trained with other options is refused.
A draft is trained from the first N answer tokens for every N of `--tokens`, and the rivals from the largest N, all
with the same number of steps. `python -m sparrow_research.language.text` with `--report` only writes the tables.
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME

from sparrow_hf.artifacts import check_made_alike, write_json, write_text
from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.training.checkpoints import last_checkpoint

from .rivals import RIVALS, TEXT_RIVALS
from .steps import Step, run_steps, tell
from .text import TRAINED_FILE, training_of

DATA = Path(__file__).parents[3] / "data" / "language"
TRAIN = ("train-h100", "train-cpu", "train-h200")
"""Kept answers, in the order in which they are used."""
TOKENS = (28_000, 100_000, 459_403, 963_186)
VOCABULARY = 8192
COMMON = "--copy-last-layer --lr-scheduler-type cosine --adam-beta2 0.95 --weight-decay 0"
PASSES = "--num-mtp-steps 3"
"""Of every draft but the rivals that have their own."""
SECONDS = {"record": 0.55, "row": 0.45, "measure": 15.0}
"""Measured on one quiet CPU thread in fp32: recording a row, a row of a training step (three passes), and 128 tokens
of a prompt in one arm. A CPU with bf16 arithmetic takes half of the first two, a CUDA card a small part."""


def first_answers(tokens: int) -> Iterator[str]:
    """The kept training answers up to so many tokens, one line of JSON each."""
    found = 0
    for line in chain.from_iterable(lines_of(name) for name in TRAIN):
        if found >= tokens:
            return
        found += len(json.loads(line)["answer_ids"])
        yield line


def lines_of(name: str) -> list[str]:
    """Kept answers of this name, one line of JSON each."""
    with gzip.open(DATA / "answers" / f"{name}.jsonl.gz", "rt") as file:
        return file.readlines()


def kept_answers(sizes: Sequence[int]) -> dict[str, list[str]]:
    """Name → the kept answers of every size, and those held out, one line of JSON each."""
    return {f"{size}": list(first_answers(size)) for size in sizes} | {"validation": lines_of("validation")}


def unpack(work: Path, answers: dict[str, list[str]]) -> None:
    """Writes answers as `sparrow record` reads them."""
    for name, lines in answers.items():
        folder = work / f"answers-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "answers-00000.jsonl", "".join(lines))


def training_words(
    rival: str | None,
    target: str,
    folder: Path,
    *,
    train: Path,
    held_out: Path,
    vocabulary: Path,
    steps: int,
    rows: int,
    learning_rate: float,
    dtype: str,
    device: str,
) -> tuple[str, ...]:
    """What trains a draft, or the rival of this name, from a recording; it goes on from a checkpoint in `folder`.

    Args:
        steps, rows: Of the training, and of each step.
        dtype: Of the recorded states, and of the arithmetic.
    """
    command = ("sparrow_hf.cli", "train") if rival is None else ("sparrow_research.language.rivals", rival)
    has_own_passes = rival is not None and "--num-mtp-steps" in RIVALS[rival].options
    return (
        *(*command, "--target", target, "--train", str(train), "--held-out", str(held_out), "--output", str(folder)),
        *("--vocabulary", str(vocabulary), "--target-dtype", dtype, "--bf16", str(dtype == "bfloat16").lower()),
        *("--max-steps", str(steps), "--warmup-steps", str(steps // 20), "--save-steps", str(max(1, steps // 4))),
        *("--learning-rate", str(learning_rate), "--per-device-train-batch-size", str(rows)),
        *("--use-cpu", str(device == "cpu").lower(), *COMMON.split()),
        *(() if has_own_passes else PASSES.split()),
        *(("--resume",) if last_checkpoint(folder / "checkpoints") else ()),
    )


def plan(
    target: str,
    work: Path,
    rows: dict[str, int],
    sizes: Sequence[int],
    steps: int,
    batch: int,
    learning_rate: float,
    device: str,
    dtype: str,
    limit: int,
) -> list[Step]:
    """The commands, in their order. `dtype` is that of recorded states, and of the arithmetic of training."""
    on = ("--target", target)
    largest = max(sizes)
    own = f"-{largest}"
    vocabulary = work / f"vocabulary-{largest}.safetensors"
    found = [
        Step(
            (
                *("sparrow_hf.cli", "record", *on, "--answers", f"{work}/answers-{name}", "--output"),
                *(f"{work}/recording-{name}", "--text-only", "--dtype", dtype, "--device", device),
            ),
            None,
            count * SECONDS["record"],
        )
        for name, count in rows.items()
    ]
    answers = f"{work}/answers-{largest}"
    size = ("--size", str(VOCABULARY))
    words = ("sparrow_hf.cli", "vocab", *on, "--answers", answers, *size, "--output", str(vocabulary))
    found.append(Step(words, vocabulary, 20))
    drafts: dict[str, tuple[str | None, int]] = {f"sparrow-{size}": (None, size) for size in sizes}
    drafts |= {f"{name}-{largest}": (name, largest) for name in TEXT_RIVALS}
    for name, (rival, tokens) in drafts.items():
        folder = work / "drafts" / name
        training = training_words(
            rival,
            target,
            folder,
            train=work / f"recording-{tokens}",
            held_out=work / "recording-validation",
            vocabulary=vocabulary,
            steps=steps,
            rows=batch,
            learning_rate=learning_rate,
            dtype=dtype,
            device=device,
        )
        found.append(Step(training, folder / SAFE_WEIGHTS_NAME, steps * batch * SECONDS["row"]))
    measured = (
        *("sparrow_research.language.text", *on, "--draft", f"{work}/drafts/sparrow-{largest}", "--compare"),
        *(f"{name.removesuffix(own)}={work}/drafts/{name}" for name in drafts if name != f"sparrow-{largest}"),
        *("--limit", str(limit), "--work", f"{work}/measured", "--output", f"{work}/text.json"),
    )
    calls = limit * 2 * (9 + 2 * len(drafts) + 1)
    return [*found, Step(measured, None, calls * SECONDS["measure"])]


def trainings(work: Path, steps: Sequence[Step], settings: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Folder of every draft → what its training is: how many answer tokens, and the settings that all have."""
    folders = [Path(step.output) for step in steps if Path(step.output).parent == work / "drafts"]
    return {folder: {"tokens": int(folder.name.rpartition("-")[2]), **settings} for folder in folders}


def has_begun(folder: Path) -> bool:
    """Whether a draft's training is done, or goes on from a checkpoint."""
    return (folder / SAFE_WEIGHTS_NAME).exists() or last_checkpoint(folder / "checkpoints") is not None


def check_trainings(wanted: dict[Path, dict[str, Any]]) -> None:
    """Compares the drafts that are there with those that are wanted, as far as it is written down what they are.

    Raises:
        TrainingOptionsError: One was trained with other options.
    """
    for folder, settings in wanted.items():
        if has_begun(folder):
            found = training_of(folder)
            known = {name: value for name, value in settings.items() if name in found}
            remedy = "repeat the options of its training, delete it, or choose another --work"
            check_made_alike(folder, found, known, TrainingOptionsError, remedy)


def describe(wanted: dict[Path, dict[str, Any]]) -> None:
    """Writes what a training is beside every draft whose training has yet to begin; `language.text` tables it."""
    for folder, settings in wanted.items():
        if not has_begun(folder):
            write_json(folder / TRAINED_FILE, settings)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the road."""
    parser = argparse.ArgumentParser(description="Train drafts and rivals of a language model, and measure them.")
    parser.add_argument("--target", required=True, help="folder of the language model")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="sizes of the training set")
    parser.add_argument("--steps", type=int, default=1000, help="of every training")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="record and train in bf16: faster where it is arithmetic")
    parser.add_argument("--limit", type=int, default=24, help="prompts that are measured")
    parser.add_argument(
        "--device", default="cpu", help="where is recorded and trained; drafts are measured on the CPU"
    )
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time; a GPU has room for several")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    options = parser.parse_args(arguments)

    answers = kept_answers(options.tokens)
    settings = {
        "steps": options.steps,
        "rows": options.batch,
        "learning_rate": options.learning_rate,
        "dtype": "bfloat16" if options.bf16 else "float32",
        "vocabulary_of_tokens": max(options.tokens),
    }
    steps = plan(
        options.target,
        options.work,
        {name: len(lines) for name, lines in answers.items()},
        options.tokens,
        options.steps,
        options.batch,
        options.learning_rate,
        options.device,
        str(settings["dtype"]),
        options.limit,
    )
    wanted = trainings(options.work, steps, settings)
    check_trainings(wanted)
    missing = [step for step in steps if not step.is_done]
    tell(missing)
    if not options.dry_run:
        unpack(options.work, answers)
        describe(wanted)
        run_steps(missing, options.jobs, options.work / "logs")


if __name__ == "__main__":
    main()
