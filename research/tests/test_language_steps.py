"""The steps of a road: their order, several at a time, and what a failure leaves."""

import subprocess
import time
from pathlib import Path

import pytest

from sparrow_research.language import road, video
from sparrow_research.language.steps import Step, run_steps

MODULE = """
import sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--fails" in words:
    sys.exit(3)
read = [Path(words[name]) for name in ("--reads", "--more") if name in words]
assert all(path.exists() for path in read), read
start = time.monotonic()
time.sleep(float(words.get("--seconds", 0.2)))
Path(words["--output"]).write_text(f"{start} {time.monotonic()}")
print("wrote", words["--output"])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "one_step.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def step(folder: Path, name: str, *words: str) -> Step:
    return Step(("one_step", "--output", str(folder / name), *words), None, 1.0)


def times(folder: Path, name: str) -> list[float]:
    return [float(each) for each in (folder / name).read_text().split()]


def test_steps_wait_for_what_they_read_and_for_nothing_else(folder: Path) -> None:
    steps = [
        step(folder, "a", "--seconds", "0.8"),
        step(folder, "b", "--reads", f"{folder}/a"),
        step(folder, "c", "--seconds", "0.8"),
        step(folder, "d", "--reads", f"{folder}/b", "--more", f"{folder}/c"),
    ]
    run_steps(steps, 3, folder / "logs")
    a, b, c, d = (times(folder, name) for name in "abcd")
    assert a[1] <= b[0] and max(b[1], c[1]) <= d[0]
    assert c[0] < a[1]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == [
        "00-a.log",
        "01-b.log",
        "02-c.log",
        "03-d.log",
    ]
    assert "wrote" in (folder / "logs" / "03-d.log").read_text()
    run_steps([step(folder, "e"), step(folder, "f")], 1, folder / "none")
    assert times(folder, "e")[1] <= times(folder, "f")[0] and not (folder / "none").exists()


def test_a_failure_stops_what_runs_and_starts_nothing(folder: Path) -> None:
    steps = [
        step(folder, "slow", "--seconds", "60"),
        step(folder, "bad", "--fails", "yes"),
        step(folder, "after", "--reads", f"{folder}/bad"),
    ]
    start = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run_steps(steps, 2, folder / "logs")
    assert raised.value.returncode == 3 and time.monotonic() - start < 30
    assert not (folder / "slow").exists() and not (folder / "after").exists()


def test_the_roads_know_what_each_step_reads(tmp_path: Path) -> None:
    rows = {name: len(lines) for name, lines in road.kept_answers((1_000, 2_000)).items()}
    text = road.plan("target", tmp_path, rows, (1_000, 2_000), 40, 16, 5e-4, "cpu", "float32", 2)
    names = [Path(each.output).name for each in text]

    def read(steps: list[Step], name: str) -> set[str]:
        every = [Path(each.output).name for each in steps]
        mine = steps[every.index(name)]
        return {Path(each.output).name for each in steps[: every.index(name)] if mine.reads(each)}

    assert read(text, "sparrow-1000") == {"recording-1000", "recording-validation", "vocabulary-2000.safetensors"}
    assert read(text, "text.json") >= {name for name in names if name.startswith(("sparrow", "eagle", "hivis"))}
    assert read(text, "recording-2000") == set()
    steps = video.plan(tmp_path / "smollm2", tmp_path, "cuda")
    assert read(steps, "adapters.safetensors") == {"answers.jsonl", "tower.safetensors"}
    assert read(steps, "check.json") == {"target"}
    assert read(steps, "prompts") == set()
    assert read(steps, "answers-train") == {"target", "prompts"}
    assert read(steps, "recording-length-3000") == {"target", "answers-length-3000"}
    assert read(steps, "bridge") == {"target", "recording-train", "recording-validation", "vocabulary.safetensors"}
    assert read(steps, "tau.json") == {"target", "sparrow"}
