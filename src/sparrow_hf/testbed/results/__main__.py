"""Measures everything that docs/results.md says, and writes it: every table and figure of the paper, on the testbed.

    python -m sparrow_hf.testbed.results --work DIR --output docs/data/results.json --report docs/results.md

For each family: the contenders are trained on the target's own captions, every cell is measured, the target is
analysed. Run the command again to go on where it was stopped. Families share nothing, so two processes may work on one
each (`--families`); whoever writes the results takes all there are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...evaluation.results import pool_runs
from ...hub import target_digest
from .. import FAMILIES, SHIPPED
from ..families import Family
from ..nano import load_target
from ..retrain import CLIPS
from .analyses import DRAFT, analyse
from .cells import CELLS, benchmark
from .contenders import (
    CONTENDERS,
    PROVENANCE_FILE,
    SHIPPED_DRAFT,
    folders_of,
    is_finished,
    record_clips,
    train_contender,
    train_sibling,
)
from .draft_steps import measure_draft_steps, pool_draft_steps
from .report import write_report

COMMAND = "python -m sparrow_hf.testbed.results --work DIR --output docs/data/results.json"
PARTS = ("train", "measure", "analyse")
TRAINED = [name for name in CONTENDERS if name != SHIPPED_DRAFT]


def train_all(family: Family, work: Path, names: Sequence[str], processes: int) -> None:
    """Trains the contenders that are not there yet, several at a time, for as many steps as the shipped draft."""
    target_folder, folders = SHIPPED[family.name] / "target", folders_of(family, work)
    target, _ = load_target(target_folder)
    sha256, steps = target_digest(target), shipped_steps(family)
    todo = [name for name in names if not is_finished(folders[name], steps, sha256)]
    if not todo:
        return
    record_clips(target_folder, work)
    # A forked process would inherit the threads of this one's tensors.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(train_contender, target_folder, work, name, steps) for name in todo]
        try:
            for run in tqdm(as_completed(running), desc=f"{family.name} drafts", total=len(running)):
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def shipped_steps(family: Family) -> int:
    """Optimizer steps of the draft that ships."""
    return json.loads((SHIPPED[family.name] / "draft" / PROVENANCE_FILE).read_text())["steps"]


def measure_all(family: Family, work: Path, runs: Path, cells: Sequence[str]) -> None:
    """Measures what is missing of the cells of a family, and its draft steps."""
    target_folder, folders = SHIPPED[family.name] / "target", folders_of(family, work)
    for name in cells:
        target, processor = load_target(target_folder)
        cell = benchmark(family.name, name, target_folder, target, processor, folders, COMMAND)
        cell.measure(cell.open_runs(runs))
    target, processor = load_target(target_folder)
    measure_draft_steps(family.name, target_folder, target, processor, folders[SHIPPED_DRAFT], runs, COMMAND)


def write_results(work: Path, runs: Path, output: Path, note: str) -> None:
    """Everything measured so far as one JSON file."""
    results: dict[str, Any] = {
        "note": note,
        "rows": pool_runs(runs),
        "draft_steps": pool_draft_steps(runs),
        "analyses": [json.loads(path.read_text()) for path in sorted(work.glob("*/*.analysis.json"))],
        "targets": {
            json.loads((folder / "target" / "config.json").read_text())["model_type"]: json.loads(
                (folder / "target" / "PROVENANCE.json").read_text()
            )["content_accuracy_after_bf16_rounding"]
            for folder in SHIPPED.values()
            if (folder / "target" / "PROVENANCE.json").is_file()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the evidence."""
    parser = argparse.ArgumentParser(description="Train, measure and tell everything in docs/results.md (resumes).")
    parser.add_argument("--work", type=Path, required=True, help="folder of recordings, drafts and single runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument(
        "--report", type=Path, help="Markdown file; its figures go into the folder `figures` beside it"
    )
    parser.add_argument("--families", nargs="+", choices=SHIPPED, default=list(SHIPPED), help="which families")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to do before writing")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=TRAINED,
        default=TRAINED,
        help="which drafts to train beside the shipped one",
    )
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="which cells to measure")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, each on one thread")
    parser.add_argument("--note", default="", help="what readers must know about the circumstances")
    options = parser.parse_args(arguments)

    # So small that a second thread costs more than it computes.
    torch.set_num_threads(1)
    runs = options.work / "runs"
    families = [family for family in FAMILIES if family.name in options.families]
    if options.parts:
        answers = sum((1 + len(CELLS[name].arms)) * CELLS[name].prompts for name in options.cells)
        print(
            f"Per family: {CLIPS} captions, a small target, {len(options.contenders)} drafts × "
            f"{shipped_steps(families[0])} steps, {answers} answers and an analysis: about four hours on one core of "
            "a server CPU, 1 GB of recordings.",
            flush=True,
        )
    for family in families:
        work = options.work / family.name
        if "train" in options.parts:
            train_sibling(family, work)
            train_all(family, work, options.contenders, options.processes)
        if "measure" in options.parts:
            measure_all(family, work, runs, options.cells)
        if "analyse" in options.parts:
            analyse(family, folders_of(family, work)[DRAFT], work, COMMAND)
    write_results(options.work, runs, options.output, options.note)
    if options.report is not None:
        write_report(options.output, options.report)


if __name__ == "__main__":
    main()
