"""The road of docs/language.md: its training sets, its commands, and that what is made is not made again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.training.options import parse_options
from sparrow_research.language import road
from sparrow_research.language.rivals import TEXT_RIVALS
from sparrow_research.language.steps import Step


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one() -> None:
    small, large = list(road.first_answers(3_000)), list(road.first_answers(6_000))
    assert large[: len(small)] == small and len(large) > len(small)
    counts = [len(json.loads(line)["answer_ids"]) for line in small]
    assert sum(counts[:-1]) < 3_000 <= sum(counts)
    assert sum(len(json.loads(line)["answer_ids"]) for line in road.first_answers(10**9)) == max(road.TOKENS)


def steps_of(work: Path) -> list[Step]:
    rows = {name: len(lines) for name, lines in road.kept_answers((1_000, 2_000)).items()}
    return road.plan("target", work, rows, (1_000, 2_000), 40, 16, 5e-4, "cpu", "bfloat16", 2)


def test_answers_are_written_as_they_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_road(tmp_path, monkeypatch)
    written = (tmp_path / "answers-1000" / "answers-00000.jsonl").read_text()
    assert written == "".join(road.first_answers(1000)) and (tmp_path / "answers-validation").is_dir()


def test_every_draft_is_trained_by_the_same_options(tmp_path: Path) -> None:
    trainings = [step for step in steps_of(tmp_path) if "--max-steps" in step.words]
    names = [Path(step.words[step.words.index("--output") + 1]).name for step in trainings]
    assert names == ["sparrow-1000", "sparrow-2000", *(f"{name}-2000" for name in TEXT_RIVALS)]
    for step in trainings:
        options, arguments = parse_options(list(step.words[2:]))
        assert (arguments.max_steps, arguments.warmup_steps, arguments.learning_rate) == (40, 2, 5e-4)
        assert arguments.bf16 and options.target_dtype == "bfloat16"
        # A rival's own passes stay its own.
        assert ("--num-mtp-steps" in step.words) is (step.words[1] not in ("eagle", "text-only", "paper", "one-pass"))
        assert options.copy_last_layer and options.train.startswith(str(tmp_path))
    sets = [step.words[step.words.index("--train") + 1] for step in trainings]
    assert sets == [f"{tmp_path}/recording-{size}" for size in (1000, *[2000] * (1 + len(TEXT_RIVALS)))]


def test_what_is_made_is_left_out_and_a_stopped_training_goes_on(tmp_path: Path) -> None:
    made = tmp_path / "drafts" / "sparrow-1000" / "model.safetensors"
    made.parent.mkdir(parents=True)
    made.touch()
    # One was killed before its first checkpoint, one after it.
    (tmp_path / "drafts" / "hivis-2000" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "drafts" / "eagle-2000" / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    missing = [" ".join(step.words) for step in steps_of(tmp_path) if not step.is_done]
    assert not any("drafts/sparrow-1000 --vocabulary" in words for words in missing)
    resumed = [words for words in missing if words.endswith("--resume")]
    assert len(resumed) == 1 and resumed[0].startswith("sparrow_research.language.rivals eagle ")
    assert "sparrow_research.language.text" in missing[-1]


def run_road(work: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The road with one training set, without the steps themselves."""
    monkeypatch.setattr(road, "run_steps", lambda *_: None)
    road.main(["--target", "target", "--work", str(work), "--tokens", "1000", *options])


def told(work: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in work.glob("drafts/*/trained.json")}


def begin(work: Path, name: str, file: str) -> None:
    """What a training leaves, whole or stopped."""
    made = work / "drafts" / name / file
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text("{}")


WHOLE, STOPPED = "model.safetensors", "checkpoints/checkpoint-4/trainer_state.json"
"""What a training that is done leaves, and one that has a checkpoint."""


def test_beside_a_draft_stands_what_its_training_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_road(tmp_path, monkeypatch, "--steps", "400")
    # Nothing was trained yet.
    run_road(tmp_path, monkeypatch, "--steps", "40", "--batch", "16", "--bf16")
    settings = {"tokens": 1000, "steps": 40, "rows": 16, "learning_rate": 5e-4, "dtype": "bfloat16"}
    settings |= {"vocabulary_of_tokens": 1000}
    assert told(tmp_path) == {f"{name}-1000": settings for name in ("sparrow", *TEXT_RIVALS)}


@pytest.mark.parametrize("file", [WHOLE, STOPPED])
@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("--steps 80", "steps: 40, now 80"),
        ("--batch 4", "rows: 8, now 4"),
        ("--learning-rate 1e-3", "learning_rate: 0.0005, now 0.001"),
        ("--bf16", "dtype: 'float32', now 'bfloat16'"),
        ("--tokens 1000 2000", "vocabulary_of_tokens: 1000, now 2000"),
    ],
)
def test_a_draft_of_other_options_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, option: str, difference: str
) -> None:
    run_road(tmp_path, monkeypatch, "--steps", "40")
    begin(tmp_path, "sparrow-1000", file)
    before = told(tmp_path)
    refused = f"drafts/sparrow-1000 was made differently ({difference}): repeat the options of its training"
    for words in (option.split(), [*option.split(), "--dry-run"]):
        with pytest.raises(TrainingOptionsError, match=re.escape(refused)):
            run_road(tmp_path, monkeypatch, "--steps", "40", *words)
    assert told(tmp_path) == before
    run_road(tmp_path, monkeypatch, "--steps", "40", "--limit", "2")


def test_a_draft_of_an_earlier_version_is_compared_in_what_it_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, "sparrow-1000", WHOLE)
    begin(tmp_path, "eagle-1000", WHOLE)
    earlier = {"tokens": 1000, "steps": 40, "rows": 8}
    (tmp_path / "drafts/sparrow-1000/trained.json").write_text(json.dumps(earlier))
    run_road(tmp_path, monkeypatch, "--steps", "40", "--learning-rate", "1e-3", "--bf16")
    assert told(tmp_path)["sparrow-1000"] == earlier and "eagle-1000" not in told(tmp_path)
    with pytest.raises(TrainingOptionsError, match="steps: 40, now 80"):
        run_road(tmp_path, monkeypatch, "--steps", "80")


def test_a_dry_run_says_what_it_takes(tmp_path: Path, capsys) -> None:
    road.main(["--target", "target", "--work", str(tmp_path), "--tokens", "1000", "--dry-run"])
    assert not any(tmp_path.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("hours on one CPU thread, about") and len(lines) == 2 + 1 + 1 + len(TEXT_RIVALS) + 1 + 1
