"""Files of JSON lines that are appended to as results are made, so that a stopped run can be continued."""

import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from .artifacts import append_line, check_made_alike, write_text
from .checksums import sealed, unseal, warn_without_digest
from .errors import SparrowError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LineFile:
    """JSON lines made with the same settings, each appended and written out as soon as it is made.

    A process that is killed leaves whole lines, and at most half of one, which is removed when the file is opened
    again. Each line ends with its own digest, `sha256`, which is checked when it is read. Only one process at a time
    may have the file open; it is closed at the end of a `with` block.

    Args:
        path: The file. Its folder is made. A device such as `/dev/stdout` is written to and not read.
        conditions: What must be the same for all lines, JSON types; compared with each line's `"provenance"`.
        error: The type of all errors.
        kind: What a line is: "a measurement", …

    Attributes:
        lines: The lines that are in the file.

    Raises:
        SparrowError: Another process has it open, or it holds lines made with other settings, or something else. It
            is left as it is.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], error: type[SparrowError], kind: str):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._error = error
        self._unlock: Callable[[], Any] = lambda: None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise error(f"{path} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            return
        self._lock()
        try:
            self.lines, end = read_whole_lines(path, error, kind)
            for line in self.lines:
                self.check_line(line)
                check_made_alike(path, line["provenance"], conditions, error)
        except BaseException:
            self.close()
            raise
        if end < path.stat().st_size:
            # The half line of a killed process. Cutting it off takes no space, which there may not be.
            os.truncate(path, end)

    def close(self) -> None:
        """Lets other processes write the file."""
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_line(self, line: Mapping[str, Any]) -> None:
        """Further checks of a line that was read, for subclasses."""

    def append(self, line: dict[str, Any]) -> None:
        """Adds one line and writes it out. If that fails, the file is what it was."""
        text = json.dumps(sealed(line))
        if self.path.is_file():
            append_line(self.path, text)
        else:
            with self.path.open("a") as device:
                device.write(text + "\n")
        self.lines.append(line)

    def remove(self, unwanted: Callable[[dict[str, Any]], Any]) -> None:
        """Removes lines."""
        kept = [line for line in self.lines if not unwanted(line)]
        if len(kept) < len(self.lines):
            write_text(self.path, "".join(json.dumps(sealed(line)) + "\n" for line in kept))
            # It is another file now.
            self._lock()
            self.lines = kept

    def _lock(self) -> None:
        if fcntl is None:
            return
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._unlock()
        # A closed file is unlocked, as is that of a killed process.
        self._unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise self._error(
                f"{self.path} is being written by another process: wait for it to end, or choose another file"
            ) from None
        except OSError:
            # Some network file systems have no locks.
            pass


def read_whole_lines(path: Path, error: type[SparrowError], kind: str) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file, without the half line that a running or killed process may have left.

    Args:
        path, error, kind: As for [`LineFile`].

    Returns:
        The lines, without their digests, and how many bytes they take.

    Raises:
        SparrowError: There is something else in the file, or a line is not the one that was written.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    all_sealed = True
    for number, text in enumerate(whole, start=1):
        try:
            line, is_sealed = unseal(json.loads(text))
            line["provenance"].keys()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
            if not lines and b'"provenance"' not in text:
                raise error(_foreign(path, kind)) from reason
            raise error(
                f"line {number} of {path} is not {kind} as it was written: delete this line and run the same command "
                "again, or move the file elsewhere"
            ) from reason
        lines.append(line)
        all_sealed &= is_sealed
    if rest and not lines and not (rest.startswith(b'{"') and not rest.endswith(b"}")):
        # A file that holds nothing of ours may be anything: nothing is cut off from it.
        raise error(_foreign(path, kind))
    if not all_sealed:
        warn_without_digest(path)
    return lines, sum(len(text) + 1 for text in whole)


def _foreign(path: Path, kind: str) -> str:
    return f"the first line of {path} is not {kind}: move the file elsewhere, or choose another one"
