"""Compares training recipes: same target, same recording, same steps, several seeds; τ at three visual lengths.

    python -m sparrow_research.recipes --work DIR --output research/data/recipes.json --report docs/recipes.md

Every recipe differs from the default in what its row says and in nothing else. The target is shipped, frozen and
recorded once. τ is read off the exact passes on the target's own greedy captions, which is what decoding a chain takes
(`training/acceptance.py`; tested). Run the command again to go on where it was stopped; `make recipes` runs it all.
Trainings share nothing, so on a small machine one per core at a time (`--processes`) is what takes least time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparrow_hf.artifacts import tensor_digest, write_json, write_text
from sparrow_hf.draft_inputs import EVERY_VISUAL_TOKEN
from sparrow_hf.evaluation.provenance import commit
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.testbed.nano import ASSETS, load_target
from sparrow_hf.testbed.world import TRAIN_SEEDS, VALIDATION_SEEDS
from sparrow_hf.training import ALL_VISUAL_ROWS, DRAFT_PRESETS, TRAINING_PRESETS, SparrowTrainer
from sparrow_hf.training.recording import RecordedDataset

from .processes import run_in_processes
from .retrain import DRAFT, build_draft, build_trainer, record, train

CLIPS, STEPS, SEEDS = 1024, 200, (0, 1, 2)
LENGTHS = {400: 24, 2000: 12, 8000: 4}
"""Visual tokens → validation clips of that length. None of them is among the evaluation clips of any other figure."""
FIRST_CLIP = 10_000
LOSSES = ("soft_cross_entropy_weight", "probability_l1_weight", "list_mle_weight", "feature_smooth_l1_weight")


@dataclass(frozen=True)
class Recipe:
    """What differs from the default: fields of the draft, of the training arguments, and the size of its vocabulary.

    `glimpses` are further budgets of visual rows that the same trained draft is measured with.
    """

    draft: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None
    glimpses: tuple[int, ...] = ()


def _losses(*weights: float) -> dict[str, Any]:
    return dict(zip(LOSSES, weights, strict=True))


def _visual(rows: int) -> dict[str, Any]:
    return {"num_visual_rows_min": rows, "num_visual_rows_max": rows}


# The schedule and the optimiser are the testbed's for all: at the paper's learning rate, made for a thousand times the
# steps, nothing is learned here.
_PAPER = {
    name: value
    for name, value in TRAINING_PRESETS["paper"].items()
    if name not in ("learning_rate", "lr_scheduler_type", "adam_beta2", "max_grad_norm")
}

RECIPES = {
    "default": Recipe(glimpses=(0, 16, 256)),
    "paper": Recipe(DRAFT_PRESETS["paper"], _PAPER),
    "text rows only": Recipe({"num_glimpse_tokens": 0}, _visual(0)),
    "glimpse of 16": Recipe({"num_glimpse_tokens": 16}, {"num_visual_rows_max": 16}),
    "glimpse of 256": Recipe({"num_glimpse_tokens": 256}, {"num_visual_rows_max": 256}),
    "all visual rows": Recipe({"num_glimpse_tokens": EVERY_VISUAL_TOKEN}, _visual(ALL_VISUAL_ROWS)),
    "1 pass": Recipe({"num_mtp_steps": 1}),
    "2 passes": Recipe({"num_mtp_steps": 2}),
    "4 passes": Recipe({"num_mtp_steps": 4}),
    "passes by re-input": Recipe(training={"mtp_attention": "reinput"}),
    "loss: soft cross-entropy alone": Recipe(training=_losses(1.0, 0.0, 0.0, 0.0)),
    "loss: L1": Recipe(training=_losses(0.0, 10.0, 0.0, 0.0)),
    "loss: L1 + ListMLE": Recipe(training=_losses(0.0, 10.0, 0.1, 0.0)),
    "loss: smooth L1 + 0.1 cross-entropy": Recipe(training=_losses(0.1, 0.0, 0.0, 1.0)),
    "noise 0.2": Recipe(training={"hidden_state_noise": 0.2}),
    "four feature layers": Recipe({"feature_layers": [2, 12, 21, -1]}),
    "three feature layers": Recipe({"feature_layers": [8, 16, -1]}),
    "three feature layers, not scaled": Recipe({"feature_layers": [8, 16, -1], "feature_norm": False}),
    "projected visual rows": Recipe({"project_visual": True}),
    "original positions": Recipe({"position_mode": "original"}),
    "128 of 384 tokens": Recipe(vocabulary=128),
}


def record_all(target: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Records the training clips and the validation clips of every length, as far as they are not there yet."""
    record(target, processor, TRAIN_SEEDS[-CLIPS:], folder / "train")
    for length, clips in LENGTHS.items():
        seeds = VALIDATION_SEEDS[FIRST_CLIP : FIRST_CLIP + clips]
        record(target, processor, seeds, folder / f"validation-{length}", visual_tokens=length)


def frequent_tokens(rows: RecordedDataset, size: int, draft: SparrowDraftModel) -> torch.Tensor:
    """`(size,)` ids that the recorded answers use most, ascending."""
    counts = torch.zeros(draft.config.vocab_size, dtype=torch.long)
    for index in range(len(rows)):
        row = rows[index]
        counts += torch.bincount(row["input_ids"][row["answer_start"] :], minlength=len(counts))
    counts[draft.config.visual_token_ids] = -1
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def measure(trainer: SparrowTrainer, recording: Path, glimpse: int) -> dict[str, float]:
    """τ of a chain by visual length, with a glimpse of so many rows."""
    config = trainer.draft.config
    trained_with, config.num_glimpse_tokens = config.num_glimpse_tokens, glimpse
    try:
        return {
            str(length): round(
                trainer.evaluate(RecordedDataset(recording / f"validation-{length}", trainer.draft))["eval_tau"], 4
            )
            for length in LENGTHS
        }
    finally:
        config.num_glimpse_tokens = trained_with


def run_recipe(target_folder: Path, name: str, seed: int, steps: int, recording: Path, folder: Path) -> dict[str, Any]:
    """Trains and measures one draft on one thread; a row of the results."""
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    start = time.monotonic()
    target, _ = load_target(target_folder)
    draft = build_draft(target, seed, **recipe.draft)
    rows = RecordedDataset(recording / "train", draft)
    if recipe.vocabulary is not None:
        draft.set_vocabulary(frequent_tokens(rows, recipe.vocabulary, draft))
    trainer = build_trainer(
        draft, rows, None, folder, max_steps=steps, seed=seed, disable_tqdm=True, **recipe.training
    )
    train(trainer)
    return {
        "recipe": name,
        "seed": seed,
        "steps": steps,
        "draft": DRAFT | recipe.draft,
        "training": recipe.training,
        "draft_vocab_size": recipe.vocabulary,
        "tau": measure(trainer, recording, draft.config.num_glimpse_tokens),
        "tau_by_glimpse": {str(glimpse): measure(trainer, recording, glimpse) for glimpse in recipe.glimpses},
        "seconds": round(time.monotonic() - start),
        "commit": commit(),
        "target_sha256": tensor_digest(target.state_dict()),
    }


def write_report(rows: list[dict[str, Any]], path: Path) -> None:
    """The results as a table: mean over seeds, and the range where there are several."""
    lengths = [str(length) for length in LENGTHS]
    lines = [
        "# Training recipes, measured",
        "",
        "τ (tokens per target forward) of a chain of 5 on greedy captions of the testbed's target, by visual length:",
        "mean over seeds (lowest … highest). All rows have the same target, recording and steps; the first column",
        "says what differs from the default. Made by `make recipes`; every single run is in",
        "`research/data/recipes.json`.",
        "",
        "*default* is the testbed's draft: the package's defaults, but one pass per drafted token (5) where the",
        "package has four, and the last layer's states alone where it reads four layers. So *4 passes* is what",
        "`sparrow train --feature-layers -1` does; today's default of four layers is compared only if there is a row",
        "*four feature layers*. The budget is small: rows compare what is learned fast.",
        "",
        "The optimiser is the testbed's (Muon) in all rows, also in the paper's: at its own learning rate, made for a",
        "thousand times the steps, nothing is learned here.",
        "",
        *_earlier_target(rows),
        f"| recipe | {' | '.join(lengths)} | seeds | steps |",
        f"|---|{'---|' * (len(lengths) + 2)}",
    ]
    # A row whose recipe was renamed or removed is told all the same.
    names = dict.fromkeys([*RECIPES, *(row["recipe"] for row in rows)])
    named = [(name, name, "tau") for name in names]
    named += [
        (f"{name}, decoded with a glimpse of {glimpse}", name, str(glimpse))
        for name, recipe in RECIPES.items()
        for glimpse in recipe.glimpses
    ]
    table = []
    for label, name, key in named:
        runs = [row for row in rows if row["recipe"] == name]
        if runs:
            figures = [row["tau"] if key == "tau" else row["tau_by_glimpse"][key] for row in runs]
            cells = [_mean_and_range([each[length] for each in figures]) for length in lengths]
            mean = statistics.mean(each[lengths[0]] for each in figures)
            table.append((mean, f"| {label} | {' | '.join(cells)} | {len(runs)} | {runs[0]['steps']} |"))
    lines += [line for _, line in sorted(table, key=lambda entry: -entry[0])]
    write_text(path, "\n".join(lines) + "\n")


def _earlier_target(rows: list[dict[str, Any]]) -> list[str]:
    """A remark, if the runs are not of the target that ships."""
    measured = rows[0]["target_sha256"]
    if measured == tensor_digest(load_target()[0].state_dict()):
        return []
    return [
        f"**Measured on another target than the one that ships**: sha256 `{measured[:16]}…`, at commit "
        f"`{rows[0]['commit'][:12]}`.",
        "",
    ]


def _mean_and_range(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} … {max(values):.2f})"


def main(arguments: list[str] | None = None) -> None:
    """Command line of the comparison."""
    parser = argparse.ArgumentParser(description="Compare training recipes on the testbed (resumes by itself).")
    parser.add_argument("--target", type=Path, default=ASSETS / "target", help="folder of the target")
    parser.add_argument("--work", type=Path, required=True, help="folder of the recording and of running trainings")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    parser.add_argument("--report", type=Path, help="file of the table")
    parser.add_argument("--recording", type=Path, help="folder of the recording (default: WORK/recording)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one run of every recipe per seed")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="which recipes")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, each on one thread")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    target, processor = load_target(options.target)
    recording = options.recording or options.work / "recording"
    record_all(target, processor, recording)
    sha256 = tensor_digest(target.state_dict())
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    # Runs on another target, or of another length, are not comparable: the table starts anew.
    rows = [row for row in rows if (row["target_sha256"], row["steps"]) == (sha256, options.steps)]
    done = {(row["recipe"], row["seed"]) for row in rows}
    # All recipes once before any of them twice: an early stop leaves a whole table.
    runs = [(name, seed) for seed in options.seeds for name in options.recipes if (name, seed) not in done]
    folder = options.work / f"{sha256[:8]}-{options.steps}"
    calls = [
        (options.target, name, seed, options.steps, recording, folder / f"{name.replace(' ', '-')}-{seed}")
        for name, seed in runs
    ]
    for row in run_in_processes(run_recipe, calls, options.processes, "recipes"):
        rows.append(row)
        write_results(rows, options.output, options.report)


def write_results(rows: list[dict[str, Any]], output: Path, report: Path | None) -> None:
    """Writes what there is so far, in the order of the table of recipes (others last), and the report on it."""
    places = {name: place for place, name in enumerate(RECIPES)}
    rows.sort(key=lambda row: (row["seed"], places.get(row["recipe"], len(places))))
    write_json(output, rows, indent=1)
    if report is not None:
        write_report(rows, report)


if __name__ == "__main__":
    main()
