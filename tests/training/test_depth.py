"""The depth that a trained draft proposes: measured on held-out rows, or from acceptance, and never against a wish."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from untrained import save_target

from sparrow_hf import SparrowDraftModel
from sparrow_hf.cli import app
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip
from sparrow_hf.training import callbacks, depth
from sparrow_hf.tree_shapes import chain
from sparrow_hf.tuning import Tuning


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SparrowDraftModel, Path]:
    draft = SparrowDraftModel.from_target(save_target(tmp_path / "target"), num_draft_levels=3, num_glimpse_tokens=4)
    draft.save_pretrained(tmp_path / "draft")
    return draft, tmp_path / "draft"


class Decoding:
    """A callback with two held-out prompts."""

    settings = {"do_sample": False, "max_new_tokens": 512}

    def prompts(self) -> Any:
        yield from ({"input_ids": 1}, {"input_ids": 2})


def shapes_of(draft: SparrowDraftModel, folder: Path) -> list[Any]:
    """In memory, in the file, and in the provenance of both."""
    told = json.loads((folder / "PROVENANCE.json").read_text())
    assert told.get("tuned") == draft.provenance.get("tuned")
    return [draft.config.tree_shape, SparrowDraftModel.from_pretrained(folder).config.tree_shape, told.get("tuned")]


@pytest.mark.parametrize(("alpha", "levels"), [(0.3, 1), (0.7, 4), (0.85, 7), (0.95, 14)])
def test_acceptance_and_assumed_costs_choose(saved: Any, alpha: float, levels: int) -> None:
    draft, folder = saved
    weights = (folder / "model.safetensors").read_bytes()
    shares = {f"eval_accepted_{j}": alpha**j for j in (1, 2, 3)}

    def tokens_per_step(depth: int) -> float:
        return sum(alpha**j for j in range(depth + 1)) / (1.2 + 0.075 * depth)

    fastest = max(map(tokens_per_step, range(1, 17)))
    assert levels == min(each for each in range(1, 17) if tokens_per_step(each) >= 0.98 * fastest)
    told = depth.write_depth(draft, folder, None, shares | {"eval_tau": 3.0})
    *found, tuned = shapes_of(draft, folder)
    assert found == [chain(levels)] * 2 and tuned["shape"] == f"chain-{levels}" and tuned["configured"] == "chain-3"
    assert f"proposes chain-{levels}, from its held-out acceptance" in told
    assert (folder / "model.safetensors").read_bytes() == weights


def test_without_acceptance_the_shape_stays(saved: Any) -> None:
    draft, folder = saved
    for metrics in ({}, {"eval_accepted_1": 0.0}):
        assert "chain-3, as it was configured" in depth.write_depth(draft, folder, None, metrics)
        assert shapes_of(draft, folder) == [chain(3), chain(3), None]


def test_held_out_prompts_decide_if_they_can_be_decoded(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, folder = saved
    asked: dict[str, Any] = {}

    def tune(draft: Any, target: Any, prompts: Any, **options: Any) -> Tuning:
        asked.update(options, prompts=[read() for read in prompts["held-out"]], training=draft.training)
        # On first use it takes the dtype of its target, as any draft that is loaded.
        asked["is_bound"] = draft._target is not None
        return Tuning(chain(9), chain(3), {}, {}, {chain(9): 3.5, chain(3): 2.5})

    monkeypatch.setattr(depth, "tune", tune)
    draft.train()
    told = depth.write_depth(draft, folder, Decoding(), {"eval_accepted_1": 0.1})  # type: ignore[arg-type]
    assert "proposes chain-9, the fastest here: 3.50 × plain generate() on 2 held-out prompts, chain-3 2.50 ×" in told
    assert shapes_of(draft, folder)[:2] == [chain(9)] * 2
    assert asked == {
        **{"trees": (), "do_sample": False, "max_new_tokens": 128, "training": False, "is_bound": False},
        "prompts": [{"input_ids": 1}, {"input_ids": 2}],
    }
    assert draft.training


def test_nothing_is_lost_if_nothing_can_be_measured(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*args: Any, **options: Any) -> Tuning:
        raise BenchmarkError("answers of one token")

    monkeypatch.setattr(depth, "tune", tune)
    draft, folder = saved
    told = depth.write_depth(draft, folder, Decoding(), {"eval_accepted_1": 0.9})  # type: ignore[arg-type]
    assert (
        told == "The draft proposes chain-3, as it was configured: no other shape was measured (answers of one token)."
    )
    assert shapes_of(draft, folder) == [chain(3), chain(3), None]


class TestCommand:
    def run(self, folder: Path, output: str, *options: object) -> Result:
        if not (folder / "target").exists():
            save_target(folder / "target")
            for split, seeds in (("train", (0, 1)), ("held_out", (2, 3))):
                rows = []
                for seed in seeds:
                    clip = make_clip(folder / f"{seed}.mp4", EVALUATION_SEEDS[seed], visual_tokens=24)
                    answer = {"role": "assistant", "content": "a red dot moves to the left ."}
                    rows.append({"messages": [*clip.messages, answer]})
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["train", "--target", folder / "target", "--train", folder / "train.jsonl", "--use-cpu"]
        command += ["--output", folder / output, "--max-steps", 1, "--report-to", "none", "--disable-tqdm", "true"]
        small = [] if "--warm-start" in options else ["--num-mtp-steps", 2, "--num-glimpse-tokens", 4]
        arguments = [str(word) for word in (*command, *small, *options)]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})

    def test_it_is_the_last_step_unless_a_depth_is_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Any] = []

        def tune(draft: Any, target: Any, prompts: Any, **options: Any) -> Tuning:
            calls.append(prompts["held-out"][0]()["input_ids"].shape[0])
            return Tuning(chain(4), draft.config.tree_shape, {}, {}, {chain(4): 1.5, draft.config.tree_shape: 1.2})

        monkeypatch.setattr(depth, "tune", tune)
        monkeypatch.setattr(callbacks, "decode", lambda *args: {})
        held_out = ("--held-out", tmp_path / "held_out.jsonl")
        chosen = self.run(tmp_path, "chosen", *held_out)
        assert chosen.exit_code == 0, chosen.output
        assert "The draft proposes chain-4, the fastest here" in chosen.output and calls == [1]
        assert SparrowDraftModel.from_pretrained(tmp_path / "chosen").config.tree_shape == chain(4)
        given = self.run(tmp_path, "given", *held_out, "--num-draft-levels", 2)
        assert given.exit_code == 0 and "The draft proposes" not in given.output, given.output
        assert SparrowDraftModel.from_pretrained(tmp_path / "given").config.tree_shape == chain(2)
        assert calls == [1]

    def test_a_chosen_depth_is_chosen_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A poor draft proposes one token. That is not the depth of what it becomes."""
        started: list[Any] = []

        def tune(draft: Any, target: Any, prompts: Any, **options: Any) -> Tuning:
            started.append(draft.config.tree_shape)
            return Tuning(chain(1), chain(7), {}, {}, {chain(1): 1.1, chain(7): 0.9})

        monkeypatch.setattr(depth, "tune", tune)
        monkeypatch.setattr(callbacks, "decode", lambda *args: {})
        held_out = ("--held-out", tmp_path / "held_out.jsonl")
        for output, start in (("poor", []), ("better", ["--warm-start", tmp_path / "poor"])):
            done = self.run(tmp_path, output, *held_out, *start)
            assert done.exit_code == 0 and "The draft proposes chain-1" in done.output, done.output
        assert started == [chain(7), chain(7)]
