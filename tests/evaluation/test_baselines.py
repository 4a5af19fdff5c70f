"""The arms that a draft has to beat: plain `generate()` grouped and compiled, and the ratio to the best of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from noise import LENGTH, read
from transformers import CompileConfig, PreTrainedModel
from typer.testing import CliRunner
from untrained import save_models

from sparrow_hf import measurement
from sparrow_hf.cli import app
from sparrow_hf.errors import BenchmarkError, UnavailableArmError
from sparrow_hf.evaluation import Arm, arms, compare, warm_up
from sparrow_hf.evaluation.arms import BASELINES, Arms
from sparrow_hf.evaluation.benchmark import Benchmark, Prompt
from sparrow_hf.evaluation.results import is_plain, pool_runs

SETTINGS = {"max_new_tokens": LENGTH, "do_sample": False}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static caches without compiling, which takes half a minute: what transformers does on a CPU."""
    monkeypatch.setattr(measurement, "compile_config", lambda: None)


@pytest.fixture
def eager_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attention in the place of the grouped one, whether that one is registered or not."""
    monkeypatch.setattr(arms, "GROUPED_ATTENTION", "eager")


def attentions(target: Any) -> tuple[str, str]:
    return target.get_decoder().config._attn_implementation, target.model.visual.config._attn_implementation


def test_an_arm_says_how_the_target_runs(target: Any, eager_instead: None) -> None:
    parser = Arms(target)
    for name, attention, is_compiled in (
        ("plain", None, False),
        ("plain-grouped", "eager", False),
        ("plain-compiled", None, True),
        ("plain-grouped-compiled", "eager", True),
    ):
        arm = parser.arm(name)
        assert (arm.attention, arm.is_compiled, arm.draft) == (attention, is_compiled, None)
        assert is_plain(name) and arm.runs_own_prefill == is_compiled
        with arm.prepared(target) as arguments:
            assert attentions(target) == (attention or "sdpa", "sdpa")
            assert set(arguments) == ({"cache_implementation", "compile_config"} if is_compiled else set())
            if is_compiled:
                assert arguments["compile_config"].to_dict() == CompileConfig().to_dict()
        assert attentions(target) == ("sdpa", "sdpa")
    assert not any(map(is_plain, ("none", "draft/compiled", "prompt-lookup", "assistant:plain")))


def test_the_attention_comes_back_after_an_error(target: Any) -> None:
    with pytest.raises(RuntimeError), Arm("plain-grouped", attention="eager").prepared(target):
        raise RuntimeError
    assert attentions(target) == ("sdpa", "sdpa")


def test_what_cannot_run_is_left_out_with_its_reason(target: Any, draft_folder: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(arms, "GROUPED_ATTENTION", "oak")
    parser = Arms(target, draft_folder)
    found, reasons = parser.parse_available([*BASELINES, "draft@chain-2"])
    assert [arm.name for arm in found] == ["plain-compiled", "prompt-lookup", "draft@chain-2"]
    assert [reason[: reason.index("oak") + 4] for reason in reasons] == [
        f"arm '{name}' cannot run here: Specified `attn_implementation=\"oak\""
        for name in ("plain-grouped", "plain-grouped-compiled")
    ]
    with pytest.raises(UnavailableArmError, match="'plain-grouped' cannot run here"):
        parser.parse(["plain-grouped"])
    # A name that is not understood is an error anywhere.
    with pytest.raises(BenchmarkError, match="unknown arm 'plain-oak'"):
        parser.parse_available(["plain-oak"])


def test_all_write_the_same_text(target: PreTrainedModel, uncompiled: None, eager_instead: None) -> None:
    found = Arms(target).parse(BASELINES)
    runs = compare(target, found, read(target, 4, 0), SETTINGS, shared_prefill=True, repeats=3)
    assert {name: run.differs_at for name, run in runs.items()} == dict.fromkeys(("plain", *BASELINES))
    assert {name for name, run in runs.items() if run.first_call_seconds is not None} == {
        "plain-compiled",
        "plain-grouped-compiled",
    }


def test_compiling_is_never_timed(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    right = measurement.measure

    def measure(target: Any, arm: Arm, *args: Any, **kwargs: Any) -> Any:
        first = arm.name not in [name for name, _ in calls]
        calls.append((arm.name, first))
        run, tokens = right(target, Arm("plain"), *args, **kwargs)
        # The first call of a compiled arm takes a minute longer.
        seconds = run.decode_seconds + 60 * (first and arm.is_compiled)
        return measurement.dataclasses.replace(run, decode_seconds=seconds), tokens

    monkeypatch.setattr(measurement, "measure", measure)
    found = [Arm("plain"), Arm("plain-compiled", is_compiled=True)]
    inputs = read(target, 4, 0)
    warm_up(target, found, inputs, SETTINGS)
    assert [name for name, _ in calls] == ["plain"]
    runs = compare(target, found, inputs, SETTINGS)
    assert [name for name, _ in calls].count("plain-compiled") == 2
    assert runs["plain-compiled"].decode_seconds < 50 < (runs["plain-compiled"].first_call_seconds or 0)


def test_rows_are_compared_with_the_best_baseline(
    target: PreTrainedModel, draft_folder: str, tmp_path: Path, uncompiled: None, eager_instead: None
) -> None:
    found = Arms(target, draft_folder).parse(["none", *BASELINES, "draft@chain-2"])
    prompts = [Prompt(f"noise {seed}", None, partial(read, target, 4, seed)) for seed in (0, 1)]
    bench = Benchmark("tiny", target, found, prompts, max_new_tokens=LENGTH)
    assert bench.conditions["arms"]["plain-grouped-compiled"] == {
        **{"tree": None, "glimpse": None},
        **{"attention": "eager", "compiled": True},
    }
    assert bench.conditions["arms"]["plain"] == {"tree": None, "glimpse": None}
    bench.measure(bench.open_runs(tmp_path))
    # Of two prompts the DSR is the mean of both.
    path = tmp_path / "tiny.jsonl"
    seconds = {"plain": 4.0, "none": 1.0, "plain-compiled": 2.0, "draft@chain-2": 0.5}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["sha256"]
        for name, run in line["runs"].items():
            run |= {"decode_seconds": seconds.get(name, 8.0), "prefill_seconds": 1.0}
            run["first_call_seconds"] = 33.0 if "compiled" in name else None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {row["arm"]: row for row in pool_runs(tmp_path)}
    assert {row["best_baseline"] for row in rows.values()} == {"plain-compiled"}
    assert rows["plain"]["dsr_over_best"] == pytest.approx(0.5)
    assert rows["plain-compiled"]["dsr_over_best"] == 1.0
    # Our loop without a draft is no baseline.
    assert rows["none"]["dsr_over_best"] == pytest.approx(2.0)
    assert rows["draft@chain-2"]["dsr_over_best"] == pytest.approx(4.0)
    assert rows["plain-compiled"]["compile_seconds"] == pytest.approx(2 * (33 - 3))
    assert "compile_seconds" not in rows["plain"]


def test_the_command_adds_them(tmp_path: Path, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "GROUPED_ATTENTION", "oak")
    where = ("--output", tmp_path / "results.json", "--runs", tmp_path / "runs", "--report", tmp_path / "results.md")
    options = ("--testbed", "--visual-tokens", 32, "--limit", 1, "--max-new-tokens", 8, "--device", "cpu")
    command = ["bench", *save_models(tmp_path / "models"), *where, *options, "--arms", "draft@chain-2", "--baselines"]
    result = CliRunner().invoke(app, [*map(str, command)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "left out: arm 'plain-grouped' cannot run here: Specified" in result.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {"plain", "draft@chain-2", "plain-compiled", "prompt-lookup"} <= {row["arm"] for row in rows}
    assert "over best" in result.output and "| DSR over the best baseline |" in (tmp_path / "results.md").read_text()


@pytest.mark.full
def test_compiled_on_a_cpu(target: PreTrainedModel) -> None:
    runs = compare(target, Arms(target).parse(["plain-compiled"]), read(target, 4, 0), SETTINGS)
    run = runs["plain-compiled"]
    assert run.differs_at is None
    assert (run.first_call_seconds or 0) > 2 * run.seconds
