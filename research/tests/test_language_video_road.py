"""The road to the video LLM and its draft: its commands, what is left out, and how its figures are pooled."""

import importlib
from pathlib import Path

import pytest

from sparrow_hf.training.options import parse_options
from sparrow_research.language import video
from sparrow_research.language.rivals import RIVALS, VIDEO_RIVALS
from sparrow_research.language.video_check import repeated, shares, summary
from sparrow_research.language.video_tau import pooled, tables


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_reads_what_an_earlier_one_made(tmp_path: Path, device: str) -> None:
    made = {str(tmp_path / "smollm2")}
    for step in video.plan(tmp_path / "smollm2", tmp_path, device):
        words = step.words
        assert hasattr(importlib.import_module(words[0]), "main")
        options = dict(zip(words, words[1:], strict=False))
        read = [
            options[name] for name in ("--smollm2", "--target", "--answers", "--parts", "--train") if name in options
        ]
        read += [options[name] for name in ("--held-out", "--vocabulary", "--draft", "--prompts") if name in options]
        for path in read:
            if not path.isdigit():
                assert any(known.startswith(path) or path.startswith(known) for known in made), (path, words)
        made.add(options["--output"])
        assert step.seconds > 0


def test_every_draft_is_trained_with_options_that_exist(tmp_path: Path) -> None:
    trainings = [each.words for each in video.plan(tmp_path / "text", tmp_path) if "--max-steps" in each.words]
    assert [words[1] for words in trainings] == ["train", *VIDEO_RIVALS]
    for words in trainings:
        rival = RIVALS.get(words[1])
        options, arguments = parse_options([*(rival.options.split() if rival else ()), *words[2:]])
        assert options.copy_last_layer and arguments.max_steps == video.SCALES["cpu"].draft_steps
        assert "--resume" not in words
        # What is common to all comes last, and must not take a rival's own passes away.
        passes = {"eagle-visual": 1, "text-only": 1, "one-pass": 1, "paper": 2}
        assert options.num_mtp_steps == passes.get(words[1], 3)
        checkpoint = Path(options.output) / "checkpoints" / "checkpoint-4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    again = [each.words for each in video.plan(tmp_path / "text", tmp_path) if "--max-steps" in each.words]
    assert all(words[-1] == "--resume" for words in again)


def test_what_is_made_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "tower.safetensors").touch()
    video.main(["--smollm2", "text", "--work", str(tmp_path), "--dry-run"])
    told = capsys.readouterr().out
    assert "video_tower" not in told and "video_training" in told and "hours on one CPU thread" in told
    (tmp_path / "parts" / "adapters.safetensors").touch()
    video.main(["--smollm2", "text", "--work", str(tmp_path), "--dry-run"])
    told = capsys.readouterr().out
    assert "video_answers" not in told and "video_training" not in told and "video_target" in told


@pytest.mark.parametrize(
    ("length", "least", "most"), [(400, 4, 6), (3_000, 40, 96), (13_000, 480, 840), (25_000, 1700, 2600)]
)
def test_a_clip_takes_about_what_it_was_measured_to_take(tmp_path: Path, length: int, least: int, most: int) -> None:
    made = {Path(each.output).name: each.seconds for each in video.plan(tmp_path / "text", tmp_path)}
    seconds = made[f"answers-length-{length}"] + made[f"recording-length-{length}"]
    assert least <= seconds / video.LENGTHS[length] <= most
    # `video_check` reads each of its clips three times, `video_tau` once.
    assert made["check.json"] > 3 * 6 * least / 2 and made["tau.json"] > 6 * least / 2


def test_a_training_takes_about_what_it_was_measured_to_take(tmp_path: Path) -> None:
    made = {Path(each.output).name: each.seconds for each in video.plan(tmp_path / "text", tmp_path, "cuda")}
    assert made["sparrow"] / 60 == pytest.approx(86, abs=5)


def calls(length: int, taus: list[int]) -> list[dict[str, object]]:
    return [
        {"length": length, "seed": seed, "tokens": tau * 10, "accepted": [tau - 1] * 10}
        for seed, tau in enumerate(taus)
    ]


def test_retention_is_of_the_clips_that_both_lengths_have() -> None:
    both = [*calls(400, [2, 2, 2, 2, 2, 2, 9]), *calls(25_000, [1, 1, 1, 1, 1, 1])]
    found = tables(both, 3)
    kept = found["retention"]["25000"]
    assert (kept["clips"], kept["ratio"], tuple(kept["interval"])) == (6, 0.5, (0.5, 0.5))
    assert pooled(both[:7]) == pytest.approx(3.0)
    assert [row["per_position"] for row in found["lengths"]][1] == [0, 0, 0]


def test_the_shares_of_a_length_are_over_all_its_questions() -> None:
    line = {"asked": 400, "rows": 700, "kinds": ["colour", "shape"], "right": [True, False], "blind": [False, False]}
    (row,) = summary([line | {"repeated": 0.5, "named": (2, 1)}, line | {"repeated": 0.0, "named": (1, 0)}])
    assert row["right"] == {"all": 0.5, "colour": 1.0, "shape": 0.0} and row["blind"]["all"] == 0.0
    assert (row["clips"], row["questions"], row["repeated"], row["named"]) == (2, 4, 0.25, [3, 1])
    assert shares(["a"], [True]) == {"all": 1.0, "a": 1.0}
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
