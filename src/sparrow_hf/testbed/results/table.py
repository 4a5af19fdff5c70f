"""Looking things up in the rows of docs/data/results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {"qwen2_5_vl": "Qwen2.5-VL", "llava_onevision": "LLaVA-OneVision"}


class Results:
    """Everything measured, with the rows found by family, length and arm.

    Attributes:
        families: Model types, in the order they were measured.
        note, draft_steps, analyses, targets: As in the file.
    """

    def __init__(self, path: Path):
        self.path = path
        data = json.loads(path.read_text())
        self.note: str = data["note"]
        self.rows: list[dict[str, Any]] = data["rows"]
        self.draft_steps: list[dict[str, Any]] = data["draft_steps"]
        self.targets: dict[str, dict[str, float]] = data["targets"]
        self.analyses = {analysis["family"]: analysis for analysis in data["analyses"]}
        self.families = list(dict.fromkeys(row["family"] for row in self.rows))

    def cell(self, family: str, name: str) -> list[dict[str, Any]]:
        """All rows of a cell; none if it was not measured."""
        return [row for row in self.rows if row["family"] == family and row["benchmark"].endswith(f"-{name}")]

    def row(self, family: str, cell: str, arm: str) -> dict[str, Any] | None:
        """The row of one arm; `None` if it was not measured."""
        return next((row for row in self.cell(family, cell) if row["arm"] == arm), None)

    def figure(self, family: str, cell: str, arm: str, name: str) -> float | None:
        """One figure of one arm; `None` if it was not measured."""
        row = self.row(family, cell, arm)
        return None if row is None else row.get(name)

    def lengths(self, family: str) -> list[int]:
        """Visual tokens of the greedy video cells, shortest first."""
        cells = [row["benchmark"] for row in self.rows if row["family"] == family]
        return sorted({int(cell.rsplit("-", 1)[1]) for cell in cells if "-video-" in cell})


def best(rows: Sequence[dict[str, Any]], draft: str) -> dict[str, Any] | None:
    """The row of a draft's fastest tree, its own glimpse as it is."""
    own = [row for row in rows if row["arm"].startswith(f"draft:{draft}@") and "/" not in row["arm"]]
    return max(own, key=lambda row: row["dsr"], default=None)
