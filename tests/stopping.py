"""Runs `sparrow` in a child that is killed, interrupted or out of disk, and the command that its last sentence names.

The child is a fork: it needs no time to import, and its limits are its own.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sparrow_hf.cli import app

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="stops a forked process")


class Ended(NamedTuple):
    """How a child ended: its exit code, or minus the number of the signal that killed it; and what it printed."""

    code: int
    output: str

    @property
    def command(self) -> list[str]:
        """The words after `sparrow` of the command that goes on."""
        sentences = [line for line in self.output.splitlines() if " with: sparrow " in line]
        assert len(sentences) == 1, self.output
        return shlex.split(sentences[0].split(" with: sparrow ")[1])


def sparrow(
    *arguments: object,
    stop: signal.Signals | None = None,
    when: Callable[[], Any] = lambda: True,
    largest_file: int | None = None,
) -> Ended:
    """`sparrow ARGUMENTS` in a child.

    Args:
        stop: A signal that is sent to it...
        when: ... as soon as this is true.
        largest_file: Bytes; a longer file cannot be written, as on a full disk.
    """
    words = [str(argument) for argument in arguments]
    return in_child(lambda: app(words, prog_name="sparrow"), stop=stop, when=when, largest_file=largest_file)


def in_child(
    work: Callable[[], Any],
    *,
    stop: signal.Signals | None = None,
    when: Callable[[], Any] = lambda: True,
    largest_file: int | None = None,
) -> Ended:
    """As [`sparrow`], for any function."""
    # A pipe, which no limit of files ends.
    printed, written = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(work, written, largest_file)
    os.close(written)
    pieces: list[bytes] = []
    with os.fdopen(printed, "rb") as pipe:
        reader = threading.Thread(target=lambda: pieces.append(pipe.read()))
        reader.start()
        ended = (0, 0)
        while stop is not None and ended == (0, 0):
            if when():
                os.kill(child, stop)
                break
            time.sleep(0.002)
            ended = os.waitpid(child, os.WNOHANG)
        status = ended[1] if ended[0] else os.waitpid(child, 0)[1]
        reader.join()
    return Ended(os.waitstatus_to_exitcode(status), b"".join(pieces).decode())


def _be_the_child(work: Callable[[], Any], printed: int, largest_file: int | None) -> None:
    code = 1
    try:
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The threads of a pool do not survive a fork.
        torch.set_num_threads(1)
        if largest_file is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"Traceback: {error!r}")
    finally:
        sys.stdout.flush()
        os._exit(code)


def lines_in(path: Path) -> int:
    """Number of lines in a file, 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
