"""The road of docs/language.md: its training sets, its commands, and that what is made is not made again."""

import json
from pathlib import Path

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
    rows = road.unpack(work, (1_000, 2_000))
    return road.plan("target", work, rows, (1_000, 2_000), 40, 16, 5e-4, "cpu", "bfloat16", 2)


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


def test_a_draft_keeps_what_its_training_was(tmp_path: Path) -> None:
    road.describe(tmp_path, steps_of(tmp_path), 40, 16)
    road.describe(tmp_path, steps_of(tmp_path), 80, 8)
    told = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("drafts/*/trained.json")}
    assert told["sparrow-1000"] == {"tokens": 1000, "steps": 40, "rows": 16}
    assert told["eagle-2000"] == {"tokens": 2000, "steps": 40, "rows": 16}
    assert len(told) == 2 + len(TEXT_RIVALS)


def test_a_dry_run_says_what_it_takes(tmp_path: Path, capsys) -> None:
    road.main(["--target", "target", "--work", str(tmp_path), "--tokens", "1000", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("hours on one CPU thread, about") and len(lines) == 2 + 1 + 1 + len(TEXT_RIVALS) + 1 + 1
