"""What all verbs share: exit codes, and errors told as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from ..errors import SparrowError

NOT_IDENTICAL, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0."""


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Turns what users can get wrong into one red sentence, and Ctrl-C into a quiet end."""
    try:
        yield
    except (SparrowError, OSError) as error:
        Console(stderr=True).print(Text(f"Error: {error}", style="bold red"), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        raise typer.Exit(INTERRUPTED) from None
