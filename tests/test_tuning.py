"""`tune()` on a machine whose costs are known, what it writes, and `sparrow tune` on an untrained target."""

import json
from pathlib import Path
from typing import Any

import pytest
from noise import build_target, read
from rich.console import Console
from transformers import AutoModel, PreTrainedModel
from typer.testing import CliRunner, Result
from untrained import save_models

from sparrow_hf import SparrowDraftModel, TreeShape, tuning
from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.cli import app
from sparrow_hf.cli.tune import costs_table
from sparrow_hf.errors import BenchmarkError, DraftLoadError
from sparrow_hf.measurement import Arm
from sparrow_hf.metrics import Run
from sparrow_hf.tree_shapes import chain
from sparrow_hf.tuning import tune, write_shape

TOKENS, PLAIN, PREFILL = 240, 0.010, 0.030


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target()


@pytest.fixture
def draft(target: PreTrainedModel) -> SparrowDraftModel:
    return SparrowDraftModel.from_target(target, num_glimpse_tokens=4)


def known_run(arm: Arm, right: int, level: float) -> Run:
    """Every round accepts `right` tokens if its tree is that deep. A level costs `level` seconds."""
    if arm.draft is None:
        return Run(TOKENS + 1, TOKENS, TOKENS, [0] * TOKENS, 0, 0.1, PLAIN * TOKENS)
    depth = arm.num_draft_levels
    taken = min(right, depth)
    rounds = TOKENS // (taken + 1)
    draft_seconds = rounds * (0.002 + level * depth) + PREFILL if depth else 0.0
    verify_seconds = rounds * (0.011 + 0.0005 * depth)
    return Run(
        new_tokens=TOKENS + 1,
        decode_tokens=rounds * (taken + 1),
        rounds=rounds,
        accepted=[taken] * rounds,
        num_draft_levels=depth,
        prefill_seconds=0.1,
        decode_seconds=draft_seconds + verify_seconds,
        draft_seconds=draft_seconds,
        verify_seconds=verify_seconds,
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine on which nothing is computed; its costs can be changed."""
    costs: dict[str, Any] = {"right": 7, "level": 0.0005}

    def compare(target: Any, arms: list[Arm], *args: Any, **kwargs: Any) -> dict[str, Run]:
        return {arm.name: known_run(arm, **costs) for arm in arms}

    def measure(target: Any, arm: Arm, inputs: Any, settings: Any, prefill: Any = None) -> tuple[Run, list[int]]:
        run = known_run(arm, **costs)
        if arm.draft is not None:
            assert settings["max_new_tokens"] == 2
            run = Run(2, 1, 1, [0], 0, 0.1, 0.03, draft_seconds=PREFILL)
        return run, []

    monkeypatch.setattr(tuning, "compare", compare)
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "prefill_once", lambda *args: None)
    monkeypatch.setattr(tuning, "warm_up", lambda *args, **kwargs: None)
    return costs


def prompts(target: PreTrainedModel, count: int = 2) -> dict[str, list[Any]]:
    return {"4": [lambda seed=seed: read(target, 4, seed) for seed in range(count)]}


@pytest.mark.parametrize("right", [2, 5, 8, 12])
def test_the_depth_that_pays_is_chosen(machine: dict[str, Any], target: Any, draft: Any, right: int) -> None:
    machine["right"] = right
    calls = []
    found = tune(draft, target, prompts(target), trees=(), progress=lambda *each: calls.append(each))
    assert found.shape == chain(right)
    assert found.configured == draft.config.tree_shape
    # Plain, the root alone, five chains and the draft's prefill; then plain, three chains and the configured one.
    assert calls[0] == (0, 2 * (8 + 5), pytest.approx(2 * (2 * 0.1 + (8 + 5) * PLAIN * TOKENS)))
    assert [done for done, _, _ in calls] == [0, 8, 16, 21, 26]


def test_costs_and_rounds_are_those_of_the_machine(machine: dict[str, Any], target: Any, draft: Any) -> None:
    machine["right"] = 16
    found = tune(draft, target, prompts(target), trees=())
    costs = found.lengths["4"].costs
    assert costs.draft_line == pytest.approx((0.002, 0.0005))
    assert costs.verify_line == pytest.approx((0.011, 0.0005))
    assert (costs.plain_seconds, costs.prefill_seconds) == pytest.approx((PLAIN, PREFILL))
    rows = found.rows()
    assert {row["shape"] for row in rows} >= {"chain-16", "chain-12"}
    for row in rows:
        assert row["predicted_round"] == pytest.approx(row["measured_round"], rel=0.02), row
        assert row["predicted_tau"] == pytest.approx(row["measured_tau"]), row
        assert row["predicted_tokens_per_second"] == pytest.approx(row["measured_tokens_per_second"], rel=0.02), row


def test_expensive_levels_make_shallow_chains(machine: dict[str, Any], target: Any, draft: Any) -> None:
    machine |= {"right": 16, "level": 0.1}
    assert tune(draft, target, prompts(target), trees=()).shape.num_draft_levels == 1


def test_a_tree_is_chosen_if_it_is_faster(machine: Any, target: Any, draft: Any, monkeypatch: Any) -> None:
    def compare(target: Any, arms: list[Arm], *args: Any, **kwargs: Any) -> dict[str, Run]:
        return {arm.name: known_run(arm, 8 if arm.name == "24-8-4" else 1, 0.0005) for arm in arms}

    monkeypatch.setattr(tuning, "compare", compare)
    assert tune(draft, target, prompts(target)).shape == TreeShape(24, 8, 4)


def test_shapes_of_equally_many_nodes_are_all_told(machine: dict[str, Any], target: Any, draft: Any) -> None:
    found = tune(draft, target, prompts(target), trees=("17-4-8", "9-4-2"))
    deepest = {"none": 0, "chain-2": 2, "chain-5": 5, "chain-8": 8, "chain-12": 12, "chain-16": 16}
    deepest |= {"17-4-8": 4, "9-4-2": 4}
    verify = found.evidence()["costs"]["4"]["verify_ms"]
    assert verify == pytest.approx({name: 11 + 0.5 * depth for name, depth in deepest.items()})
    console = Console(width=400)
    with console.capture() as captured:
        console.print(costs_table(found))
    shown = ", ".join(f"{name}: {milliseconds / 10:.2f}" for name, milliseconds in verify.items())
    assert "verify (shape: steps)" in captured.get() and shown in captured.get()


@pytest.mark.parametrize("shape", ["10-3-3", "chain-20"])
def test_a_shape_that_nothing_else_predicts_is_measured_itself(
    machine: dict[str, Any], target: Any, draft: Any, shape: str
) -> None:
    kept = draft.config.tree_shape
    draft.config.set_tree_shape(shape)
    try:
        found = tune(draft, target, prompts(target), trees=())
    finally:
        draft.config.set_tree_shape(kept)
    assert shape in {row["shape"] for row in found.rows()}
    assert found.evidence()["configured"] == shape


def test_answers_of_one_token_are_refused(machine: Any, target: Any, draft: Any, monkeypatch: Any) -> None:
    empty = Run(1, 0, 0, [], 0, 0.1, 0.0)
    monkeypatch.setattr(tuning, "compare", lambda _, arms, *args, **kwargs: {arm.name: empty for arm in arms})
    with pytest.raises(BenchmarkError, match="length 4 is answered with a single token"):
        tune(draft, target, prompts(target))
    for none in ({}, {"4": []}):
        with pytest.raises(BenchmarkError, match="at least one prompt of each length"):
            tune(draft, target, none)


def test_answers_without_room_for_a_draft_are_refused(machine: Any, target: Any, draft: Any) -> None:
    with pytest.raises(BenchmarkError, match="at most 2 tokens leave no room for a draft.*: ask for at least 3"):
        tune(draft, target, prompts(target), max_new_tokens=2)
    assert tune(draft, target, prompts(target), max_new_tokens=3).lengths["4"].prompts


class TestWriting:
    def test_weights_and_digest_stay(self, draft: SparrowDraftModel, tmp_path: Path) -> None:
        draft.provenance = {"license": "apache-2.0"}
        draft.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        config = json.loads(before["config.json"])
        write_shape(tmp_path, TreeShape(24, 8, 4), {"shape": "24-8-4"})
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert {name for name in before if before[name] != after[name]} == {"config.json", "PROVENANCE.json"}
        changed = {"num_tree_nodes": 24, "num_draft_levels": 8, "beam_width": 4}
        assert json.loads(after["config.json"]) == config | changed
        assert after.keys() == before.keys()
        told = json.loads(after["PROVENANCE.json"])
        assert told["tuned"] == {"shape": "24-8-4"} and told["license"] == "apache-2.0"
        loaded = AutoModel.from_pretrained(tmp_path)
        assert loaded.config.tree_shape == TreeShape(24, 8, 4)
        assert tensor_digest(loaded.state_dict()) == config["tensors_sha256"]
        # What was measured is kept when the draft is saved again, byte for byte as transformers writes it.
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "PROVENANCE.json").read_text())["tuned"] == {"shape": "24-8-4"}
        assert (tmp_path / "again" / "config.json").read_bytes() == after["config.json"]

    def test_a_folder_without_a_draft_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DraftLoadError, match="holds no config.json of a draft"):
            write_shape(tmp_path, chain(3), {})
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return [*save_models(tmp_path_factory.mktemp("models")), "--device", "cpu", "--max-new-tokens", 6]


class TestCommand:
    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "200"})

    def test_it_measures_and_writes(self, models: list[Any]) -> None:
        folder, options = models[3], ["--visual-tokens", 32, "--limit", 1, "--verify", 1]
        before = (folder / "config.json").read_bytes()
        dry = self.run(*models, *options, "--dry-run")
        assert dry.exit_code == 0, dry.output
        # Plain, the root alone, five chains, a tree and the draft's prefill; plain, the best one, the configured one.
        assert "1 prompts, 12 calls of up to 6 tokens: at most about" in dry.output
        assert "nothing was written" in dry.output and (folder / "config.json").read_bytes() == before
        result = self.run(*models, *options)
        assert result.exit_code == 0, result.output
        told = json.loads((folder / "PROVENANCE.json").read_text())["tuned"]
        assert f"best: {told['shape']}, " in result.output and "round, plain steps, predicted" in result.output
        assert SparrowDraftModel.from_pretrained(folder).config.tree_shape == tuning.parse_tree_shape(told["shape"])
        assert told["costs"]["32"]["identical"][0] == told["costs"]["32"]["identical"][1] > 0
        assert told["dtype"] == "float32" and told["prompts"] == "generated clips" and told["hardware"]
        assert {row["shape"] for row in told["table"]} == told["speed_up"].keys()

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--fps", 2], "generated clips have --visual-tokens"),
            (["--prompts", "x", "--visual-tokens", 40], "set the length of --prompts with --max-frames"),
            (["--draft", "org/draft"], "org/draft is none: download the draft"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, options: list[object], sentence: str) -> None:
        result = self.run(*options)
        assert result.exit_code == 2 and sentence in " ".join(result.output.split())
