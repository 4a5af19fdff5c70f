"""The drafts that `make results` compares: same target, same clips, same optimiser, as many steps for each.

`sparrow` is the draft that ships; the others are trained here as it was (`retrain.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ...evaluation.baselines import BASELINES, Baseline
from ...evaluation.provenance import commit
from ...hub import target_digest
from ...training.recording import RecordedDataset
from .. import SHIPPED
from ..families import Family
from ..nano import load_target
from ..pretrain import Pretraining
from ..recipes import RECIPES
from ..retrain import CLIPS, TEXT_ONLY_RECIPE, build_draft, build_trainer, record, train
from ..world import TRAIN_SEEDS

SEED = 0
PROVENANCE_FILE = "PROVENANCE.json"
SHIPPED_DRAFT, TEXT_ONLY = "sparrow", "text-only"
SIBLING, SIBLING_DEPTH = "sibling", 4


def _recipe(name: str) -> Baseline:
    return Baseline(draft=RECIPES[name].draft, training=RECIPES[name].training)


#: Short name → what tells the draft from the testbed's default, which is `sparrow`.
CONTENDERS: dict[str, Baseline] = {
    SHIPPED_DRAFT: Baseline(),
    "paper": _recipe("paper"),
    "no-bridge": _recipe("text rows only"),
    "no-mtp": _recipe("1 pass"),
    "no-window": _recipe("all visual rows"),
    TEXT_ONLY: Baseline(training=TEXT_ONLY_RECIPE),
    **{name: baseline for name, baseline in BASELINES.items() if baseline.weights_of is None},
}

MEANINGS = {
    SHIPPED_DRAFT: "Sparrow, this package's default: a glimpse of 64 visual rows",
    "paper": "Sparrow as published: all visual rows in training, none in use",
    "no-bridge": "Sparrow without IVSB: never sees a visual row",
    "no-mtp": "Sparrow trained in one pass, without MTP",
    "no-window": "Sparrow without VATA: all visual rows, in training and in use",
    TEXT_ONLY: "a language model of the same shape that reads no target states",
    "msd": "MSD-like: all projected visual rows",
    "vispec": "ViSpec-like: the video squeezed into one row and one vector",
    "hivis": "HiViS-like: text rows only, a learned correction per step",
}


def record_clips(target_folder: Path, work: Path) -> None:
    """Has the target caption and read the training clips, for drafts of its middle layer and of its projector."""
    target, processor = load_target(target_folder)
    seeds = TRAIN_SEEDS[-CLIPS:]
    record(target, processor, seeds, work / "recording" / "train", projected=work / "recording" / "projected")


def train_sibling(family: Family, work: Path) -> None:
    """Trains the small target that drafts for the large one in transformers' assisted generation."""
    folder = work / "drafts" / SIBLING
    if not (folder / PROVENANCE_FILE).exists():
        Pretraining(folder, SEED, family, SIBLING_DEPTH, SHIPPED[family.name] / "target").run()


def folders_of(family: Family, work: Path) -> dict[str, Path]:
    """Folder of every contender, and of the sibling; where a `PROVENANCE.json` lies, it is finished."""
    folders = {name: work / "drafts" / name for name in (*CONTENDERS, SIBLING)}
    return folders | {SHIPPED_DRAFT: SHIPPED[family.name] / "draft"}


def is_finished(folder: Path, steps: int, target_sha256: str) -> bool:
    """Whether a draft of this target, trained for so many steps, lies in a folder."""
    made = folder / PROVENANCE_FILE
    if not made.exists():
        return False
    provenance = json.loads(made.read_text())
    return (provenance["target_sha256"], provenance["steps"]) == (target_sha256, steps)


def train_contender(target_folder: Path, work: Path, name: str, steps: int) -> None:
    """Trains one contender on one thread, from its last checkpoint if there is one, and saves it."""
    torch.set_num_threads(1)
    contender, folder = CONTENDERS[name], work / "drafts" / name
    target, _ = load_target(target_folder)
    draft = build_draft(target, SEED, name == TEXT_ONLY, contender.draft_class, **contender.draft)
    recording = work / "recording" / ("projected" if draft.config.visual_bridge_layer == 0 else "train")
    rows = RecordedDataset(recording, draft)
    trainer = build_trainer(
        draft, rows, None, folder, max_steps=steps, seed=SEED, disable_tqdm=True, **contender.training
    )
    train(trainer)
    draft.save_pretrained(folder)
    provenance = {
        "contender": name,
        "steps": steps,
        "seed": SEED,
        "clips": CLIPS,
        "training": contender.training,
        "commit": commit(),
        "target_sha256": target_digest(target),
    }
    # Last, and at once: where it lies, the draft is whole.
    unfinished = folder / f"{PROVENANCE_FILE}.partial"
    unfinished.write_text(json.dumps(provenance, indent=1) + "\n")
    os.replace(unfinished, folder / PROVENANCE_FILE)
