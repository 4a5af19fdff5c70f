"""Measures everything that docs/results.md says, and writes it: every table and figure of the paper, on the testbed.

    python -m sparrow_research.results --work DIR --output research/data/results.json --report docs/results.md

For each family: the drafts are trained on the target's own captions, every cell is measured, the target is
analysed. Run the command again to go on where it was stopped. Families share nothing, so two processes may work on one
each (`--families`); whoever writes the results takes all there are. What belongs to a target lies in a folder that has
its digest in the name: another target starts anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparrow_hf.analysis.summary import recommend
from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.testbed import FAMILIES, SHIPPED, shipped
from sparrow_hf.testbed.families import Family
from sparrow_hf.testbed.nano import load_target

from ..processes import run_in_processes
from ..retrain import CLIPS
from .analyses import ANALYSIS_FILE, DRAFT, analyse
from .cells import CELLS, benchmark, pool_cells, pool_shared
from .draft_steps import measure_draft_steps, pool_draft_steps
from .drafts import (
    DRAFTS,
    SHIPPED_DRAFT,
    folders_of,
    is_finished,
    record_clips,
    shipped_steps,
    train_draft,
    train_sibling,
)
from .report import write_report

PARTS = ("train", "measure", "analyse")
TRAINED = [name for name in DRAFTS if name != SHIPPED_DRAFT]


def work_of(family: Family, work: Path) -> Path:
    """The folder of a family's present target."""
    target, _ = load_target(SHIPPED[family.name] / "target")
    return work / f"{family.name}-{tensor_digest(target.state_dict())[:8]}"


def train_all(family: Family, work: Path, names: Sequence[str], processes: int) -> None:
    """Trains the drafts that are not there yet, several at a time."""
    train_sibling(family, work)
    todo = [name for name in names if not is_finished(folders_of(family, work)[name])]
    if not todo:
        return
    record_clips(family, work)
    calls = [(family, work, name) for name in todo]
    for _ in run_in_processes(train_draft, calls, processes, f"{family.name} drafts"):
        pass


def measure_all(family: Family, work: Path, cells: Sequence[str]) -> None:
    """Measures what is missing of the cells of a family, and its draft steps."""
    target_folder, folders = SHIPPED[family.name] / "target", folders_of(family, work)
    for name in cells:
        target, processor = load_target(target_folder)
        cell = benchmark(name, target, processor, folders)
        cell.measure(cell.open_runs(work / "runs"))
    target, processor = load_target(target_folder)
    measure_draft_steps(target, processor, folders[SHIPPED_DRAFT], work / "runs")


def write_results(work: Path, output: Path, note: str | None) -> None:
    """Everything measured so far of the present targets as one JSON file; without a `note` its last one stays."""
    if note is None:
        note = json.loads(output.read_text())["note"] if output.exists() else ""
    results: dict[str, Any] = {"note": note, "rows": [], "shared": [], "draft_steps": [], "families": {}}
    for family in FAMILIES:
        if not (SHIPPED[family.name] / "target").is_dir():
            continue
        folder = work_of(family, work)
        if not (folder / "runs").is_dir():
            continue
        results["rows"] += pool_cells(folder / "runs")
        results["shared"] += pool_shared(folder / "runs")
        results["draft_steps"] += pool_draft_steps(folder / "runs")
        provenance = json.loads((SHIPPED[family.name] / "target" / "PROVENANCE.json").read_text())
        analysis = json.loads((folder / ANALYSIS_FILE).read_text()) if (folder / ANALYSIS_FILE).exists() else None
        if analysis is not None:
            # By today's rule, from the figures that were kept.
            analysis["recommendation"] = vars(recommend(analysis["all"]))
        model_type = json.loads((SHIPPED[family.name] / "target" / "config.json").read_text())["model_type"]
        results["families"][model_type] = {
            "content_accuracy": provenance["content_accuracy_after_bf16_rounding"],
            "clips": provenance["evaluation_clips"],
            "training_steps": shipped_steps(family),
            "analysis": analysis,
        }
    write_json(output, results, indent=1)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the evidence.

    Raises:
        TargetLoadError: The models of a family do not ship with this version.
    """
    parser = argparse.ArgumentParser(description="Train, measure and tell everything in docs/results.md (resumes).")
    parser.add_argument("--work", type=Path, required=True, help="folder of recordings, drafts and single runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--report", type=Path, help="Markdown file; pictures go into `figures` beside it")
    parser.add_argument("--families", nargs="+", choices=SHIPPED, default=list(SHIPPED), help="which families")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to do before writing")
    parser.add_argument(
        "--drafts",
        nargs="+",
        choices=TRAINED,
        default=TRAINED,
        help="which drafts to train beside the shipped one",
    )
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="which cells to measure")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, each on one thread")
    parser.add_argument("--note", help="what readers must know about the circumstances")
    options = parser.parse_args(arguments)

    # So small that a second thread costs more than it computes.
    torch.set_num_threads(1)
    families = [family for family in FAMILIES if family.name in options.families]
    for family in families:
        shipped(family.name)
    if options.parts:
        cells = [CELLS[name] for name in options.cells]
        answers = sum((1 + len(cell.arms)) * cell.prompts * cell.repeats for cell in cells)
        print(
            f"Per family: {CLIPS} captions, a small target, {len(options.drafts)} drafts × "
            f"{shipped_steps(families[0])} steps, {answers} answers and an analysis: three to five hours on one core "
            "of a server CPU, half a GB of recordings. What is there already is not made again.",
            flush=True,
        )
    for family in families:
        work = work_of(family, options.work)
        if "train" in options.parts:
            train_all(family, work, options.drafts, options.processes)
        if "measure" in options.parts:
            measure_all(family, work, options.cells)
        if "analyse" in options.parts:
            folder = folders_of(family, work)[DRAFT]
            analyse(family, folder if is_finished(folder) else None, work)
        write_results(options.work, options.output, options.note)
    if options.report is not None:
        write_report(options.output, options.report)


if __name__ == "__main__":
    main()
