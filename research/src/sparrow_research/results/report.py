"""docs/results.md: the claims, the tables that sum up, the pictures; and beside it every single table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparrow_hf.artifacts import write_text
from sparrow_hf.evaluation.report import between, numbers, optional, provenance_section, section, table

from ..retrain import CLIPS
from .analyses import COMMAND
from .arms import ARMS, DEFAULT, TUNED, TUNED_COMPILED, name_of
from .cells import AS_SHIPPED, BEYOND, GLIMPSE, VIDEO, command
from .claims import OURS, PAPERS, paragraph
from .drafts import MEANINGS
from .figures import draw_all
from .table import NAMES, Results

INTRODUCTION = """# The evidence

Written by `make results` from `{data}`; do not edit by hand. Every single table is in [{tables}]({tables}). The
rivals' weights and each single measurement are kept in `research/data/results`: the command goes on from there, and
makes again what was deleted.

Two tiny targets of the real architectures, trained by this project on a rendered video world, stand in for the paper's
7B ones; clips are real mp4 files through the real processors. *plain* is transformers' `generate()` in the same
process. τ is tokens per target forward, DSR the speed-up of decoding, ESR of whole calls
([benchmark.md](benchmark.md)). Drafts have one layer and learned from the same {clips} captions with the same
optimiser for as many steps ({steps}). Longer clips show the same stories, more slowly and with more idle stretches;
where lengths are compared, it is on the clips that all of them have. DSR leaves out what happens before the first
token: the target's prefill, and that of transformers' assistant. A draft's prefill is inside, and so is the
SpecVLM-like sibling's of the sifted prompt. *Our loop without a draft* tells what of a DSR is not the draft's. All of
this ran on a CPU.{repeats}

*The default* on this page is the recipe of the built-in drafts: the last layer alone, five passes. A new draft reads
four layers, in four passes ([training.md](training.md#feature-layers)).

The claims and pictures are named after what they answer in the paper: its Figures 1, 2, 3, 5 and 6, and its tables of
methods, lengths, temperatures, parts left out, tasks and prefill shares. One cell of the tables alone:
`{cell}`; the analyses alone: `{analysis}`.

| draft | what it is |
| --- | --- |
{meanings}
"""

QUOTED = """## What the paper reports

Quoted, partly from second-hand readings: 7B targets on GPUs, wide trees. Nothing of it was measured here, and nothing
above may be compared with it figure by figure.

| LLaVA-OneVision-7B, L20, 25,000 visual tokens | τ | DSR | ESR |
| --- | --- | --- | --- |
| SpecVLM | 4.07 | 1.41 | 1.24 |
| MSD | 2.69 | 1.74 | 1.46 |
| Sparrow | 3.83 | 2.82 | 1.93 … 1.96 |
| Sparrow, T = 1 | 2.76 | 2.04 | 1.59 |

| DSR, Qwen2.5-VL-7B, A800 | 500 | 1,500 | 17,000 | 25,000 |
| --- | --- | --- | --- | --- |
| MSD | 2.96 | 2.87 | 0.48 | 0.42 |
| ViSpec | 3.22 | 3.10 | 1.64 | 1.48 |
| Sparrow | 3.30 | 3.18 | 1.86 | 1.82 |

| τ of the parts at visual tokens | 500 | 25,000 |
| --- | --- | --- |
| none | 3.95 | 2.95 |
| VATA | 3.95 | 3.86 |
| MTP | 4.44 | 3.51 |
| MTP and IVSB | 4.53 | 1.21 |
| all three | 4.51 | 4.37 |

The prefill's share of a call grows from 13.8 to 38.7 %. τ on pictures: COCO 4.13, SQA 3.86, MME 3.78, MM-Vet 3.82.
"""

#: Picture → what it shows, and which of the paper's it answers.
PICTURES = {
    "tau": "τ by visual length (Figure 1a)",
    "dsr": "DSR by visual length (Figure 1a)",
    "retention": "τ of the MSD-like draft with a share of its visual rows (Figure 1b)",
    "attention": "Where the last instruction token looks (Figure 2)",
    "removal": "What stays if visual rows are hidden from layer x on (Figures 3 and 5)",
    "heads": "Attention that visual rows receive, by layer and head (Figure 5)",
    "similarity": "States and what entered the decoder (Figure 6)",
}
#: Cells of prompts that are not greedy videos → their heads.
OTHERS = {"sampling-400": "T = 1, 400", "sampling-3000": "T = 1, 3000", "pictures": "pictures", "text": "text only"}


def write_report(data: Path, report: Path) -> None:
    """Writes the report, its pictures (folder `figures` beside it) and the file of all tables."""
    results = Results.read(data)
    tables = report.with_name(f"{report.stem}-tables.md")
    meanings = "\n".join(f"| {name} | {meaning} |" for name, meaning in MEANINGS.items())
    steps = " and ".join(sorted({str(family["training_steps"]) for family in results.families.values()}))
    parts = [
        INTRODUCTION.format(
            data=data.as_posix(),
            tables=tables.name,
            clips=CLIPS,
            steps=steps,
            meanings=meanings,
            cell=command("video-400"),
            analysis=COMMAND,
            repeats=repeats(results),
        )
    ]
    if results.note:
        parts.append(results.note + "\n")
    parts.append("## What the paper claims\n\n" + "\n".join(paragraph(claim, results) for claim in PAPERS))
    parts.append("## What this package claims\n\n" + "\n".join(paragraph(claim, results) for claim in OURS))
    for family in results.families:
        parts.append(f"## {NAMES.get(family, family)}\n\n{summary(results, family)}")
    parts.append("## Pictures\n")
    for family, paths in draw_all(results, report.parent / "figures").items():
        parts += [
            f"{PICTURES[path.stem]}{f', {NAMES.get(family, family)}' if family else ''}\n\n"
            f"![{PICTURES[path.stem]}]({Path(os.path.relpath(path, report.parent)).as_posix()})\n"
            for path in paths
        ]
    parts.append(QUOTED)
    parts.append(provenance_section([_brief(row["provenance"]) for row in results.rows]))
    write_text(report, "\n".join(parts))
    write_tables(results, tables)


def repeats(results: Results) -> str:
    """Which cells were measured several times, as a sentence; nothing if none was."""
    repeats = {row["benchmark"]: row["provenance"].get("repeats") for row in results.rows}
    cells = {name: count for name, count in repeats.items() if count is not None}
    if not cells:
        return ""
    named = ", ".join(f"{name} ({count})" for name, count in cells.items())
    return (
        f" In some cells every arm answered each prompt several times, and its median call counts: {named}. "
        "There, arms of transformers' own loop, which cannot start from the shared prefill, answered once."
    )


def _brief(provenance: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from cell to cell: that stands in the file of all tables, and digests in the data."""
    differing = ("arms", "command", "prompts", "draft_sha256", "drafts", "repeats")
    return {name: value for name, value in provenance.items() if name not in differing}


def write_tables(results: Results, path: Path) -> None:
    """Every cell's whole tables."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results.rows:
        cells.setdefault((row["family"], row["benchmark"], row["temperature"], row["seed"]), []).append(row)
    parts = ["# All tables\n\nWritten by `make results`; what the columns mean: [benchmark.md](benchmark.md).\n"]
    parts += [f"{section(rows)}\n`{command(rows[0]['benchmark'])}`\n" for rows in cells.values()]
    write_text(path, "\n".join(parts))


def summary(results: Results, family: str) -> str:
    """One family's tables: greedy on videos by length, other prompts, where the time goes, draft steps."""
    lengths = results.lengths(family)
    right, clips = results.families[family]["content_accuracy"], results.families[family]["clips"]
    trust = ", ".join(f"{share:.2f} at {int(length):,} ({clips[length]} clips)" for length, share in right.items())
    parts = [
        f"Claims of the target's own captions that are right, by visual tokens: {trust}.\n",
        "Greedy, by visual tokens: τ / DSR.\n",
        arms_table(results, family, {f"{VIDEO}{length}": f"{length:,}" for length in lengths}),
    ]
    tuned = results.lengths(family, AS_SHIPPED)
    if tuned:
        parts += [
            "What plain `generate()` can do, and the default as it ships. It drafts a chain of "
            f"{results.shipped_depth(family)}. τ / DSR.\n",
            arms_table(results, family, {f"{AS_SHIPPED}{length}": f"{length:,}" for length in tuned}),
            "The same, over the fastest arm without a draft of this package: DSR over its DSR.\n",
            over_best_table(results, family, tuned),
        ]
    for length in results.lengths(family, BEYOND):
        parts += [
            f"Far more than the target was trained on: τ on the clips that all lengths have, what is kept of it from "
            f"{lengths[0]:,} to {length:,} visual tokens, and DSR and the rows of the draft's cache there.\n",
            beyond_table(results, family, lengths, length),
        ]
    others = [cell for cell in OTHERS if results.cell(family, cell)]
    if others:
        parts += ["Other prompts: τ / DSR.\n", arms_table(results, family, {cell: OTHERS[cell] for cell in others})]
    parts += [
        "How deep the default's chain of 5 is accepted, and what a call consists of.\n",
        phases(results, family),
    ]
    steps = [step for step in results.draft_steps if step["family"] == family]
    if steps:
        parts += ["Growing one tree, in isolation.\n", steps_table(steps)]
    return "\n".join(parts)


def arms_table(results: Results, family: str, cells: Mapping[str, str]) -> str:
    """τ / DSR of every arm, a column per cell (→ its head)."""
    rows = []
    for arm, entry in ARMS.items():
        found = [
            results.row(family, cell, arm) or results.row(family, cell.replace(VIDEO, GLIMPSE), arm) for cell in cells
        ]
        if any(found):
            figures = ["" if row is None else f"{row['tau']:.2f} / {row['dsr']:.2f}" for row in found]
            rows.append([entry.label, *figures])
    prompts = [max((row["prompts"] for row in results.cell(family, cell)), default=0) for cell in cells]
    heads = [f"{head} ({count} prompts)" for head, count in zip(cells.values(), prompts, strict=True)]
    return table(["arm", *heads], rows)


def beyond_table(results: Results, family: str, lengths: Sequence[int], longest: int) -> str:
    """τ of every length and of one far beyond them, of the arms that all of them have."""
    rows = []
    for arm, entry in ARMS.items():
        there, shorter = results.row(family, f"{BEYOND}{longest}", arm), results.by_length(family, arm)
        if there is None or not shorter:
            continue
        taus = [shorter[length]["tau"] for length in lengths] + [there["tau"]]
        kept = f"{taus[-1] / taus[0]:.2f}"
        rows.append(
            [
                entry.label,
                *(f"{tau:.2f}" for tau in taus),
                *(kept, f"{there['dsr']:.2f}", optional(there["draft_cache_rows"], ",d")),
            ]
        )
    return table(["arm", *(f"{length:,}" for length in (*lengths, longest)), "kept", "DSR", "draft cache rows"], rows)


def over_best_table(results: Results, family: str, lengths: Sequence[int]) -> str:
    """What the default as it ships gains over the fastest of plain `generate()`'s ways and prompt lookup."""
    cells = [f"{AS_SHIPPED}{length}" for length in lengths]
    shown = [DEFAULT, TUNED, TUNED_COMPILED]
    rows = [
        [
            ARMS[arm].label,
            *(
                "" if (row := results.row(family, cell, arm)) is None else f"{row['dsr_over_best']:.2f}"
                for cell in cells
            ),
        ]
        for arm in shown
    ]
    fastest = [results.cell(family, cell)[0]["best_baseline"] for cell in cells]
    rows.append(["the fastest without a draft", *map(name_of, fastest)])
    return table(["arm", *(f"{length:,}" for length in lengths)], rows)


def phases(results: Results, family: str) -> str:
    """Acceptance by position and the phases of a call, of the default's chain of 5."""
    rows = []
    for length in results.lengths(family):
        row = results.row(family, f"{VIDEO}{length}", DEFAULT)
        if row is not None:
            taken = row["phase_ms"]
            rows.append(
                [
                    f"{length:,}",
                    f"{row['k']:.2f}",
                    between(row["tau_interval"]),
                    numbers(row["per_position"]),
                    f"{optional(row['content_acceptance'], '.2f')} / {optional(row['function_acceptance'], '.2f')}",
                    f"{row['prefill_share']:.0%}",
                    f"{row['esr']:.2f}",
                    " + ".join(optional(taken[name], ".0f") for name in ("prefill", "draft", "verify", "other")),
                    optional(row["draft_cache_rows"], "d"),
                ]
            )
    head = [
        "visual tokens",
        "k",
        "τ, 95 % interval",
        "P(k ≥ 1, 2, …)",
        "content / function words",
        "prefill share of plain",
        "ESR",
    ]
    return table([*head, "prefill + draft + verify + other, ms", "draft cache rows"], rows)


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """Milliseconds per tree by length: the median over clips, and the clips' range."""
    lengths = sorted({step["visual_tokens"] for step in steps})
    trees = dict.fromkeys(step["tree"] for step in steps)
    taken = {
        (step["tree"], step["visual_tokens"]): f"{step['milliseconds']:.2f} "
        f"({between((min(step['per_clip']), max(step['per_clip'])))})"
        for step in steps
    }
    clips = len(steps[0]["per_clip"])
    return table(
        [f"ms per tree ({clips} clips)", *(f"{length:,}" for length in lengths)],
        [[tree, *(taken[tree, length] for length in lengths)] for tree in trees],
    )
