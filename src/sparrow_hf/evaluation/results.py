"""From single measurements to the rows of a results file: one row per arm, visual length, temperature and seed."""

import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifacts import write_json
from ..checksums import sealed
from ..errors import BenchmarkError
from ..measurement import PLAIN
from ..metrics import Run, acceptance, asked_acceptance, speed, walltime_ratio
from .run_file import RUN_FILE, read_lines

KEY = ("benchmark", "family", "length", "temperature", "seed")
"""Fields of a measurement that are the same for all measurements of one table."""


def refuse_run_files(runs: Path, *outputs: Path | None) -> None:
    """Raises if a file to write is one of those that [`pool_runs`] reads, or would be taken for one.

    Raises:
        BenchmarkError: One is.
    """
    for path in (Path(os.path.realpath(output)) for output in outputs if output is not None):
        if path.parent == runs.resolve() and path.suffix == RUN_FILE:
            raise BenchmarkError(f"{path} would stand among the run files of {runs}: give it another ending or folder")


def write_results(
    runs: Path, output: Path, note: str = "", asked: Mapping[str, Collection[str]] | None = None
) -> list[dict[str, Any]]:
    """Pools all run files of a folder into the JSON file `output`; returns its rows.

    Args:
        note: A remark on the circumstances.
        asked: See [`pool_runs`].

    Raises:
        BenchmarkError: `output` is a run file, or would be taken for one.
    """
    refuse_run_files(runs, output)
    rows = pool_runs(runs, asked)
    write_json(output, sealed({"note": note, "rows": rows}), indent=1)
    return rows


def pool_runs(runs: Path, asked: Mapping[str, Collection[str]] | None = None) -> list[dict[str, Any]]:
    """The rows of all run files of a folder: one per arm, visual length, temperature and seed.

    Args:
        asked: Benchmark → names of its prompts that count; of a benchmark that is not named, all prompts do.
    """
    asked = asked or {}
    rows: list[dict[str, Any]] = []
    for path in sorted(runs.glob(f"*{RUN_FILE}")):
        tables: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for line in read_lines(path):
            if line["benchmark"] not in asked or line["prompt"] in asked[line["benchmark"]]:
                tables.setdefault(tuple(line[name] for name in KEY), []).append(line)
        for lines in tables.values():
            rows += beside_best_baseline([result_row(arm, lines) for arm in lines[0]["runs"]])
    return rows


def beside_best_baseline(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one table, each with its DSR over that of the fastest arm that needs no draft of this package."""
    baselines = {row["arm"]: row["dsr"] for row in rows if row["tree"] is None and "dsr" in row}
    if not baselines:
        return list(rows)
    best = max(baselines, key=baselines.__getitem__)
    told = {"best_baseline": best}
    return [row | told | {"dsr_over_best": row["dsr"] / baselines[best]} if "dsr" in row else row for row in rows]


def result_row(arm: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures of one arm over the prompts of one table.

    A prompt that some arm answered with its first token has no decode speed. It is left out of every figure of every
    arm, `identical` excepted, and counted as `too_short`.

    transformers' own assisted loop draws other random numbers than plain `generate()`: its sampled texts are others,
    so `identical`, `first_differences` and the `esr` of whole calls are `None`. And it prefills for itself where the
    others share a prefill, as compiled arms do: `peak_extra_mb` is `None` there.
    """
    pairs = [(Run(**line["runs"][PLAIN]), Run(**line["runs"][arm])) for line in lines]
    decoded = [all(run["decode_tokens"] for run in line["runs"].values()) for line in lines]
    plain, runs = ([pair[i] for pair, used in zip(pairs, decoded, strict=True) if used] for i in (0, 1))
    visual = [line["visual_tokens"] for line in lines]
    differences = [run.differs_at for _, run in pairs if run.differs_at is not None]
    row: dict[str, Any] = {name: lines[0][name] for name in KEY} | {
        "arm": arm,
        "visual_tokens": round(statistics.median(visual)),
        "visual_tokens_range": [min(visual), max(visual)],
        "tree": lines[0]["arms"][arm]["tree"],
        "glimpse": lines[0]["arms"][arm]["glimpse"],
        "prompts": len(lines),
        "too_short": len(lines) - len(runs),
        "identical": len(lines) - len(differences),
        "first_differences": sorted(differences),
    }
    if runs:
        row |= figures(plain, runs) | phases(runs) | memory(plain, runs)
        tasks = [line.get("task") for line, used in zip(lines, decoded, strict=True) if used]
        row["tasks"] = by_task(tasks, plain, runs)
        row |= {f"{name}_acceptance": share for name, share in asked_acceptance(runs).items()}
    is_stock = runs_stock_loop(arm, [run for _, run in pairs])
    is_compiled = bool(lines[0]["arms"][arm].get("compiled"))
    if is_stock and row["temperature"] > 0:
        row |= dict.fromkeys(("identical", "first_differences", "esr", "esr_quartiles", "esr_from_dsr"))
    if (is_stock or is_compiled) and lines[0]["provenance"]["shared_prefill"]:
        row["peak_extra_mb"] = None
    if is_compiled:
        row["compile_seconds"] = sum(max((run.first_call_seconds or 0.0) - run.seconds, 0.0) for _, run in pairs)
    return row | {"provenance": merge(line["provenance"] for line in lines)}


def is_plain(arm: str) -> bool:
    """Whether an arm is plain `generate()`, however the target runs: its attention is grouped, or it is compiled."""
    return arm.partition("-")[0] == PLAIN


def runs_stock_loop(arm: str, runs: Sequence[Run]) -> bool:
    """Whether transformers' own assisted loop decoded: all but it and plain `generate()` time their phases."""
    return not is_plain(arm) and all(run.verify_seconds is None for run in runs)


def figures(plain: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """Acceptance and speed of an arm, with their spread."""
    taken, faster = acceptance(runs), speed(plain, runs)
    return {
        "output_tokens": statistics.median(run.new_tokens for run in runs),
        "rounds": taken.rounds,
        "tau": taken.tau,
        "tau_interval": taken.tau_interval,
        "k": taken.k,
        "per_position": taken.per_position,
        "per_position_conditional": taken.conditional,
        "histogram": taken.histogram,
        "forwards_per_token": taken.forwards_per_token,
        "dsr": faster.dsr.median,
        "dsr_quartiles": faster.dsr[1:],
        "dsr_per_prompt": faster.dsr_per_prompt,
        "dsr_interval": faster.dsr_interval,
        "esr": faster.esr.median,
        "esr_quartiles": faster.esr[1:],
        "esr_from_dsr": faster.esr_from_dsr,
        "walltime_ratio": walltime_ratio(plain, runs),
        "prefill_share": faster.prefill_share.median,
        "plain_ms_per_token": faster.plain_ms_per_token.median,
        "ms_per_token": faster.ms_per_token.median,
    }


def by_task(tasks: Sequence[str | None], plain: Sequence[Run], runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Acceptance and wall-time ratio on the prompts of each task; those without a task belong to none."""
    found = {}
    for task in sorted({task for task in tasks if task is not None}):
        base, own = ([run for run, its in zip(those, tasks, strict=True) if its == task] for those in (plain, runs))
        taken = acceptance(own)
        found[task] = {
            "prompts": len(own),
            "tau": taken.tau,
            "k": taken.k,
            "walltime_ratio": walltime_ratio(base, own),
        }
    return found


def phases(runs: Sequence[Run]) -> dict[str, Any]:
    """Where the time of a call goes.

    `draft_ms` and `verify_ms` are medians per round, the draft's whole prefill spread over the rounds. `phase_ms` is
    the median call: prefill (video encoder included), draft (its prefill too), verify (target forwards, walk and
    commit), other (the rest of `generate()`). Arms without our loop know only prefill and other.
    """
    own = [run for run in runs if run.draft_seconds is not None and run.verify_seconds is not None]
    calls: dict[str, list[float]] = {
        "prefill": [run.prefill_seconds for run in runs],
        "draft": [run.draft_seconds or 0.0 for run in own],
        "verify": [run.verify_seconds or 0.0 for run in own],
        "other": [run.decode_seconds - (run.draft_seconds or 0.0) - (run.verify_seconds or 0.0) for run in runs],
    }
    return {
        "draft_ms": _median_ms([(run.draft_seconds or 0.0) / run.rounds for run in own]),
        "verify_ms": _median_ms([(run.verify_seconds or 0.0) / run.rounds for run in own]),
        "phase_ms": {name: _median_ms(seconds) for name, seconds in calls.items()},
        "draft_cache_rows": max((run.draft_cache_rows or 0 for run in own), default=None),
    }


def memory(plain: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """Largest peak memory in MB (10⁶ bytes) of a call beyond plain `generate()`'s on the same prompt."""
    extra = [
        run.peak_bytes - base.peak_bytes
        for base, run in zip(plain, runs, strict=True)
        if run.peak_bytes is not None and base.peak_bytes is not None
    ]
    return {"peak_extra_mb": max(extra) / 1e6 if extra else None}


def merge(provenances: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One provenance for several runs; where they differ (a run resumed later, say), all values."""
    merged: dict[str, list[Any]] = {}
    for provenance in provenances:
        for name, value in provenance.items():
            if value not in merged.setdefault(name, []):
                merged[name].append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in merged.items()}


def _median_ms(seconds: Sequence[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None
