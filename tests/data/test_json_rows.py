"""Rows from JSON files: whatever a line holds, the others are read and the process lives."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sparrow_hf.captioning import read_questions
from sparrow_hf.data import load_rows
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.training import SparrowDataCollator, refuse_shared_media
from sparrow_hf.training.checkpoints import digest_of_rows

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a dot"}]}
#: Lines that are no rows → what is said of them.
BAD_LINES = {
    b"null": "no JSON object, found None",
    b"3": "no JSON object, found 3",
    b'"messages"': "no JSON object, found 'messages'",
    b"[1, 2]": "no JSON object, found a list of 2",
    b'{"messages": [}': "JSONDecodeError",
    b'{"messages": "\xff"}': "UnicodeDecodeError",
    b"[" * 2000 + b"]" * 2000: "RecursionError",
    b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}": "RecursionError",
    b'{"id": ' + b"9" * 5000 + b"}": "ValueError",
}


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b"", b"\n \n", *(line + b"\n" for line in BAD_LINES), *BAD_LINES])
def test_a_file_without_one_good_row_is_refused(tmp_path: Path, content: bytes, streaming: bool) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(TrainingDataError, match=r"has no rows|is no JSON object") as caught:
        load_rows(tmp_path / "rows.jsonl", streaming=streaming)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_line_is_a_bad_row(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(GOOD, b"", *BAD_LINES, GOOD | {"id": 9}))
    rows = list(load_rows(path, streaming=streaming))
    assert [row["row_index"] for row in rows] == list(range(len(BAD_LINES) + 2)) and rows[-1]["id"] == 9
    processor = build_processor()
    batch = SparrowDataCollator(processor, on_bad_row="skip")([*rows, None, [1]])
    assert len(batch["samples"]) == 2
    assert [index for index, _ in batch["skipped"]] == [*range(1, len(BAD_LINES) + 1), None, None]
    for number, (reason, (index, said)) in enumerate(zip(BAD_LINES.values(), batch["skipped"], strict=False)):
        assert said.startswith(f"row {index}: line {number + 3} of {path}") and reason in said and len(said) < 400
    assert batch["skipped"][-1][1] == "a row must be a dictionary, found a list of 1"
    with pytest.raises(TrainingDataError, match="row 1: line 3 of .*found None"):
        SparrowDataCollator(processor)(rows)
    refuse_shared_media(rows, [*rows[1:-1], None])


def test_rows_may_differ_in_keys_and_types(tmp_path: Path) -> None:
    part = {"type": "text", "text": "what \u2028?"}
    rows = [GOOD | {"fps": 2}, {"messages": [{"role": "user", "content": [part]}]}, GOOD | {"fps": "2", "extra": [1]}]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    placed = {"row_folder": str(tmp_path)}
    expected = [row | {"row_index": index} | placed for index, row in enumerate(rows)]
    assert list(load_rows(tmp_path / "rows.jsonl")) == expected
    (tmp_path / "rows.json").write_text(json.dumps([*rows, None], indent=2, ensure_ascii=False))
    for streaming in (False, True):
        found = list(load_rows(tmp_path / "rows.json", streaming=streaming))
        assert found[:3] == expected and "entry 3" in found[3]["row_error"]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(*rows)))
    assert list(load_rows(tmp_path / "rows.jsonl.gz")) == expected


def test_a_folder_of_files_and_a_part_of_it(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(*(GOOD | {"id": 2 * number + each} for each in range(2))))
    assert [row["id"] for row in load_rows(tmp_path)] == list(range(6))
    assert [row["id"] for row in load_rows(tmp_path, streaming=True)] == list(range(6))
    assert [row["id"] for row in load_rows(tmp_path, split="train[1:3]+train[5:]")] == [1, 2, 5]
    with pytest.raises(TrainingDataError, match="has no rows"):
        load_rows(tmp_path, split="train[:0]")
    with pytest.raises(TrainingDataError, match="no splits but 'train'"):
        load_rows(tmp_path, split="train[:2]", streaming=True)


def test_a_compressed_file_is_decompressed_as_often_however_many_rows_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened, right = tmp_path / "rows.jsonl.gz", [], gzip.open
    path.write_bytes(gzip.compress(lines(*(GOOD | {"id": number} for number in range(100)))))
    monkeypatch.setattr(gzip, "open", lambda *args: (opened.append(args), right(*args))[1])
    rows = load_rows(path)
    assert [rows[index]["id"] for index in reversed(range(100))] == [*reversed(range(100))]
    assert 1 <= len(opened) <= 2


def test_json_files_of_a_folder_are_read_where_they_are_alone(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.json").write_text(json.dumps([GOOD | {"id": number}]))
    assert [row["id"] for row in load_rows(tmp_path)] == [0, 1]
    assert [row["id"] for row in load_rows(tmp_path, streaming=True)] == [0, 1]
    assert [question.row["id"] for question in read_questions(str(tmp_path))] == [0, 1]
    before = digest_of_rows(tmp_path)
    (tmp_path / "1.json").write_text(json.dumps([GOOD | {"id": 5}]))
    assert digest_of_rows(tmp_path) != before
    # Beside rows they describe them, as the `provenance.json` of answers does.
    (tmp_path / "rows.jsonl").write_bytes(lines(GOOD | {"id": 9}))
    assert [row["id"] for row in load_rows(tmp_path)] == [9]
    with pytest.raises(TrainingDataError, match=r"needs a column 'messages'; it has dtype"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "provenance.json").write_text('{"dtype": "float32"}')
        load_rows(tmp_path / "other")


def test_every_column_of_turns_counts(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "a dot"}]
    (tmp_path / "rows.jsonl").write_bytes(lines({"text": "x"}, {"conversations": turns}))
    assert load_rows(tmp_path / "rows.jsonl")[1]["conversations"] == turns
    (tmp_path / "rows.jsonl").write_bytes(lines({"prompt": "what ?", "completion": "a dot"}))
    with pytest.raises(TrainingDataError, match="needs a column 'messages'; it has prompt, completion"):
        load_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "ROWS.JSONL"])
def test_a_file_of_rows_is_one_by_every_spelling_of_its_name(tmp_path: Path, name: str) -> None:
    content = lines(GOOD, GOOD)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for source in (tmp_path, tmp_path / name):
        assert read_questions(str(source)).are_rows and len(load_rows(source)) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            json.dumps([GOOD, GOOD], indent=1)[:-2] + ",\n]",
            r"is no JSON \(.*line 2\d column 1 .*\): mend it, or write one",
        ),
        (
            "\n" + json.dumps(GOOD, indent=1),
            "is one JSON value over several lines: write one object per line, or a list",
        ),
        ("null\n[1]\n", "line 1 of .* is no JSON object, found None"),
        ('{"messages": [}\n{"messages": [}\n', "line 1 of .* is no JSON object"),
    ],
)
def test_json_over_several_lines_is_told_as_a_whole(tmp_path: Path, content: str, told: str, streaming: bool) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(TrainingDataError, match=told):
        load_rows(tmp_path / "rows.json", streaming=streaming)
