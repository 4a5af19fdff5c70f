"""Looking things up in research/data/results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .arms import TUNED
from .cells import AS_SHIPPED, VIDEO

NAMES = {"qwen2_5_vl": "Qwen2.5-VL", "llava_onevision": "LLaVA-OneVision"}


class Results:
    """Everything measured, with the rows found by family, cell and arm.

    Attributes:
        note, rows, shared, draft_steps: As in the file.
        families: Model type → accuracy of the target's captions, steps of the drafts, analysis.
    """

    def __init__(self, data: dict[str, Any]):
        self.note: str = data["note"]
        self.rows: list[dict[str, Any]] = data["rows"]
        self.shared: list[dict[str, Any]] = data["shared"]
        self.draft_steps: list[dict[str, Any]] = data["draft_steps"]
        self.families: dict[str, dict[str, Any]] = data["families"]

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results of a file."""
        return cls(json.loads(path.read_text()))

    def cell(self, family: str, name: str) -> list[dict[str, Any]]:
        """All rows of a cell; none if it was not measured."""
        return [row for row in self.rows if row["family"] == family and row["benchmark"] == name]

    def row(self, family: str, cell: str, arm: str) -> dict[str, Any] | None:
        """The row of one arm; `None` if it was not measured."""
        return next((row for row in self.cell(family, cell) if row["arm"] == arm), None)

    def lengths(self, family: str, kind: str = VIDEO) -> list[int]:
        """Visual tokens of the greedy video cells, or of those of another kind, shortest first."""
        cells = {row["benchmark"] for row in self.rows if row["family"] == family}
        return sorted(int(cell.removeprefix(kind)) for cell in cells if cell.startswith(kind))

    def shipped_depth(self, family: str) -> int:
        """Tokens of the chain that the default draft has in its configuration, as it was measured."""
        row = self.row(family, f"{AS_SHIPPED}{self.lengths(family, AS_SHIPPED)[0]}", TUNED)
        assert row is not None
        return row["tree"][1]

    def by_length(self, family: str, arm: str) -> dict[int, dict[str, Any]]:
        """Length → the arm's figures over the clips that all lengths share; of arms that all lengths have."""
        rows = {row["length"]: row for row in self.shared if row["family"] == family and row["arm"] == arm}
        return rows if len(rows) > 1 and sorted(rows) == self.lengths(family) else {}

    def analysis(self, family: str) -> dict[str, Any] | None:
        """What `sparrow analyze` found out about the target; `None` if it was not asked."""
        return self.families[family]["analysis"]

    def accuracy(self, family: str, length: int) -> float | None:
        """Share of the target's own claims that are right at a length; `None` if it was not measured."""
        return self.families[family]["content_accuracy"].get(str(length))
