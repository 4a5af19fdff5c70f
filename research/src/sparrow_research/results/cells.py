"""What `make results` measures: cells of arms (see `arms.py`) that answer the same prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.evaluation.arms import Arms
from sparrow_hf.evaluation.benchmark import Benchmark, Prompt
from sparrow_hf.evaluation.results import pool_runs, result_row
from sparrow_hf.evaluation.run_file import read_lines
from sparrow_hf.measurement import NO_DRAFT
from sparrow_hf.testbed.benchmark_prompts import clip_prompts, says_what_it_shows
from sparrow_hf.testbed.captions import STYLES

from .arms import (
    ALL_ROWS,
    ARMS,
    BLIND,
    DEFAULT,
    HIVIS,
    MSD,
    MSD_BLIND,
    NO_VATA,
    PAPER,
    PLAIN_GROUPED,
    PROMPT_LOOKUP,
    TUNED,
    VISPEC,
    Role,
    arms_of,
)
from .drafts import SHIPPED_DRAFT, is_finished
from .prompts import picture_prompts, text_prompts

MAX_NEW_TOKENS = 320

_DEFAULT = arms_of(Role.DEFAULT)
_TUNED = (NO_DRAFT, *arms_of(Role.BASELINE), PROMPT_LOOKUP, DEFAULT, *arms_of(Role.TUNED))
# Compiled arms and prompt lookup take prefills of their own, which would be nearly all of the time.
_TUNED_LONG = (NO_DRAFT, PLAIN_GROUPED, DEFAULT, TUNED)
_ALL = tuple(arm for arm in ARMS if arm not in arms_of(Role.BASELINE, Role.TUNED))
_LONG = (*arms_of(Role.CONTROL, Role.RIVAL, Role.RECIPE, Role.DEFAULT), BLIND)
# Likewise: no arm with a prefill of its own.
_LONGEST = (
    *(NO_DRAFT, PLAIN_GROUPED, "draft:text-only@chain-5", MSD, MSD_BLIND, VISPEC, HIVIS),
    *(PAPER, NO_VATA, ALL_ROWS, BLIND, DEFAULT, TUNED),
)
_OTHER_GLIMPSES = tuple(arm for arm in arms_of(Role.GLIMPSE) if arm != BLIND)
_FEW = (NO_DRAFT, PROMPT_LOOKUP, *_DEFAULT, PAPER, MSD, VISPEC)


@dataclass(frozen=True)
class Cell:
    """Arms that answer the same prompts.

    Attributes:
        arms: Beside plain `generate()`, which always takes part.
        prompts: How many.
        visual_tokens: Of a clip; `None` where the prompts show none.
        kind: `clip`, `picture` or `text`.
        temperature: 0 is greedy.
        dtype: What target and drafts compute in.
        repeats: How often each arm answers each prompt; its median call counts.
    """

    arms: tuple[str, ...]
    prompts: int
    visual_tokens: int | None = None
    kind: str = "clip"
    temperature: float = 0.0
    dtype: str = "float32"
    repeats: int = 1


CELLS: dict[str, Cell] = {
    "video-400": Cell(_ALL, 16, 400),
    # So few prompts that one slow moment of the machine would show.
    "video-3000": Cell(_ALL, 8, 3000, repeats=3),
    "video-13000": Cell(_LONG, 4, 13_000, repeats=3),
    "video-25000": Cell(_LONG, 4, 25_000, repeats=3),
    # What the long cells leave out of the sizes of a glimpse.
    "glimpse-13000": Cell(_OTHER_GLIMPSES, 4, 13_000, repeats=3),
    "glimpse-25000": Cell(_OTHER_GLIMPSES, 4, 25_000, repeats=3),
    "tuned-400": Cell(_TUNED, 16, 400),
    "tuned-3000": Cell(_TUNED, 16, 3000),
    "tuned-13000": Cell(_TUNED_LONG, 16, 13_000),
    "tuned-25000": Cell(_TUNED_LONG, 8, 25_000),
    # Nearly as many rows as the targets have positions, and five times what they were trained on.
    "beyond-64000": Cell(_LONGEST, 4, 64_000),
    "sampling-400": Cell(_FEW, 16, 400, temperature=1.0),
    "sampling-3000": Cell(_FEW, 8, 3000, temperature=1.0, repeats=3),
    "pictures": Cell(_FEW, 16, kind="picture"),
    "text": Cell(_FEW, len(STYLES) * 2, kind="text"),
    "bfloat16-400": Cell((NO_DRAFT, *_DEFAULT), 16, 400, dtype="bfloat16"),
}
VIDEO, GLIMPSE, AS_SHIPPED, BEYOND = "video-", "glimpse-", "tuned-", "beyond-"
"""Cells of greedy answers about clips are called so; the same stories come first in all of them."""


def command(name: str) -> str:
    """What measures a cell."""
    return f"python -m sparrow_research.results --work DIR --output research/data/results.json --cells {name}"


def is_ready(arm: str, folders: Mapping[str, Path]) -> bool:
    """Whether the draft that an arm names, if it names one, is finished."""
    named = re.match(r"(?:draft|assistant|specvlm):([\w-]+)", arm)
    return named is None or is_finished(folders[named[1]])


def benchmark(name: str, target: Any, processor: Any, folders: Mapping[str, Path]) -> Benchmark:
    """A cell, ready to be measured. Arms whose draft is not finished are left out.

    Args:
        name: Of the cell.
        target, processor: In fp32; brought to the cell's dtype.
        folders: Short name → folder of every draft.
    """
    cell = CELLS[name]
    # Before the cell's dtype makes another digest of the same target.
    target_sha256 = tensor_digest(target.state_dict())
    target = target.to(getattr(torch, cell.dtype))
    arms = Arms(target, str(folders[SHIPPED_DRAFT]), {name: str(folder) for name, folder in folders.items()})
    return Benchmark(
        name,
        target,
        arms.parse(arm for arm in cell.arms if is_ready(arm, folders)),
        prompts_of(cell, target, processor),
        [cell.temperature],
        max_new_tokens=MAX_NEW_TOKENS,
        # Whoever prefills for himself is the only one to pay for a video that takes longer than all the rest.
        shared_prefill=cell.visual_tokens is not None and cell.visual_tokens >= 3000,
        repeats=cell.repeats,
        is_content=says_what_it_shows(processor),
        command=command(name),
        conditions={
            "target_sha256": target_sha256,
            "draft_sha256": sorted(arms.weights.values()),
            "prompts": cell.kind,
            "dtype": cell.dtype,
        },
    )


def prompts_of(cell: Cell, target: Any, processor: Any) -> Sequence[Prompt]:
    """The prompts of a cell; none of them was trained on."""
    if cell.kind == "picture":
        return picture_prompts(processor, cell.prompts)
    if cell.kind == "text":
        return text_prompts(processor, cell.prompts)
    assert cell.visual_tokens is not None
    return clip_prompts(target, processor, cell.prompts, [cell.visual_tokens])


def pool_cells(runs: Path) -> list[dict[str, Any]]:
    """The rows of all cells; what is there of an arm that had nothing to decode is left out."""
    return [row for row in pool_runs(runs) if row["benchmark"] in CELLS and "tau" in row]


def pool_shared(runs: Path) -> list[dict[str, Any]]:
    """Arms of the greedy video cells over the clips that all lengths have: what lengths are to be compared on."""
    cells = {
        CELLS[path.stem].visual_tokens: read_lines(path)
        for path in sorted(runs.glob(f"{VIDEO}*.jsonl"))
        if path.stem in CELLS
    }
    if not cells:
        return []
    shared = set.intersection(*({line["prompt"] for line in lines} for lines in cells.values()))
    rows = []
    for length, lines in sorted(cells.items()):
        chosen = [line for line in lines if line["prompt"] in shared]
        rows += [
            {
                name: row[name]
                for name in ("family", "arm", "prompts", "tau", "tau_interval", "dsr", "draft_cache_rows")
            }
            | {"length": length}
            for row in (result_row(arm, chosen) for arm in (chosen[0]["runs"] if chosen else ()))
            if "tau" in row
        ]
    return rows
