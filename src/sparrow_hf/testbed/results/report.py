"""docs/results.md: the claims, the tables that sum up, the pictures; and beside it every single table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...evaluation.report import numbers, optional, provenance_section, section, table
from ..retrain import CLIPS, STEPS
from .claims import CLAIMS, paragraph
from .contenders import MEANINGS
from .figures import draw_all
from .table import NAMES, Results

INTRODUCTION = """# The evidence

Written by `make results` from `{data}`; do not edit by hand. Every single table is in [{tables}]({tables}).

Two tiny targets of the real architectures, trained by this project on a rendered video world, stand in for the paper's
7B ones; prompts are real mp4 files through the real processors. *plain* is transformers' `generate()` in the same
process. τ is tokens per target forward after the prefill, DSR the speed-up of decoding, ESR of whole calls (see
[benchmark.md](benchmark.md)). All drafts have one layer, the same {clips} captions, optimiser and {steps} steps. Two
visual lengths differ in nothing but how long the same stories last. Figures are CPU ones: where a GPU would change the
picture, it is said.

| draft | what it is |
| --- | --- |
{meanings}

The paper's own figures stand in [method notes of the paper](https://arxiv.org/abs/2602.15318), never beside ours.
"""

#: Arm → its name in the tables that sum up.
ARMS = {
    "none": "our loop without a draft",
    "prompt-lookup": "prompt lookup",
    "assistant:sibling": "a small sibling LM",
    "specvlm:sibling": "SpecVLM-like: the sibling on a sifted prompt",
    "draft:text-only@chain-5": "text-only",
    "draft:msd@chain-5": "MSD-like",
    "draft:msd@chain-5/glimpse=0": "MSD-like, visual rows deleted",
    "draft:vispec@chain-5": "ViSpec-like",
    "draft:hivis@chain-5": "HiViS-like",
    "draft:paper@chain-5": "Sparrow as published",
    "draft:paper@chain-5/glimpse=all": "… without VATA",
    "draft:no-bridge@chain-5": "Sparrow without IVSB",
    "draft:no-bridge@chain-5/glimpse=all": "… and without VATA",
    "draft:no-mtp@chain-5": "Sparrow without MTP",
    "draft:no-window@chain-5": "all middle-layer rows",
    "draft:sparrow@chain-5/glimpse=0": "Sparrow (ours), no glimpse",
    "draft:sparrow@chain-5/glimpse=16": "… glimpse of 16",
    "draft:sparrow@chain-5": "**Sparrow (ours), glimpse of 64**",
    "draft:sparrow@chain-5/glimpse=256": "… glimpse of 256",
    "draft:sparrow@chain-5/glimpse=all": "… all rows",
    "draft:sparrow@chain-7": "**… chain of 7**",
    "draft:sparrow@30-4-8": "… 30-4-8",
    "draft:sparrow@48-5-10": "… 48-5-10",
}
#: Cells of prompts that are not greedy videos → their heads.
OTHERS = {"sampling-400": "T = 1, 400", "sampling-3000": "T = 1, 3000", "pictures": "pictures", "text": "text only"}


def write_report(data: Path, report: Path) -> None:
    """Writes the report, its pictures (folder `figures` beside it) and the file of all tables."""
    results = Results(data)
    tables = report.with_name(f"{report.stem}-tables.md")
    meanings = "\n".join(f"| {name} | {meaning} |" for name, meaning in MEANINGS.items())
    parts = [
        INTRODUCTION.format(data=data.as_posix(), tables=tables.name, clips=CLIPS, steps=STEPS, meanings=meanings)
    ]
    if results.note:
        parts.append(results.note + "\n")
    parts.append("## What the paper claims\n\n" + "\n".join(paragraph(claim, results) for claim in CLAIMS))
    for family in results.families:
        parts.append(f"## {NAMES.get(family, family)}\n\n{summary(results, family)}")
    pictures = draw_all(results, report.parent / "figures")
    parts.append("## Pictures\n")
    for family, paths in pictures.items():
        if family:
            parts.append(f"### {NAMES.get(family, family)}\n")
        parts += [f"![{path.stem}]({Path(os.path.relpath(path, report.parent)).as_posix()})\n" for path in paths]
    parts.append(provenance_section([row["provenance"] for row in results.rows]))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(parts))
    write_tables(results, tables)


def write_tables(results: Results, path: Path) -> None:
    """Every cell's whole tables."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results.rows:
        cells.setdefault((row["benchmark"], row["length"], row["temperature"], row["seed"]), []).append(row)
    parts = ["# All tables\n\nWritten by `make results`; what the columns mean: [benchmark.md](benchmark.md).\n"]
    parts += [section(rows) for rows in cells.values()]
    path.write_text("\n".join(parts))


def summary(results: Results, family: str) -> str:
    """One family's tables: greedy on videos by length, other prompts, where the time goes, draft steps."""
    lengths = results.lengths(family)
    right = results.targets.get(family, {})
    trust = ", ".join(f"{share:.2f} at {int(length):,}" for length, share in right.items())
    cells = [f"video-{length}" for length in lengths]
    heads = [f"{length:,}" for length in lengths]
    parts = [
        f"Claims of the target's own captions that are right, by visual tokens: {trust}.\n",
        "Greedy, by visual tokens: τ / DSR.\n",
        arms_table(results, family, cells, heads),
    ]
    others = [cell for cell in OTHERS if results.cell(family, cell)]
    if others:
        parts += ["Other prompts: τ / DSR.\n", arms_table(results, family, others, [OTHERS[cell] for cell in others])]
    parts += [
        "How deep the default's chain of 5 is accepted, and what a call consists of.\n",
        phases(results, family, cells),
    ]
    steps = [step for step in results.draft_steps if step["family"] == family]
    if steps:
        parts += ["Growing one tree, in isolation.\n", steps_table(steps)]
    return "\n".join(parts)


def arms_table(results: Results, family: str, cells: Sequence[str], heads: Sequence[str]) -> str:
    """τ / DSR of every arm, a column per cell."""
    rows = []
    for arm, name in ARMS.items():
        found = [results.row(family, cell, arm) for cell in cells]
        if any(found):
            rows.append([name, *("" if row is None else f"{row['tau']:.2f} / {row['dsr']:.2f}" for row in found)])
    return table(["arm", *heads], rows)


def phases(results: Results, family: str, cells: Sequence[str]) -> str:
    """Acceptance by position and the phases of a call, of the default."""
    rows = []
    for cell in cells:
        row = results.row(family, cell, "draft:sparrow@chain-5")
        if row is not None:
            taken = row["phase_ms"]
            rows.append(
                [
                    cell.removeprefix("video-"),
                    f"{row['k']:.2f}",
                    numbers(row["per_position"]),
                    f"{optional(row['content_acceptance'], '.2f')} / {optional(row['function_acceptance'], '.2f')}",
                    f"{row['prefill_share']:.0%}",
                    f"{row['esr']:.2f}",
                    " + ".join(optional(taken[name], ".0f") for name in ("prefill", "draft", "verify", "other")),
                    optional(row["draft_cache_rows"], "d"),
                ]
            )
    head = ["visual tokens", "k", "P(k ≥ 1, 2, …)", "content / function words", "prefill share of plain", "ESR"]
    return table([*head, "prefill + draft + verify + other, ms", "draft cache rows"], rows)


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """Milliseconds per tree by length."""
    lengths = sorted({step["visual_tokens"] for step in steps})
    trees = dict.fromkeys(step["tree"] for step in steps)
    taken = {(step["tree"], step["visual_tokens"]): step["milliseconds"] for step in steps}
    return table(
        ["ms per tree", *(f"{length:,}" for length in lengths)],
        [[tree, *(f"{taken[tree, length]:.2f}" for length in lengths)] for tree in trees],
    )
