"""Files that are checked when they are read back: `digests.sha256` of a folder, and JSON that holds its own digest.

A folder of files that belong together (a recording, answers, a checkpoint of a training) has one line per file in
`digests.sha256`, as `sha256sum -c digests.sha256` reads it. A JSON object that is alone (a measurement, a record of an
analysis) ends with its own digest. Files of earlier versions have neither: they are read, with one warning.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .artifacts import append_line, locked, whole_lines, write_text
from .errors import SparrowError

DIGESTS_FILE = "digests.sha256"
#: Last field of a JSON object that holds its own digest.
SEAL = "sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(folder: Path, files: Iterable[Path]) -> str:
    """One digest of several files: that of the `digests.sha256` that they would have. `folder` may be the one file."""
    known = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    return hashlib.sha256(_lines(known).encode()).hexdigest()


# -- folders ----------------------------------------------------------------------------------------------------------


class Digests:
    """The digests of a folder's files.

    Args:
        folder: The folder; `digests.sha256` is read from it.
        error: The type of the errors.
        remedy: What to do about a file that is not the one that was written, as the end of a sentence.

    Raises:
        SparrowError: `digests.sha256` is damaged.
    """

    def __init__(self, folder: Path, error: type[SparrowError], remedy: str):
        self.folder, self.error, self.remedy = folder, error, remedy
        self.path = folder / DIGESTS_FILE
        #: Name below the folder → digest; `None` if the folder carries no digests.
        self.known: dict[str, str] | None = self._read() if self.path.exists() else None

    def _read(self) -> dict[str, str]:
        known = {}
        for line in whole_lines(self.path):
            found = _LINE.fullmatch(line)
            if found is None:
                raise self.error(f"{self.path} is damaged ({line!r:.80} is no digest and file name): {self.remedy}")
            # A file that was written again is listed again.
            known[found[2]] = found[1]
        return known

    def __contains__(self, path: Path) -> bool:
        """Whether this file was written completely: it is there, and its digest is known."""
        return self.lists(path) and path.is_file()

    def lists(self, path: Path) -> bool:
        """Whether the digest of this file is known."""
        return self.known is not None and self._name(path) in self.known

    def add(self, path: Path) -> None:
        """Appends the digest of a file that was just written. Several processes may do so at once."""
        digest, name = file_digest(path), self._name(path)
        append_line(self.path, f"{digest}  {name}")
        self.known = {} if self.known is None else self.known
        self.known[name] = digest

    def write(self, paths: Iterable[Path]) -> None:
        """Replaces all digests by those of these files, atomically."""
        self.known = {self._name(path): file_digest(path) for path in paths}
        write_text(self.path, _lines(self.known))

    def tidy(self) -> None:
        """Sorts the lines by file and leaves one of each, so that the order of writing makes no difference."""
        with locked(self.folder, exclusive=True):
            self.known = self._read()
            write_text(self.path, _lines(self.known))

    def check(self, path: Path) -> None:
        """Raises the error unless this file is the one that was written; does nothing if there are no digests."""
        if self.known is None:
            return
        if (expected := self.known.get(self._name(path))) is None:
            raise self.error(f"{path} is not in {DIGESTS_FILE}, so it was not written completely: {self.remedy}")
        if not path.is_file():
            raise self.error(f"{path} is missing, although it was written: {self.remedy}")
        found = file_digest(path)
        if found != expected:
            raise self.error(
                f"{path} is not the file that was written (its SHA-256 is {found[:12]}…, {DIGESTS_FILE} says "
                f"{expected[:12]}…): {self.remedy}"
            )

    def check_present(self) -> None:
        """Raises the error if a file that was written is missing. Reads none of them."""
        for name in self.known or ():
            if not (self.folder / name).is_file():
                raise self.error(f"{self.folder / name} is missing, although it was written: {self.remedy}")

    def check_all(self) -> None:
        """Raises the error unless every file that was written is there, as it was written."""
        for name in self.known or ():
            self.check(self.folder / name)

    def warn_without(self) -> None:
        """Warns if the folder carries no digests, unless nothing was written there."""
        if self.known is None and self.folder.is_dir() and any(self.folder.iterdir()):
            warn_without_digest(self.folder)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _lines(known: Mapping[str, str]) -> str:
    return "".join(f"{known[name]}  {name}\n" for name in sorted(known))


def check_written(files: Iterable[str | os.PathLike[str]], error: type[SparrowError], remedy: str) -> None:
    """Checks files of one folder, and all that was written beside them, if the folder carries digests."""
    paths = [Path(file) for file in files]
    for folder in {path.parent for path in paths}:
        digests = Digests(folder, error, remedy)
        digests.check_all()
        for path in paths:
            if digests.known is not None and not digests.lists(path):
                digests.check(path)


def warn_without_digest(path: Path) -> None:
    """Warns that a file or folder was written without digests, so that damage to it cannot be noticed."""
    warnings.warn(
        f"{path} carries no digests, as an earlier version wrote it: it is read unchecked", UserWarning, stacklevel=3
    )


# -- JSON -------------------------------------------------------------------------------------------------------------


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest as the last field, `sha256`."""
    return {**value, SEAL: _json_digest(value)}


def unseal(value: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A JSON object without its digest, and whether it had one.

    Raises:
        ValueError: It is not the object that was written.
    """
    rest = dict(value)
    # The name of the digest can be damaged too.
    name = SEAL if SEAL in rest else next(reversed(rest), None)
    is_digest = name is not None and rest.pop(name) == _json_digest(rest)
    if name == SEAL and is_digest:
        return rest, True
    if name == SEAL or is_digest:
        raise ValueError("it is not what was written: its digest differs")
    return dict(value), False


def read_json(path: str | os.PathLike[str], error: type[SparrowError], remedy: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object; if that has its own digest, it is checked and left out.

    Args:
        path: The file.
        error: The type of the error.
        remedy: What to do about it, as the end of a sentence.

    Raises:
        SparrowError: It is missing, is no JSON object, or is not the object that was written.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object was expected, found {type(found).__name__}")
        return unseal(found)[0]
    except (OSError, ValueError, TypeError, RecursionError) as reason:
        raise error(f"{path} cannot be read ({_short(reason)}): {remedy}") from reason


def _json_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(reason: BaseException) -> str:
    return str(getattr(reason, "strerror", None) or reason).splitlines()[0][:200]
