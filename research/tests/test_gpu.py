"""The GPU benchmark, as far as a CPU runs it: every part, on a tiny target."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sparrow_hf.generation.tree import build_tree
from sparrow_research.gpu import __main__ as command
from sparrow_research.gpu import calls, planting, steps
from sparrow_research.gpu.models import prompt, random_draft, random_target
from sparrow_research.gpu.session import OutOfTime, Part, Session
from sparrow_research.gpu.sizes import full_sizes, small_sizes

#: What a CPU cannot do is said in rows with an error: backends of sdpa that only CUDA has.
NOT_ON_A_CPU = {"efficient", "cudnn"}
TIMES = {"ms", "wall_us", "most_ms", "call_seconds"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gpu", str(folder), "--small"])
        command.main()
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_part_writes_what_it_found_and_how(written: dict[str, Any]) -> None:
    assert written.keys() == command.PARTS.keys()
    for name, found in written.items():
        assert found["part"] == name and "error" not in found, found.get("traceback")
        assert found["weights"] == "random" and found["shapes"]["hidden_size"] == 64
        assert found["torch"] == torch.__version__ and found["dtype"] == "float32"
        assert {"command", "commit", "transformers", "hardware"} <= found.keys()
        assert found["seconds"] > 0 and found["rows"]


@pytest.mark.parametrize("part", command.PARTS)
def test_only_what_needs_cuda_fails_and_every_time_is_positive(written: dict[str, Any], part: str) -> None:
    for row in written[part]["rows"]:
        # What the package refuses is told, and is no failure.
        allowed = row.get("available") is False or row.get("way", "").split(", ")[-1] in NOT_ON_A_CPU
        assert "error" not in row or allowed, row
        # Not of rounds: differences of two short calls may come out as anything.
        assert all(row[name] > 0 for name in TIMES & row.keys()), row


def test_rounds_are_of_every_way_and_length(written: dict[str, Any]) -> None:
    rows = [row for row in written["rounds"]["rows"] if "round_ms" in row]
    for length in (32, 64, 128):
        arms = {row["arm"] for row in rows if row["prompt"] == length}
        assert {"plain, dynamic", "chain-5, dynamic"} <= arms
    # Drafts are planted in the last calls of each way alone; a random one is right by chance.
    assert all(row["tau"] < 1.5 for row in rows)
    assert all(row["planted_tau"] > 2 for row in rows if not row["arm"].startswith("plain"))
    ratios = [row for row in written["rounds"]["rows"] if "against" in row]
    assert ratios and all(row["first_difference"] is None for row in ratios)


def test_ids_are_those_of_plain_decoding_and_drafts_were_accepted(written: dict[str, Any]) -> None:
    rows = [row for row in written["identity"]["rows"] if row["dtype"] == "torch.float32" and "tau" in row]
    assert {row["shape"] for row in rows} == {"chain-5", "48-5-10", "plain"}
    assert all(row["identical"] == row["prompts"] for row in rows)
    assert all(min(row["tau"]) > 1 for row in rows if row["shape"] != "plain")


def test_steps_fold_heads_without_changing_what_they_attend_to() -> None:
    session = Session(Path(), torch.device("cpu"), torch.float32, small_sizes(), 0.0)
    text = session.target.config.get_text_config()
    outputs = []
    for name in ("sdpa", "folded"):
        torch.manual_seed(0)
        text._attn_implementation = name
        cache = steps._filled(session, 32, steps.DynamicCache(config=text))
        outputs.append(steps._forward(session, cache, 32, 6, total=38)())
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.equal(outputs[1], torch.zeros_like(outputs[1]))


def test_the_projected_tau_is_what_planted_drafts_give() -> None:
    assert round(planting.expected_tau(5), 1) == 5.4 and round(planting.expected_tau(10), 1) == 8.9


def test_planting_into_a_tree() -> None:
    # 0 ─ 1 ─ 3
    #   └ 2 ─ 4 ─ 5
    tree = build_tree([9, 21, 20, 23, 24, 25], [-1, 0, 0, 1, 2, 4])
    lucky = planting.with_path(tree, [21, 22, 30], 100, type("Lucky", (random.Random,), {"random": lambda _: 0.0})())
    assert lucky.token_ids.tolist() == [[9, 23, 21, 23, 22, 30]]
    assert torch.equal(lucky.ancestors, tree.ancestors)
    unlucky = planting.with_path(tree, [21, 22, 30], 100, type("No", (random.Random,), {"random": lambda _: 1.0})())
    assert unlucky.token_ids.tolist() == [[9, 23, 22, 23, 24, 25]]


def test_a_part_that_fails_or_runs_out_of_time_keeps_its_rows(tmp_path: Path) -> None:
    session = Session(tmp_path, torch.device("cpu"), torch.float32, small_sizes(), float("inf"))

    def broken(_: Session, part: Part) -> None:
        with part.cell(row="wrong"):
            raise ValueError("no")
        part.add(row="right")
        raise RuntimeError("broken")

    def slow(_: Session, part: Part) -> None:
        part.add(row="right")
        with part.cell(row="slow"):
            raise OutOfTime("stopped")

    session.run("broken", broken, 60)
    session.run("slow", slow, 60)
    session.run("late", slow, 1)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("broken", "slow", "late")}
    assert found["broken"]["error"] == "RuntimeError: broken"
    assert [row.get("error") for row in found["broken"]["rows"]] == ["ValueError: no", None]
    assert found["slow"]["error"] == "OutOfTime: stopped" and found["slow"]["rows"] == [{"row": "right"}]
    assert found["late"]["error"] == "OutOfTime: no time was left to start" and found["late"]["rows"] == []


def test_the_full_target_has_the_shapes_of_7b() -> None:
    target = random_target(full_sizes(28), torch.bfloat16, torch.device("meta"))
    assert 7.6e9 < target.num_parameters() < 7.7e9 and target.dtype is torch.bfloat16


def test_prompts_are_placeholders_and_text_with_embeddings_of_their_own() -> None:
    sizes = small_sizes()
    target = random_target(sizes, torch.float32, torch.device("cpu"))
    inputs = prompt(target, sizes, 64)
    visual = inputs["input_ids"] == target.config.video_token_id
    assert visual.sum() == 48 and inputs["inputs_embeds"][visual].unique(dim=0).shape[0] == 48
    assert random_draft(target, "chain-5").config.visual_token_ids == [502 + 2, 502 + 3]


def test_plain_decoding_runs_without_the_hooks_of_a_draft() -> None:
    session = Session(Path(), torch.device("cpu"), torch.float32, small_sizes(), 0.0)
    seen: list[str] = []
    norm = session.target.get_decoder().norm
    norm.register_forward_hook(lambda *_: seen.append("norm"))
    inputs = prompt(session.target, session.sizes, 32)
    plain = calls.call(session, inputs, 3, None)
    assert plain.rounds == 2 and not seen
    drafted = calls.call(session, inputs, 3, "chain-5")
    assert drafted.ids == plain.ids and seen
