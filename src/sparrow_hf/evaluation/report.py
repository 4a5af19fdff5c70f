"""Rows of a results file as Markdown tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..artifacts import write_text
from ..checksums import read_json
from ..errors import BenchmarkError
from ..markdown import table
from ..measurement import PLAIN
from .results import KEY, merge

INTRODUCTION = """# Results

Written by `sparrow bench` from `{data}`; do not edit by hand.

*plain* is transformers' `generate()` in the same process; every arm answers every prompt, in an order drawn at random.
τ is tokens per target forward after the prefill, pooled over rounds, with a 95 % interval by resampling prompts (if
there are six); k is accepted draft tokens per round. DSR compares seconds per token after the prefill (the draft's
prefill and first tree are inside), ESR whole calls, video encoder and prefill included; both are medians over prompts,
with quartiles. Decoding the video and the processor are outside of both. Draft ms per round is all of the draft's
time, its prefill included, over the rounds. The best baseline is the fastest arm without a draft of this package. A
compiled arm answers every prompt once untimed; what that takes longer than the timed answer is compiling. A sampled
text of transformers' assisted loop (prompt lookup, assistants) is another one than plain's, so there is no identity
and no ESR. A column that is empty could not be measured here.
"""


MMSPEC_INTRODUCTION = """# Results in the form of MMSpec

Written by `sparrow bench --format mmspec` from `{data}`; do not edit by hand.

One prompt at a time (batch size 1). MAT, mean accepted tokens, are the draft tokens that the target accepts per round;
with the target's own token, which Spec-Bench counts too, they are τ, tokens per target forward after the prefill. Both
are pooled over rounds. Speed is the wall-time ratio of Spec-Bench: mean over prompts of tokens per second of the whole
call (video encoder and prefill included; decoding the video and the processor are not), over that of transformers'
plain `generate()` in the same process.
"""


def write_report(data: Path, report: Path, layout: Literal["tables", "mmspec"] = "tables") -> None:
    """Writes the tables of a results file, one section per benchmark, length, temperature and seed.

    Args:
        layout: Our own tables, or those of the MMSpec benchmark.
    """
    introduction, write_section = {
        "tables": (INTRODUCTION, section),
        "mmspec": (MMSPEC_INTRODUCTION, mmspec_section),
    }[layout]
    results = read_json(data, BenchmarkError, "make it again with `sparrow bench`")
    parts = [introduction.format(data=data.as_posix())]
    if results["note"]:
        parts.append(results["note"] + "\n")
    sections: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        key = tuple(row[name] for name in KEY)
        sections.setdefault(key, []).append(row)
    parts += [write_section(rows) for rows in sections.values()]
    parts.append(provenance_section([row["provenance"] for row in results["rows"]]))
    write_text(report, "\n".join(parts))


def section(rows: Sequence[dict[str, Any]]) -> str:
    """The arms of one table: what was accepted, how fast it was, where the time and the memory went."""
    plain = next(row for row in rows if row["arm"] == PLAIN)
    head = heading(plain)
    if "tau" not in plain:
        return head
    rivals = [row for row in rows if row["arm"] != PLAIN]
    best = plain.get("best_baseline", PLAIN)
    return (
        f"{head} Plain `generate()`: {plain['plain_ms_per_token']:.1f} ms per token, and "
        f"{plain['prefill_share']:.0%} of the call for the prefill. Best baseline: {best}.\n\n"
        f"{acceptance_table(rivals)}\n{speed_table(rivals)}"
    )


def mmspec_section(rows: Sequence[dict[str, Any]]) -> str:
    """MAT and speed of every arm in each task, and over all prompts."""
    plain = next(row for row in rows if row["arm"] == PLAIN)
    head = heading(plain)
    if "tau" not in plain:
        return head
    columns = ["method", *(f"{task}: {name}" for task in plain["tasks"] for name in ("MAT", "speed"))]
    return f"{head}\n\n" + table(
        [*columns, "overall: MAT", "overall: τ", "overall: speed"],
        [
            [
                row["arm"],
                *(
                    cell
                    for task in row["tasks"].values()
                    for cell in (f"{task['k']:.2f}", times(task["walltime_ratio"]))
                ),
                f"{row['k']:.2f}",
                f"{row['tau']:.2f}",
                times(row["walltime_ratio"]),
            ]
            for row in rows
        ],
    )


def heading(row: dict[str, Any]) -> str:
    """What one table was measured on."""
    kind = "greedy" if row["temperature"] == 0 else f"T = {row['temperature']:g}, seed {row['seed']}"
    length = "" if row["length"] is None else f"length {row['length']}, "
    head = (
        f"## {row['benchmark']}: {row['family']}, {length}{row['visual_tokens']} visual tokens, {kind}\n\n"
        f"{row['prompts']} prompts of {row['visual_tokens_range'][0]} to {row['visual_tokens_range'][1]} visual tokens"
    )
    if "tau" not in row:
        return head + "; every one was answered with a single token, so there is nothing to compare.\n"
    left_out = f" {row['too_short']} were answered with a single token and are left out." * bool(row["too_short"])
    return f"{head}, {row['output_tokens']:.0f} tokens per answer.{left_out}"


def acceptance_table(rows: Sequence[dict[str, Any]]) -> str:
    """How much of each draft the target took."""
    return table(
        [
            "arm",
            "identical",
            "τ",
            "95 % interval",
            "k",
            "P(k ≥ 1, 2, …)",
            "P(k ≥ j given k ≥ j − 1)",
            "content words",
            "function words",
        ],
        [
            [
                row["arm"],
                "" if row["identical"] is None else f"{row['identical']}/{row['prompts']}",
                f"{row['tau']:.2f}",
                between(row["tau_interval"]),
                f"{row['k']:.2f}",
                numbers(row["per_position"]),
                numbers(row["per_position_conditional"]),
                optional(row["content_acceptance"], ".2f"),
                optional(row["function_acceptance"], ".2f"),
            ]
            for row in rows
        ],
    )


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """How fast each arm was, and what it took."""
    return table(
        [
            "arm",
            "DSR",
            "quartiles",
            "95 % interval",
            "DSR over the best baseline",
            "ESR",
            "quartiles",
            "ms/token",
            "draft, ms/round",
            "verify, ms/round",
            "draft cache rows",
            "extra memory, MB",
            "compiling, s",
        ],
        [
            [
                row["arm"],
                f"{row['dsr']:.2f}",
                between(row["dsr_quartiles"]),
                between(row["dsr_interval"]),
                optional(row.get("dsr_over_best"), ".2f"),
                optional(row["esr"], ".2f"),
                between(row["esr_quartiles"]),
                f"{row['ms_per_token']:.1f}",
                optional(row["draft_ms"], ".1f"),
                optional(row["verify_ms"], ".1f"),
                optional(row["draft_cache_rows"], "d"),
                optional(row["peak_extra_mb"], ".0f"),
                optional(row.get("compile_seconds"), ".0f"),
            ]
            for row in rows
        ],
    )


def provenance_section(provenances: Sequence[dict[str, Any]]) -> str:
    """Where the figures come from."""
    merged = merge(provenances)
    rows = [
        [name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)] for name, value in merged.items()
    ]
    return "## Provenance\n\n" + table(["", ""], rows)


def optional(value: float | None, layout: str) -> str:
    """A number in a layout, or nothing."""
    return "" if value is None else format(value, layout)


def times(ratio: float) -> str:
    """A ratio as `1.23×`."""
    return f"{ratio:.2f}×"


def between(ends: Sequence[float] | None) -> str:
    """Two ends of a range as `1.20 … 3.40`, or nothing."""
    return "" if ends is None else "{:.2f} … {:.2f}".format(*ends)


def numbers(values: Sequence[float]) -> str:
    """Shares as `.93 .85 …`."""
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values)
