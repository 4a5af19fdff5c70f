"""Single measurements on disk, so that a stopped benchmark can be continued."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import check_made_alike, write_text
from ..errors import BenchmarkError

#: Lengths of the digests in files of earlier versions: half a digest of files, or a commit of the Hub.
EARLIER_DIGITS = (32, 40)


class RunFile:
    """Measurements made under the same conditions, one JSON line for each, appended as soon as they are made.

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
        if path.exists() and not (text := path.read_text()).endswith("\n"):
            # Removes the incomplete line of a killed process, to which the next one would be appended.
            write_text(path, text[: text.rfind("\n") + 1])

    def done(self, **key: Any) -> bool:
        """Whether there is a measurement with these fields."""
        return any(all(line[name] == value for name, value in key.items()) for line in self.lines)

    def append(self, line: dict[str, Any]) -> None:
        """Adds one measurement and writes it out."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file, without the half line that a running or killed process may have left.

    Raises:
        BenchmarkError: A line is not one of a measurement.
    """
    lines = []
    for number, text in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break
        try:
            lines.append(json.loads(text))
            lines[-1]["provenance"]
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"line {number} of {path} is not a measurement: move the file out of the folder of runs, or choose "
                "another one"
            ) from error
    return lines
