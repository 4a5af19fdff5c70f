"""What all verbs share: exit codes, and errors told as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import typer
from rich.console import Console
from rich.text import Text

from ..errors import SparrowError, TargetLoadError

NOT_IDENTICAL, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0."""

FAMILY_HELP = "Which built-in models: qwen2.5-vl (the default) or llava-onevision."


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


def quiet_transformers() -> None:
    """No progress bars of loading and no log lines below errors: a command tells by itself what it does."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class OnBadRow(StrEnum):
    """What to do with a row that cannot be used."""

    refuse = "refuse"
    skip = "skip"


class Dtype(StrEnum):
    """What a target computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def built_in_family(family: str | None, target: str | None) -> str:
    """The family whose built-in models are meant, where no target is named.

    Raises:
        TargetLoadError: Both are named.
    """
    from ..testbed import QWEN2_5_VL

    if family is not None and target is not None:
        raise TargetLoadError("--family is which built-in models: leave it out beside --target.")
    return family or QWEN2_5_VL.name


def size(num_bytes: float) -> str:
    """A size on disk, for people: 10⁹ bytes are a GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def report_skipped(console: Console, skipped: dict[int, str], rows: int) -> None:
    """Names every row that was left out, with its reason, and how many they are."""
    for _, reason in sorted(skipped.items()):
        console.print(Text(f"left out {reason}", style="yellow"), soft_wrap=True)
    if skipped:
        console.print(f"{len(skipped)} of {rows} rows left out.")
