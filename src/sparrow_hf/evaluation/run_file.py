"""Single measurements on disk, so that a stopped benchmark can be continued."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import append_line, check_made_alike, drop_half_line, whole_lines
from ..checksums import sealed, unseal, warn_without_digest
from ..errors import BenchmarkError

#: Lengths of the digests in files of earlier versions: half a digest of files, or a commit of the Hub.
EARLIER_DIGITS = (32, 40)


class RunFile:
    """Measurements made under the same conditions, one JSON line for each, appended as soon as they are made.

    Each line ends with its own digest, `sha256`, which is checked when it is read.

    Args:
        conditions: What must be the same for all lines, JSON types; compared with each line's `"provenance"`.

    Raises:
        BenchmarkError: The file holds measurements made under other conditions, or something else.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = read_lines(path) if path.exists() else []
        for line in self.lines:
            digest = line["provenance"].get("target_sha256")
            if isinstance(digest, str) and len(digest) in EARLIER_DIGITS:
                raise BenchmarkError(
                    f"{path} was made by an earlier version of this package, which used other digests of weights: "
                    "choose another folder, or delete it"
                )
            check_made_alike(path, line["provenance"], conditions, BenchmarkError)
        drop_half_line(path)

    def done(self, **key: Any) -> bool:
        """Whether there is a measurement with these fields."""
        return any(all(name in line and line[name] == value for name, value in key.items()) for line in self.lines)

    def append(self, line: dict[str, Any]) -> None:
        """Adds one measurement and writes it out."""
        append_line(self.path, json.dumps(sealed(line)))
        self.lines.append(line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file, without the half line that a running or killed process may have left.

    Raises:
        BenchmarkError: A line is not one of a measurement.
    """
    lines, is_whole = [], True
    for number, text in enumerate(whole_lines(path), start=1):
        try:
            line, has_digest = unseal(json.loads(text))
            line["provenance"].keys()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BenchmarkError(
                f"line {number} of {path} is not a measurement as it was written: delete this line and run the same "
                "command again, or move the file out of the folder of runs"
            ) from error
        lines.append(line)
        is_whole &= has_digest
    if not is_whole:
        warn_without_digest(path)
    return lines
