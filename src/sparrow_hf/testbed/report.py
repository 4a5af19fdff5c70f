"""Turns single runs of the testbed into the rows of a JSON file, and these into Markdown tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation import Run
from ..evaluation.report import numbers, provenance_section, table
from ..evaluation.results import figures, merge
from ..evaluation.run_file import read_lines

STEP_FILE = "draft-step.jsonl"
PLAIN = "plain"

INTRODUCTION = """# The testbed in figures

Written by `{command}` from `{data}`; do not edit by hand.

Clips come from seeds that neither the target nor the draft was trained on; captions end where the target ends them.
*plain* is transformers' `generate()` in the same process; every arm captions every clip, the order rotates. τ is
tokens per target forward after the prefill, pooled over rounds, with a 95 % interval by resampling clips; k is
accepted draft tokens per round. DSR compares seconds per token after the prefill (the draft's prefill and first tree
are inside), ESR whole calls, video encoder and prefill included; both are medians over clips, with quartiles. Decoding
the video and the processor are outside of both. *none* is our loop without a draft: what of a speed-up is not the
draft's. *text-only* is a draft of the same shape that reads no target states, trained on the same clips for as many
steps.
"""


def write_rows(runs: Path, output: Path, note: str = "") -> None:
    """Pools all runs in a folder into the JSON file `output`: one row per cell and arm, and the draft steps.

    Args:
        note: What a reader must know about the circumstances.
    """
    rows: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for path in sorted(runs.glob("*.jsonl")):
        lines = read_lines(path)
        if path.name == STEP_FILE:
            steps = step_rows(lines)
        elif lines:
            rows += [arm_row(path.stem, arm, lines) for arm in lines[0]["runs"]]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"note": note, "rows": rows, "draft_step": steps}, indent=1) + "\n")


def arm_row(cell: str, arm: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures of one arm in one cell."""
    runs, plain = ([Run(**line["runs"][name]) for line in lines] for name in (arm, PLAIN))
    tree = lines[0]["trees"][arm]
    row: dict[str, Any] = {
        "family": lines[0]["family"],
        "cell": cell,
        "arm": arm,
        "tree": tree,
        "visual_tokens": lines[0]["visual_tokens"],
        "temperature": lines[0]["temperature"],
        "prompts": len(lines),
        "seed": min(line["seed"] for line in lines),
        "identical": sum(run.differs_at is None for run in runs),
    } | figures(plain, runs)
    if tree is not None:
        row |= phases(runs) | draft_cache(runs, lines, tree)
    return row | {"provenance": merge(line["provenance"] for line in lines)}


def phases(runs: Sequence[Run]) -> dict[str, float]:
    """Milliseconds per round of drafting and of verifying, and how much of the decode time they account for."""
    draft = [run.draft_seconds or 0.0 for run in runs]
    verify = [run.verify_seconds or 0.0 for run in runs]
    return {
        "draft_ms": statistics.median(1000 * taken / run.rounds for taken, run in zip(draft, runs, strict=True)),
        "verify_ms": statistics.median(1000 * taken / run.rounds for taken, run in zip(verify, runs, strict=True)),
        "phases_share": (sum(draft) + sum(verify)) / sum(run.decode_seconds for run in runs),
    }


def draft_cache(runs: Sequence[Run], lines: Sequence[dict[str, Any]], tree: Sequence[int]) -> dict[str, int]:
    """The largest draft cache of any run, and how far one ever exceeded text rows, glimpse and tree (0 or less)."""
    _, levels, beam = tree
    excess = []
    for run, line in zip(runs, lines, strict=True):
        text_rows = line["prompt"]["text_rows"] + run.new_tokens - 1
        tree_rows = max(0, levels - 1) * beam
        excess.append((run.draft_cache_rows or 0) - text_rows - line["prompt"]["glimpse_rows"] - tree_rows)
    return {
        "draft_cache_rows": max(run.draft_cache_rows or 0 for run in runs),
        "draft_cache_excess": max(excess),
    }


def step_rows(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds to grow one tree, by visual tokens of the prompt; medians over clips."""
    if not lines:
        return []
    rows = []
    for tree in lines[0]["milliseconds"]:
        lengths = list(lines[0]["milliseconds"][tree])
        short, *_, long = lengths
        rows.append(
            {
                "tree": tree,
                "prompts": len(lines),
                "visual_tokens": [lines[0]["prompts"][length]["visual_tokens"] for length in lengths],
                "draft_rows": [
                    lines[0]["prompts"][length]["text_rows"] + lines[0]["prompts"][length]["glimpse_rows"]
                    for length in lengths
                ],
                "milliseconds": [
                    statistics.median(line["milliseconds"][tree][length] for line in lines) for length in lengths
                ],
                "ratio": statistics.median(
                    line["milliseconds"][tree][long] / line["milliseconds"][tree][short] for line in lines
                ),
                "provenance": merge(line["provenance"] for line in lines),
            }
        )
    return rows


# -- Markdown ---------------------------------------------------------------------------------------------------------


def write_report(data: Path, report: Path) -> None:
    """Writes the tables of a JSON file as Markdown."""
    results = json.loads(data.read_text())
    rows, steps = results["rows"], results["draft_step"]
    command = rows[0]["provenance"]["command"] if rows else steps[0]["provenance"]["command"]
    parts = [INTRODUCTION.format(command=command + " --report " + report.as_posix(), data=data.as_posix())]
    if results["note"]:
        parts.append(results["note"] + "\n")
    for cell in dict.fromkeys(row["cell"] for row in rows):
        parts.append(cell_section(cell, [row for row in rows if row["cell"] == cell]))
    if steps:
        parts.append(step_section(steps))
    parts.append(provenance_section([row["provenance"] for row in (*rows, *steps)]))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(parts))


def cell_section(cell: str, rows: Sequence[dict[str, Any]]) -> str:
    """Acceptance and speed of the arms of one cell."""
    first = rows[0]
    kind = "greedy" if first["temperature"] == 0 else f"sampling at T = {first['temperature']:g}, one seed per clip"
    drafted = [row for row in rows if row["arm"] != PLAIN]
    taken = table(
        [
            "arm",
            "identical",
            "τ",
            "95 % interval",
            "k",
            "P(k ≥ 1, 2, …)",
            "P(k ≥ j given k ≥ j − 1)",
            "forwards/token",
        ],
        [
            [
                row["arm"],
                f"{row['identical']}/{row['prompts']}",
                f"{row['tau']:.2f}",
                "{:.2f} … {:.2f}".format(*row["tau_interval"]),
                f"{row['k']:.2f}",
                numbers(row["per_position"]),
                numbers(row["per_position_conditional"]),
                f"{row['forwards_per_token']:.3f}",
            ]
            for row in drafted
        ],
    )
    faster = table(
        ["arm", "DSR", "quartiles", "ESR", "quartiles", "ms/token", "draft + verify, ms/round", "draft cache rows"],
        [
            [
                row["arm"],
                f"{row['dsr']:.2f}",
                "{:.2f} … {:.2f}".format(*row["dsr_quartiles"]),
                f"{row['esr']:.2f}",
                "{:.2f} … {:.2f}".format(*row["esr_quartiles"]),
                f"{row['ms_per_token']:.1f}",
                f"{row['draft_ms']:.1f} + {row['verify_ms']:.1f}" if "draft_ms" in row else "",
                str(row.get("draft_cache_rows", "")),
            ]
            for row in drafted
        ],
    )
    return (
        f"## {cell}: {first['visual_tokens']} visual tokens, {kind}\n\n"
        f"{first['prompts']} clips from seed {first['seed']} on, {first['output_tokens']:.0f} tokens per caption. "
        f"Plain `generate()`: {first['plain_ms_per_token']:.1f} ms per token, and {first['prefill_share']:.0%} of the "
        f"call for the prefill.\n\n{taken}\n{faster}"
    )


def step_section(steps: Sequence[dict[str, Any]]) -> str:
    """How long growing one tree takes on its own."""
    rows = [
        [
            step["tree"],
            str(visual),
            str(kept),
            f"{taken:.2f}",
            f"{taken / step['milliseconds'][0]:.3f}",
        ]
        for step in steps
        for visual, kept, taken in zip(step["visual_tokens"], step["draft_rows"], step["milliseconds"], strict=True)
    ]
    return (
        "## The draft step alone\n\n"
        f"Growing one tree after a real prefill; medians over {steps[0]['prompts']} clips, each rendered at both "
        "lengths, which take turns.\n\n"
        + table(["tree", "visual tokens", "rows the draft keeps", "ms per tree", "relative"], rows)
    )
