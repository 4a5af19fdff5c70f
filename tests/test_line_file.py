"""Lines of JSON in a file that one process writes."""

from pathlib import Path

import pytest

from sparrow_hf import line_file


def test_one_file_has_one_writer(tmp_path: Path) -> None:
    class Taken(line_file.SparrowError):
        pass

    first = line_file.LineFile(tmp_path / "lines.jsonl", {}, Taken, "a line")
    with pytest.raises(Taken, match="is being written by another process"):
        line_file.LineFile(tmp_path / "lines.jsonl", {}, Taken, "a line")
    first.append({"n": 1, "provenance": {}})
    first.append({"n": 2, "provenance": {}})
    first.remove(lambda line: line["n"] == 1)
    with pytest.raises(Taken, match="is being written by another process"):
        line_file.LineFile(tmp_path / "lines.jsonl", {}, Taken, "a line")
    del first
    assert [line["n"] for line in line_file.LineFile(tmp_path / "lines.jsonl", {}, Taken, "a line").lines] == [2]
