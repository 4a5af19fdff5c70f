"""What all verbs share: exit codes, help texts, loading, and errors printed as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import typer
from rich.console import Console
from rich.text import Text

from ..errors import SparrowError, TargetLoadError

NOT_IDENTICAL, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0."""

FAMILY_HELP = "The built-in models to use: qwen2.5-vl (the default) or llava-onevision."
FPS_HELP = "Maximum number of frames per second to read of a video."
MAX_FRAMES_HELP = "Maximum number of frames to read of a video."
PROCESSOR_HELP = "Processor of --target, if it is in another folder or Hub repository."
DTYPE_HELP = "Dtype of the target."
DEVICE_HELP = "Device of the target, such as cpu, cuda or cuda:1; auto spreads it over all GPUs."
ON_BAD_ROW_HELP = "What to do with a row that cannot be used: stop (refuse), or leave it out (skip)."


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Prints an error that a user can mend as one red sentence, and ends without a traceback on Ctrl-C."""
    try:
        yield
    except (SparrowError, OSError) as error:
        Console(stderr=True).print(Text(f"Error: {error}", style="bold red"), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        raise typer.Exit(INTERRUPTED) from None


def quiet_transformers() -> None:
    """Turns off transformers' progress bars and its log lines below errors: a command prints its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class OnBadRow(StrEnum):
    """What to do with a row that cannot be used."""

    refuse = "refuse"
    skip = "skip"


class Dtype(StrEnum):
    """Dtype of a target."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def built_in_family(family: str | None, target: str | None) -> str:
    """The family of the built-in models to use, where no target is named.

    Raises:
        TargetLoadError: Both are named.
    """
    from ..testbed import QWEN2_5_VL

    if family is not None and target is not None:
        raise TargetLoadError("--family chooses built-in models: leave it out beside --target.")
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
