"""Tables in Markdown, of reports and model cards."""

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table; a `|` within a cell does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
