"""The `sparrow` command: one file per verb. Verbs only parse and report; what they do lives in the package.

Nothing here imports what the extra `cli` brings, so that the command can say that it is missing.
"""

import sys
from typing import Any

from ..errors import MissingDependencyError
from ..extras import require


def main() -> None:
    """What `sparrow` starts: the command line, or one sentence if its packages are not installed."""
    try:
        require("cli", "The sparrow command")
    except MissingDependencyError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        from .commands import app

        app(prog_name="sparrow")
    except KeyboardInterrupt:
        # Before the verb began, or when it had ended.
        print("Stopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
