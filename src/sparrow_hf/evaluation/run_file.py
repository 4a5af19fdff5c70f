"""Single measurements on disk, so that a stopped benchmark can be continued."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import check_made_alike
from ..errors import BenchmarkError
from ..line_file import LineFile, read_whole_lines

#: Lengths of the digests in files of earlier versions: half a digest of files, or a commit of the Hub.
EARLIER_DIGITS = (32, 40)
KIND = "a measurement"
#: Ending of run files.
RUN_FILE = ".jsonl"


class RunFile(LineFile):
    """Measurements made under the same conditions, one JSON line for each: see [`~sparrow_hf.line_file.LineFile`].

    Each line ends with its own digest, `sha256`, which is checked when it is read.

    Args:
        conditions: What must be the same for all lines, JSON types; compared with each line's `"provenance"`.
        later: Further conditions, which earlier versions did not write: compared where a line names them.

    Raises:
        BenchmarkError: The file holds measurements made under other conditions, or something else.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], later: Mapping[str, Any] | None = None):
        super().__init__(path, conditions, BenchmarkError, KIND)
        try:
            for found in (line["provenance"] for line in self.lines):
                known = {name: value for name, value in (later or {}).items() if name in found}
                check_made_alike(path, found, known, BenchmarkError)
        except BenchmarkError:
            self.close()
            raise

    def check_line(self, line: Mapping[str, Any]) -> None:
        digest = line["provenance"].get("target_sha256")
        if isinstance(digest, str) and len(digest) in EARLIER_DIGITS:
            raise BenchmarkError(
                f"{self.path} was made by an earlier version of this package, which used other digests of weights: "
                "choose another folder, or delete it"
            )

    def done(self, **key: Any) -> bool:
        """Whether there is a measurement with these fields."""
        return any(all(name in line and line[name] == value for name, value in key.items()) for line in self.lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file, without the half line that a running or killed process may have left.

    Raises:
        BenchmarkError: A line is not one of a measurement.
    """
    return read_whole_lines(path, BenchmarkError, KIND)[0]
