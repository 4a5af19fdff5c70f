"""The `sparrow` command: one file per verb. Verbs only parse and report; what they do lives in the package.

Nothing here imports what the extra `cli` brings, so that the command can say that it is missing.
"""

import os
import sys
from typing import Any

from .. import signals
from ..errors import MissingDependencyError
from ..extras import require


def main() -> None:
    """What `sparrow` starts: the command line, or one sentence if its packages are not installed."""
    signals.end_at_once()
    for stream in ("stdout", "stderr"):
        # Closed (`>&-`). Otherwise the next file to be opened would get its number, and what C code prints.
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    try:
        require("cli", "The sparrow command")
    except MissingDependencyError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from .commands import app

    try:
        app(prog_name="sparrow")
    except SystemExit as end:
        if end.code in [128 + number for number in signals.NAMES]:
            signals.end_soon(end.code)
        raise
    except signals.STOPS as stop:
        # In the moments in which a verb's handlers are set and removed.
        signals.end(signals.number_of(stop))


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
