"""`sparrow bench` from the command line, on an untrained target."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from untrained import save_models

from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.checksums import SEAL, sealed
from sparrow_hf.cli import app
from sparrow_hf.generation.emission import TokenEmitter
from sparrow_hf.measurement import Arm
from sparrow_hf.testbed.nano import load_target
from sparrow_hf.testbed.world import make_clip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options that name an untrained target and its draft."""
    return [*save_models(tmp_path_factory.mktemp("models")), "--device", "cpu", "--max-new-tokens", 8]


def bench(folder: Path, *arguments: object) -> Result:
    where = ("--output", folder / "results.json", "--runs", folder / "runs", "--report", folder / "results.md")
    command = ["bench", *map(str, where), *map(str, arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["rows"]


def test_clips_of_the_testbed(models: list[Any], tmp_path: Path):
    options = [*models, "--testbed", "--visual-tokens", 40, "--visual-tokens", 32, "--limit", 1, "--shared-prefill"]
    arms = ["--arms", "none", "--arms", "draft@chain-2/glimpse=0"]
    result = bench(tmp_path, *options, *arms, "--temperatures", 0, "--temperatures", 1, "--seeds", 3)
    assert result.exit_code == 0, result.output
    assert "2 prompts × 2 temperatures and seeds × 3 arms; to do: 12 calls of up to 8 tokens" in result.output
    rows = read_rows(tmp_path)
    assert [(row["visual_tokens"], row["temperature"]) for row in rows[::3]] == [(32, 0), (32, 1), (40, 0), (40, 1)]
    assert {row["seed"] for row in rows} == {3}
    assert rows[2]["content_acceptance"] is not None or rows[2]["function_acceptance"] is not None
    assert "draft@chain-2/glimpse=0" in result.output and "1/1" in result.output
    assert "## bench: qwen2_5_vl, length 32, 32 visual tokens, greedy" in (tmp_path / "results.md").read_text()

    # As in a recording of the target, and as in the draft's own configuration.
    target = load_target(models[1])[0].state_dict()
    draft = json.loads((models[3] / "config.json").read_text())["tensors_sha256"]
    told = {(row["provenance"]["target_sha256"], *row["provenance"]["draft_sha256"]) for row in rows}
    assert told == {(tensor_digest(target), draft)}

    again = bench(tmp_path, *options, *arms, "--temperatures", 0, "--temperatures", 1, "--seeds", 3)
    assert "to do: 0 calls" in again.output
    thrice = bench(tmp_path, *options, *arms, "--arms", "prompt-lookup", "--repeats", 3, "--name", "thrice")
    # Prompt lookup cannot start from the shared prefill: once for each prompt.
    assert "2 prompts × 1 temperatures and seeds × 4 arms × 3 repeats; to do: 20 calls" in thrice.output
    assert {row["provenance"]["repeats"] for row in read_rows(tmp_path) if row["benchmark"] == "thrice"} == {3}
    other = bench(tmp_path, *options, "--arms", "none")
    assert other.exit_code == 2 and "made differently (arms." in " ".join(other.output.split())


def test_rows_of_ones_own_and_a_wrong_token(models: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_clip(tmp_path / "clip.mp4", 1, 32)
    content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "describe this video ."}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    right = TokenEmitter.choose
    monkeypatch.setattr(TokenEmitter, "choose", lambda self, *args: (right(self, *args) + 1) % 300)
    result = bench(tmp_path, *models, "--prompts", prompts, "--max-frames", 8, "--arms", "none")
    assert result.exit_code == 1, result.output
    assert "0/1" in result.output
    for changed in (["--fps", 2], ["--split", "train"], ["--processor", models[1]]):
        name = changed[0].removeprefix("--")
        result = bench(tmp_path, *models, "--prompts", prompts, "--max-frames", 8, "--arms", "none", *changed)
        assert result.exit_code == 2 and f"made differently ({name}: None, now" in " ".join(result.output.split())


def test_only_prompts_that_are_asked_count(models: list[object], tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"

    def ask(*questions: str, limit: int, differs: int = 0) -> str:
        rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = bench(tmp_path, *models, "--prompts", prompts, "--limit", limit, "--arms", "none")
        assert result.exit_code == differs, result.output
        found = [(row["arm"], row["prompts"], row["identical"]) for row in read_rows(tmp_path)]
        right = min(limit, len(questions))
        assert found == [("plain", right, right), ("none", right, right - differs)]
        return " ".join(result.output.split())

    assert "to do: 2 calls" in ask("red ?", "green ?", "blue ?", limit=1)
    # A limit that grows goes on from what is measured.
    told = ask("red ?", "green ?", "blue ?", limit=3)
    assert "to do: 4 calls" in told and "not count" not in told
    told = ask("red ?", "green ?", "blue ?", limit=2)
    assert "to do: 0 calls" in told and "which do not count: 1" in told
    # Nor do prompts that were edited.
    told = ask("red ?", "grey ?", limit=3)
    assert "to do: 2 calls" in told and "which do not count: 2" in told
    told = ask("red ?", "green ?", "blue ?", limit=3)
    assert "to do: 0 calls" in told and "which do not count: 1" in told

    # The text of a prompt that is not asked is no fault of this command.
    path = tmp_path / "runs" / "bench.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[2])
    as_if_different(path, "none")
    path.write_text("".join(lines[:2]) + path.read_text() + "".join(lines[3:]))
    ask("red ?", "green ?", limit=3)
    ask("red ?", "green ?", "blue ?", limit=3, differs=1)

    # Of other benchmarks in the folder, all that was measured counts.
    result = bench(tmp_path, *models, "--prompts", prompts, "--limit", 1, "--arms", "none", "--name", "other")
    assert result.exit_code == 0, result.output
    assert [(row["benchmark"], row["prompts"]) for row in read_rows(tmp_path)] == [
        *[("bench", 4)] * 2, *[("other", 1)] * 2
    ]  # fmt: skip


def test_the_form_of_mmspec(models: list[object], tmp_path: Path):
    make_clip(tmp_path / "clip.mp4", 1, 32)
    video = {"type": "video", "video": "clip.mp4"}
    asked = [("describe this video .", {"task": "caption"}), ("what moves ?", {"task": "mo|tion"}), ("what ?", {})]
    rows = [
        {"messages": [{"role": "user", "content": [video, {"type": "text", "text": text}]}]} | task
        for text, task in asked
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = bench(tmp_path, *models, "--prompts", prompts, "--arms", "none", "--format", "mmspec")
    assert result.exit_code == 0, result.output
    found = read_rows(tmp_path)
    assert [(row["arm"], row["temperature"]) for row in found] == [
        ("plain", 0),
        ("none", 0),
        ("plain", 1),
        ("none", 1),
    ]
    for row in found:
        # The prompt without a task counts among all prompts only.
        assert {task: figures["prompts"] for task, figures in row["tasks"].items()} == {"caption": 1, "mo|tion": 1}
        assert (row["prompts"], row["tau"], row["k"]) == (3, 1, 0)
    report = (tmp_path / "results.md").read_text()
    head = r"| method | caption: MAT | caption: speed | mo\|tion: MAT | mo\|tion: speed "
    assert report.count(head + "| overall: MAT | overall: τ | overall: speed |") == 2
    assert report.count("| plain | 0.00 | 1.00× | 0.00 | 1.00× | 0.00 | 1.00 | 1.00× |") == 2
    assert "greedy" in report and "T = 1, seed 0" in report

    where = ("--output", tmp_path / "results.json", "--runs", tmp_path / "runs")
    result = CliRunner().invoke(app, ["bench", *map(str, where), "--testbed", "--format", "mmspec"])
    assert (result.exit_code, "name its file with --report" in result.output) == (2, True)


def test_a_sampled_text_of_transformers_own_loop_is_no_wrong_one(models: list[object], tmp_path: Path):
    options = [*models, "--testbed", "--visual-tokens", 32, "--limit", 1, "--temperatures", 1]
    for arm, code in (("prompt-lookup", 0), ("none", 1)):
        command = (*options, "--name", arm, "--arms", arm)
        assert bench(tmp_path, *command).exit_code == 0
        as_if_different(tmp_path / "runs" / f"{arm}.jsonl", arm)
        result = bench(tmp_path, *command)
        assert (result.exit_code, "to do: 0 calls" in result.output) == (code, True), result.output


def as_if_different(path: Path, arm: str) -> None:
    """The run file of one measured prompt as if a token of this arm had differed."""
    line = json.loads(path.read_text())
    line["runs"][arm]["differs_at"] = 3
    line = sealed({name: value for name, value in line.items() if name != SEAL})
    path.write_text(json.dumps(line) + "\n")


def test_only_arms_of_this_benchmark_that_round_alike_count(
    models: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Compiling takes long, and who rounds how is not the matter here.
    monkeypatch.setattr(Arm, "prepared", lambda self, target: nullcontext({}))
    options = [*models, "--testbed", "--visual-tokens", 32, "--limit", 1]
    for arm, code in (("draft/compiled", 0), ("plain-grouped", 0), ("draft", 1)):
        command = (*options, "--name", arm.replace("/", "-"), "--arms", arm)
        assert bench(tmp_path / arm, *command).exit_code == 0
        as_if_different(next((tmp_path / arm / "runs").glob("*.jsonl")), arm)
        assert bench(tmp_path / arm, *command).exit_code == code
    # A benchmark in the same folder has texts that differ, which is not the fault of this one.
    assert bench(tmp_path / "draft", *options, "--name", "other", "--arms", "draft").exit_code == 0
    assert {row["benchmark"] for row in read_rows(tmp_path / "draft")} == {"draft", "other"}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([], "either --testbed, or --prompts"),
        (["--testbed", "--prompts", "rows.jsonl"], "either --testbed, or --prompts"),
        (["--testbed", "--family", "qwen2.5-vl"], "leave it out beside --target"),
        (["--testbed", "--max-frames", "4"], "leave out --max-frames"),
        (["--testbed", "--split", "test"], "leave out --max-frames, --fps and --split"),
        (["--prompts", "mlvu:copy", "--split", "test"], "has no splits to choose from, found 'test'"),
        (["--prompts", "rows.jsonl", "--visual-tokens", "400"], "--visual-tokens is an option of --testbed"),
        (["--prompts", "mlvu:nowhere"], "download MLVU/MVLU"),
        (["--testbed", "--arms", "oak"], "unknown arm 'oak'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(wrong: list[str], sentence: str, models: list[object], tmp_path: Path):
    result = bench(tmp_path, *models, *wrong)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--output", "--report"])
@pytest.mark.parametrize("name", ["runs/bench.jsonl", "runs/other.jsonl", "link/bench.jsonl"])
def test_measurements_are_not_replaced_by_what_is_computed_from_them(option: str, name: str, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    (tmp_path / "runs" / "bench.jsonl").write_text("measured")
    result = bench(tmp_path, "--testbed", option, tmp_path / name)
    assert result.exit_code == 2 and "would stand among the run files of" in " ".join(result.output.split())
    assert [path.read_text() for path in (tmp_path / "runs").iterdir()] == ["measured"]
