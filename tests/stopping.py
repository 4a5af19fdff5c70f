"""Runs `sparrow` in a process of its own that stops itself at a given moment: killed, interrupted or out of disk.

Moments are counted in changes of files, so that they are the same in every run, however busy the machine is:

    open for writing │ replace │ open │ …      below the folder that is watched
                     ↑ `at=1`: the signal comes here, before the second change

A signal that no Python code sees, in the middle of a write, is that of a limit of a file's size.
"""

import faulthandler
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sparrow_hf.line_file import LineFile

#: On Windows a process cannot send itself signals, and files have no limits.
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and limits")

#: A run takes a few seconds, and a minute on a machine that is very busy.
SECONDS = 240
#: Audit events of Python that change files, besides `open`.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Ended(NamedTuple):
    """How a process ended: its exit code, or minus the number of the signal that killed it; what it printed; and how
    many changes it has made, -1 if it was killed."""

    code: int
    output: str
    changes: int

    @property
    def command(self) -> list[str]:
        """The words after `sparrow` of the command that goes on."""
        return command_in(self.output)


def command_in(output: str) -> list[str]:
    """The words after `sparrow` of the command that the sentence in this output names."""
    sentences = [line for line in output.splitlines() if " with: sparrow " in line]
    assert len(sentences) == 1, output
    return shlex.split(sentences[0].split(" with: sparrow ")[1])


def sparrow(*words: object, **stop: Any) -> Ended:
    """`sparrow WORDS`; further arguments are those of [`in_process`]."""
    return in_process("sparrow_hf.cli:main", *words, **stop)


def in_process(
    function: str,
    *words: object,
    watched: Path | None = None,
    stop: signal.Signals | None = None,
    at: int = 0,
    largest_file: int | None = None,
    dies: bool = False,
) -> Ended:
    """Runs a function in a process of its own. One that hangs is killed, and the test fails.

    Args:
        function: `module:name`. It is called without arguments.
        words: Its `sys.argv[1:]`.
        watched: The folder whose changes are counted.
        stop: The process sends itself this signal...
        at: ... after so many changes.
        largest_file: Bytes; a longer file cannot be written, as on a full disk...
        dies: ... or the process is killed in the middle of that write.
    """
    task = {
        "function": function,
        "watched": None if watched is None else os.path.realpath(watched),
        "stop": stop,
        "at": at,
        "largest_file": largest_file,
        "dies": dies,
    }
    command = [sys.executable, __file__, json.dumps(task), *map(str, words)]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
    except subprocess.TimeoutExpired as hang:
        pytest.fail(f"no end after {SECONDS} s: {' '.join(map(str, words))}\n{(hang.output or b'').decode()}")
    output = ended.stdout.decode()
    # A progress bar may be drawn once more after it.
    counted = re.search(r"^changes: (\d+)$", output, re.MULTILINE)
    return Ended(ended.returncode, output, int(counted[1]) if counted else -1)


@contextmanager
def full_disk(largest_file: int | None) -> Iterator[None]:
    """Within the block no file of this process can grow beyond so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if largest_file is None else largest_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stop_after_lines(number: int, stop: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this process sends itself a signal as soon as a file of lines has so many."""
    append = LineFile.append

    def append_and_stop(file: LineFile, line: dict[str, Any]) -> None:
        append(file, line)
        if lines_in(file.path) == number:
            signal.raise_signal(stop)

    monkeypatch.setattr(LineFile, "append", append_and_stop)


def _be_the_process(task: dict[str, Any], words: list[str]) -> None:
    faulthandler.dump_traceback_later(SECONDS - 20)
    sys.argv = ["sparrow", *words]
    # A process that was started in the background has them ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module, name = task["function"].split(":")
    function = getattr(import_module(module), name)
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if not _is_change(event, arguments) or not _is_below(task["watched"], arguments[0]):
            return
        if changes == task["at"] and task["stop"]:
            number, task["stop"] = task["stop"], None
            signal.raise_signal(number)
        changes += 1

    if task["watched"] is not None:
        sys.addaudithook(count)
    if task["dies"]:
        # Python ignores this signal, and gets an error instead.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    code: Any = 0
    try:
        with full_disk(task["largest_file"]):
            function()
    except SystemExit as end:
        code = end.code
    print(f"\nchanges: {changes}", flush=True)
    sys.exit(code)


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    return event in CHANGES or event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


def _is_below(folder: str, path: Any) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(folder)


def lines_in(path: Path) -> int:
    """Number of whole lines in a file, 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    _be_the_process(json.loads(sys.argv[1]), sys.argv[2:])
