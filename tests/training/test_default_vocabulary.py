"""The draft vocabulary of a training that names none."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from untrained import save_target

from sparrow_hf import SparrowDraftModel
from sparrow_hf.cli import app
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip
from sparrow_hf.training import run, vocabulary
from sparrow_hf.training.vocabulary import TargetTokens, default_vocabulary

TOKENS = TargetTokens(vocab_size=12, end_ids=frozenset({9}), visual_ids=frozenset({7, 8}))
TRAIN = [{"answer_ids": [5, 5, 3, 2, 3]}, {"answer_ids": [3, 2, 5, 6]}]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (run, vocabulary):
        monkeypatch.setattr(room, "REDUCED_SIZE", 4)


def test_the_most_frequent_tokens_of_the_training_answers() -> None:
    held_out = [{"answer_ids": [2, 3, 9, 5] * 100 + [6]}]
    ids, told = default_vocabulary(TOKENS, TRAIN, held_out)
    assert ids is not None and ids.tolist() == [2, 3, 5, 9]
    assert told == (
        "The draft proposes 4 of 12 tokens, which cover 99.751% of the held-out answers; --vocabulary full keeps all."
    )


def test_half_of_a_small_vocabulary() -> None:
    ids, _ = default_vocabulary(TargetTokens(6, frozenset({5}), frozenset()), [{"answer_ids": [1, 1, 2, 2]}], None)
    assert ids is not None and ids.tolist() == [1, 2, 5]


def test_what_covers_too_little_is_not_used() -> None:
    ids, told = default_vocabulary(TOKENS, TRAIN, [{"answer_ids": [2, 3, 9, 5] * 100 + [6, 6, 6]}])
    assert ids is None and "cover 99.256% of the held-out answers, and 99.5% are needed" in told
    # Without held-out answers, the training ones must be covered.
    ids, told = default_vocabulary(TOKENS, TRAIN, [{"messages": []}])
    assert ids is None and "cover 88.889% of the training answers" in told


def test_what_cannot_be_counted_keeps_the_whole_vocabulary() -> None:
    for train in (None, [], [{"messages": []}]):
        ids, told = default_vocabulary(TOKENS, train, TRAIN)
        assert ids is None and "no answer_ids that can be counted" in told
    with pytest.raises(TrainingDataError, match="answers of another target"):
        default_vocabulary(TOKENS, [{"answer_ids": [12]}], None)


def test_rows_of_other_kinds_are_not_counted() -> None:
    mixed = [{"messages": []}, *TRAIN, {"answer_ids": None}, {"answer": "text"}]
    held_out = [{"answer": "text"}, {"answer_ids": [2, 3]}]
    assert default_vocabulary(TOKENS, mixed, held_out)[0].tolist() == [2, 3, 5, 9]  # type: ignore[union-attr]


def test_the_command_chooses_and_full_switches_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (run, vocabulary):
        monkeypatch.setattr(room, "REDUCED_SIZE", 100)
    save_target(tmp_path / "target")
    clip = make_clip(tmp_path / "0.mp4", EVALUATION_SEEDS[0], visual_tokens=24)
    row = {"messages": clip.messages, "answer_ids": [*range(200, 220), 2]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def train(output: str, *options: str) -> tuple[str, Any]:
        command: list[object] = ["train", "--target", tmp_path / "target", "--train", tmp_path / "rows.jsonl"]
        command += ["--output", tmp_path / output, "--max-steps", 1, "--use-cpu", "--report-to", "none"]
        command += ["--disable-tqdm", "true", "--num-mtp-steps", 2, "--num-glimpse-tokens", 4, *options]
        result = CliRunner().invoke(app, [*map(str, command)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output, SparrowDraftModel.from_pretrained(tmp_path / output)

    told, draft = train("reduced")
    assert "100 of 384 tokens, which cover 100.000% of the training answers" in told
    assert draft.config.draft_vocab_size == 100 and set(row["answer_ids"]) <= set(draft.draft_to_target.tolist())
    told, draft = train("whole", "--vocabulary", "full")
    assert "proposes" not in told and draft.draft_to_target is None
