"""The drafts that `make results` compares: same target, same clips, same optimiser, as many steps for each.

`sparrow` is the draft that ships; the others are trained here as it was (`retrain.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sparrow_hf.artifacts import write_json
from sparrow_hf.evaluation.provenance import commit
from sparrow_hf.testbed import SHIPPED
from sparrow_hf.testbed.families import Family
from sparrow_hf.testbed.nano import load_target
from sparrow_hf.testbed.world import TRAIN_SEEDS
from sparrow_hf.training.recording import RecordedDataset

from ..baselines import BASELINES, Baseline
from ..pretrain import SIBLING_STAGES, Pretraining
from ..recipes import RECIPES
from ..retrain import CLIPS, TEXT_ONLY_RECIPE, build_draft, build_trainer, record, train

SEED = 0
SHIPPED_DRAFT, TEXT_ONLY = "sparrow", "text-only"
SIBLING = "sibling"
FINISHED_FILE = "finished.json"
"""Written last: where it lies, the draft is whole."""

_PAPER = RECIPES["paper"]
_NO_VISUAL_ROWS = {"num_visual_rows_min": 0, "num_visual_rows_max": 0}

#: Short name → what tells the draft from the testbed's default, which is `sparrow`.
DRAFTS: dict[str, Baseline] = {
    SHIPPED_DRAFT: Baseline(),
    "paper": Baseline(draft=_PAPER.draft, training=_PAPER.training),
    "no-bridge": Baseline(draft=_PAPER.draft, training=_PAPER.training | _NO_VISUAL_ROWS),
    "no-mtp": Baseline(draft=_PAPER.draft | {"num_mtp_steps": 1}, training=_PAPER.training),
    "all-rows": Baseline(draft=RECIPES["all visual rows"].draft, training=RECIPES["all visual rows"].training),
    TEXT_ONLY: Baseline(training=TEXT_ONLY_RECIPE),
    **{name: baseline for name, baseline in BASELINES.items() if baseline.weights_of is None},
}

MEANINGS = {
    SHIPPED_DRAFT: "Sparrow, this package's recipe on the last layer: a glimpse of 64 visual rows, five passes (MTP)",
    "paper": "Sparrow as published: all visual rows in training (IVSB), two passes (MTP), none in use (VATA)",
    "no-bridge": "as published, without IVSB: never sees a visual row",
    "no-mtp": "as published, without MTP: one pass",
    "all-rows": "this package's recipe with all visual rows, in training and in use",
    TEXT_ONLY: "a language model of the same shape that reads no target states, one pass",
    "msd": "MSD-like: all projected visual rows, one pass, as published",
    "vispec": "ViSpec-like: the video squeezed into one row and one vector, two passes, as published",
    "hivis": "HiViS-like: text rows only, a learned correction per step, five passes",
    SIBLING: f"{SIBLING_STAGES[-1].layers} of the target's layers and all that sees, trained on reference captions; "
    "as transformers' assistant it drafts blind ([benchmark.md](benchmark.md#arms)), SpecVLM-like it sees",
}


def shipped_steps(family: Family) -> int:
    """Optimizer steps of the draft that ships: what every draft gets."""
    return json.loads((SHIPPED[family.name] / "draft" / "PROVENANCE.json").read_text())["steps"]


def record_clips(family: Family, work: Path) -> None:
    """Has the target caption and read the training clips, for drafts of its middle layer and of its projector."""
    target, processor = load_target(SHIPPED[family.name] / "target")
    seeds = TRAIN_SEEDS[-CLIPS:]
    record(target, processor, seeds, work / "recording" / "train", projected=work / "recording" / "projected")


def train_sibling(family: Family, work: Path) -> None:
    """Trains the small target that drafts for the large one in transformers' assisted generation."""
    folder = folders_of(family, work)[SIBLING]
    if not is_finished(folder):
        Pretraining(folder, SEED, family, SHIPPED[family.name] / "target").run()
        _finish(folder)


def folders_of(family: Family, work: Path) -> dict[str, Path]:
    """Folder of every draft, and of the sibling."""
    folder = work / f"drafts-{shipped_steps(family)}"
    return {name: folder / name for name in DRAFTS} | {
        SHIPPED_DRAFT: SHIPPED[family.name] / "draft",
        SIBLING: work / SIBLING,
    }


def is_finished(folder: Path) -> bool:
    """Whether a draft's training came to its end. What ships did."""
    return (folder / FINISHED_FILE).exists() or any(folder == shipped / "draft" for shipped in SHIPPED.values())


def train_draft(family: Family, work: Path, name: str) -> None:
    """Trains one draft on one thread, from its last checkpoint if there is one, and saves it."""
    torch.set_num_threads(1)
    recipe, folder, steps = DRAFTS[name], folders_of(family, work)[name], shipped_steps(family)
    target, _ = load_target(SHIPPED[family.name] / "target")
    draft = build_draft(target, SEED, name == TEXT_ONLY, recipe.draft_class, **recipe.draft)
    recording = work / "recording" / ("projected" if draft.config.visual_bridge_layer == 0 else "train")
    rows = RecordedDataset(recording, draft)
    trainer = build_trainer(
        draft, rows, None, folder, max_steps=steps, seed=SEED, disable_tqdm=True, **recipe.training
    )
    train(trainer)
    draft.save_pretrained(folder)
    _finish(folder, steps=steps, clips=CLIPS, seed=SEED, draft=recipe.draft, training=recipe.training)


def _finish(folder: Path, **details: Any) -> None:
    write_json(folder / FINISHED_FILE, details | {"commit": commit()}, indent=1)
