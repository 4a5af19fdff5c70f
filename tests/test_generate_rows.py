"""Rows of `sparrow generate`: in every dialect they are called by what they ask, and a malformed one is told."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from untrained import save_models

from sparrow_hf.captioning import Question, read_questions
from sparrow_hf.cli import app
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip

ASKED = {"type": "text", "text": "what is this ?"}
ANSWER = {"role": "assistant", "content": "a ring"}


def plain(video: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "video", "video": video}, ASKED]}]}


def llama_factory(video: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "<video>what is this ?"}, ANSWER], "videos": [video]}


def sharegpt(video: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>what is this ?"}, {"from": "gpt", "value": "a ring"}]
    return {"conversations": turns, "video": video}


def trl(video: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": [{"type": "video"}, ASKED]}], "videos": [video]}


def openai(video: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": video}}, ASKED]}]}


DIALECTS = [plain, llama_factory, sharegpt, trl, openai]
#: Each cannot be understood, in another way.
MALFORMED: dict[str, Any] = {
    "no content": {"messages": [{"role": "user", "content": None}]},
    "a part without a type": {"messages": [{"role": "user", "content": [{"video": "a.mp4"}]}]},
    "a part that is no part": {"messages": [{"role": "user", "content": [["a.mp4"]]}]},
    "an empty name": plain(""),
    "no video": {"messages": [{"role": "user", "content": [{"type": "video"}, ASKED]}]},
    "no turns": {"messages": []},
    "a turn that is none": {"messages": ["what is this ?"]},
    "nothing but an answer": {"messages": [ANSWER]},
    "an unknown role": {"messages": [{"role": "users", "content": "what is this ?"}]},
    "one video too many": llama_factory("a.mp4") | {"videos": ["a.mp4", "b.mp4"]},
    "no rate": plain("a.mp4") | {"fps": "fast"},
    "deep brackets": {"messages": [{"role": "user", "content": [[[[[[[[["a"]]]]]]]]]}]},
    "no object": 7,
    "no conversation": {"prompts": ["what is this ?"]},
}


def questions(folder: Path, *rows: Any) -> list[Question]:
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_questions(str(file)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_row_is_called_by_what_it_asks_in_every_dialect(dialect: Any, tmp_path: Path) -> None:
    asked = questions(tmp_path, *(dialect(name) | {"fps": 2} for name in ("clips/a.mp4", "clips/b.mp4", "/c.mp4")))
    same = questions(tmp_path, *(plain(name) | {"fps": 2} for name in ("clips/a.mp4", "clips/b.mp4", "/c.mp4")))
    assert [question.name for question in asked] == [question.name for question in same]
    assert [question.source for question in asked] == ["clips/a.mp4", "clips/b.mp4", "/c.mp4"]
    # By all that it asks, not by its number.
    digests = {question.name.split(", ")[1] for question in asked}
    digests |= {question.name.split(", ")[1] for question in questions(tmp_path, dialect("/c.mp4"))}
    assert len(digests) == 4


def test_plain_rows_keep_their_names(tmp_path: Path) -> None:
    """Answers that earlier versions wrote are still answers to them, wherever their folder lies."""
    for folder, name in (("here", "clips/a.mp4"), ("there", "clips/a.mp4"), ("there", "/videos/a.mp4")):
        row = plain(name) | {"fps": 2, "max_frames": 8}
        asked = json.dumps([row["messages"], 2, 8])
        (question,) = questions(tmp_path / folder, row)
        assert question.name == f"row 0, {hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def test_a_video_that_is_given_as_bytes_is_named_by_them(tmp_path: Path) -> None:
    first, second = questions(tmp_path, *(plain(f"data:video/mp4;base64,{video}") for video in ("AAAA", "BBBB")))
    assert first.source is second.source is None
    assert first.name.split(", ")[1] != second.name.split(", ")[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return save_models(tmp_path_factory.mktemp("models"))


def generate(rows: Path, models: tuple[object, ...], output: Path) -> Result:
    words = ("generate", rows, *models, "--max-new-tokens", 4, "--output", output)
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_a_folder_of_answers_holds_rows(models: tuple[object, ...], tmp_path: Path) -> None:
    """Neither its digests nor the media that rows gave as bytes are videos of it."""
    clip = make_clip(tmp_path / "clip.mp4", EVALUATION_SEEDS[0], visual_tokens=16)
    packed = base64.b64encode((tmp_path / "clip.mp4").read_bytes()).decode()
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers"
    rows.write_text(
        json.dumps(plain(f"data:video/mp4;base64,{packed}")) + "\n" + json.dumps({"messages": clip.messages})
    )
    words = ("regenerate", *models[:2], "--prompts", rows, "--output", answers, "--max-new-tokens", 4)
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    assert sorted(path.name for path in answers.iterdir()) == [
        "answers-00000.jsonl", "digests.sha256", "media", "provenance.json",
    ]  # fmt: skip
    asked = read_questions(str(answers))
    assert asked.are_rows and asked.left_out == ()
    assert [question.row["messages"][0]["content"][1]["text"] for question in asked] == [
        "what is this ?", "describe this video in detail .",
    ]  # fmt: skip
    assert generate(answers, models, tmp_path / "again.jsonl").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == ["what is this ?", "describe this video in detail ."]


def test_a_malformed_row_gets_one_line_and_the_run_goes_on(models: tuple[object, ...], tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "what is this ?"}]}
    found = questions(tmp_path, *MALFORMED.values(), good)
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    assert len({question.name for question in found}) == len(found)
    first = generate(rows, models, output)
    assert first.exit_code == 3, first.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["name"] for line in lines] == [question.name for question in found]
    for what, line in zip([*MALFORMED, "good"], lines, strict=True):
        assert (line["error"] is None) == (what == "good"), (what, line["error"])
        # The name beside it tells which row it is.
        assert not (line["error"] or "").startswith("row "), line["error"]
        if what == "no conversation":
            assert "a row needs 'messages'" in line["error"] and line["error"].endswith("it has prompts"), line
        assert line["source"] is None and (line["text"] is None) == (what != "good"), what

    # Nothing is left to do, and a row that has changed is not taken for what it was.
    written = output.read_bytes()
    assert generate(rows, models, output).exit_code == 3 and output.read_bytes() == written
    changed = {"messages": [{"role": "user", "content": [{"video": "b.mp4"}]}]}
    questions(tmp_path, *(MALFORMED | {"a part without a type": changed}).values(), good)
    refused = generate(rows, models, output)
    assert refused.exit_code == 2 and "holds answers to other rows, 1 in number" in refused.output
