"""`--vllm-positions`: a target numbers its prompts as vLLM does, everywhere, and files say which rule they follow."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import greedy
from torch import Tensor
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftModel, tuning
from sparrow_hf._transformers import prompt_position_ids, use_vllm_positions, uses_vllm_positions
from sparrow_hf.cli import app
from sparrow_hf.errors import TargetLoadError, TrainingDataError
from sparrow_hf.export_vllm import export_vllm
from sparrow_hf.loading import load_target
from sparrow_hf.testbed import shipped
from sparrow_hf.training import SparrowDataCollator, append_answer
from sparrow_hf.training.recording import RecordedDataset, record

from families import FAMILY_BY_NAME

QWEN = shipped("qwen2.5-vl")


@pytest.fixture(params=("qwen2_vl", "qwen2_5_vl"))
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILY_BY_NAME[request.param]


def in_vllm(target: Any) -> Any:
    """A copy of a target that numbers as vLLM does."""
    target = copy.deepcopy(target)
    use_vllm_positions(target)
    return target


def wanted(target: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`(3, L)` positions of one prompt by the rule of vLLM 0.32 (`get_mrope_input_positions` of both families)."""
    config, ids = target.config, inputs["input_ids"][0].tolist()
    merge = config.vision_config.spatial_merge_size
    grids = {
        token: iter(inputs.get(f"{kind}_grid_thw", torch.empty(0, 3)).tolist())
        for kind, token in (("image", config.image_token_id), ("video", config.video_token_id))
    }
    seconds = iter(inputs.get("second_per_grid_ts", []))
    speed = getattr(config.vision_config, "tokens_per_second", None)
    parts: list[Tensor] = []
    index = 0
    while index < len(ids):
        start = int(parts[-1].max()) + 1 if parts else 0
        if ids[index] not in grids:
            parts.append(torch.full((3, 1), start))
            index += 1
            continue
        time, height, width = next(grids[ids[index]])
        step = 1.0 if speed is None or ids[index] == config.image_token_id else float(next(seconds)) * speed
        axes = ((torch.arange(time) * step).long(), torch.arange(height // merge), torch.arange(width // merge))
        parts.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1) + start)
        index += parts[-1].shape[1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "content", [{}, {"videos": 2}, {"images": 1}, {"videos": 0, "images": 2}, {"videos": 0}], ids=str
)
def test_positions_are_those_of_vllm(family: Any, content: dict[str, int]) -> None:
    target = family.build_target()
    inputs = family.build_inputs(target, num_frames=20, **content)
    ours = in_vllm(target)
    positions = prompt_position_ids(ours, inputs["input_ids"], inputs)
    if content != {"videos": 0}:
        assert torch.equal(positions[-3:, 0], wanted(target, inputs))
    # Where there is no video, and only there, both rules are the same.
    own = prompt_position_ids(target, inputs["input_ids"], inputs)
    assert torch.equal(own, positions) == (content.get("videos") == 0)


def test_rows_of_a_batch_are_numbered_as_they_are_alone(family: Any) -> None:
    target = in_vllm(family.build_target())
    rows = [family.build_inputs(target, num_frames=20, question=question) for question in ("Why?", "What moves here?")]
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str) -> Tensor:
        return torch.cat([torch.nn.functional.pad(row[name], (length - row[name].shape[1], 0)) for row in rows])

    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    whole = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name.startswith("video_grid")}
    seconds = {"second_per_grid_ts": [s for row in rows for s in row.get("second_per_grid_ts", [])] or None}
    positions, deltas = target.model.get_rope_index(**{name: padded(name) for name in names}, **whole, **seconds)
    for number, row in enumerate(rows):
        alone = wanted(target, row)
        assert torch.equal(positions[:, number, -alone.shape[1] :], alone)
        assert int(deltas[number]) == int(alone.max()) + 1 - alone.shape[1]


def test_decoding_goes_on_from_there_with_and_without_a_draft(family: Any) -> None:
    """One forward over prompt and answer predicts what was written token by token; a draft changes nothing."""
    target = in_vllm(family.build_target())
    inputs = family.build_inputs(target, num_frames=20)
    ids = target.generate(**inputs, **greedy(12))
    draft = SparrowDraftModel.from_target(target, copy_last_layer=True)
    assert torch.equal(target.generate(**inputs, **greedy(12), assistant_model=draft), ids)
    sample = append_answer(inputs, ids[0, inputs["input_ids"].shape[1] :].tolist())
    start = int(sample.pop("answer_start"))
    with torch.no_grad():
        logits = target(**sample, use_cache=False).logits[0]
    assert torch.equal(logits[start - 1 : -1].argmax(-1), sample["input_ids"][0, start:])


def test_recordings_say_which_rule_they_follow(tmp_path: Path) -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    ours = in_vllm(target)
    assert uses_vllm_positions(ours) and not uses_vllm_positions(target)
    sample = append_answer(family.build_inputs(target, num_frames=20), [9, 10, 11, 12])
    drafts = [SparrowDraftModel.from_target(each) for each in (target, ours)]
    states = []
    for number, draft in enumerate(drafts):
        record(draft, [sample], tmp_path / str(number), SparrowDataCollator())
        states.append(RecordedDataset(tmp_path / str(number), draft)[0]["last_states"])
    assert not torch.allclose(*states, atol=1e-2)
    with pytest.raises(TrainingDataError, match="was recorded without --vllm-positions: train without --vllm-pos"):
        RecordedDataset(tmp_path / "0", drafts[1])
    with pytest.raises(TrainingDataError, match="was recorded with --vllm-positions: train with --vllm-positions too"):
        RecordedDataset(tmp_path / "1", drafts[0])
    with pytest.raises(TrainingDataError, match="vllm_positions"):
        record(drafts[1], [sample], tmp_path / "0", SparrowDataCollator())


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, a training and its draft's files, from the built-in target; the exported draft then needs no note."""
    from sparrow_hf import testbed

    clip = testbed.make_clip(tmp_path / "clip.mp4", testbed.EVALUATION_SEEDS[0], 200)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": clip.messages}))

    def sparrow(*words: Any) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.output

    target, rule = ("--target", QWEN / "target"), "--vllm-positions"
    answers, draft = tmp_path / "answers", tmp_path / "draft"
    sparrow(
        "regenerate",
        *target,
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--output",
        answers,
        "--max-new-tokens",
        12,
        rule,
    )
    assert json.loads((answers / "provenance.json").read_text())["vllm_positions"]
    sparrow("record", *target, "--answers", answers, "--output", tmp_path / "recording", rule)
    training = ("--max-steps", 1, "--use-cpu", "true", "--glimpse-spacing", "logarithmic", "--report-to", "none")
    sparrow("train", *target, "--train", tmp_path / "recording", "--output", draft, *training, rule)
    assert json.loads((draft / "PROVENANCE.json").read_text())["vllm_positions"] is True
    tuned_on = []

    def tune(draft: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        tuned_on.append(uses_vllm_positions(target))
        return choose(draft, target, *args, **kwargs)

    choose = tuning.tune
    monkeypatch.setattr(tuning, "tune", tune)
    clips = ("--visual-tokens", 32, "--limit", 1, "--verify", 1, "--max-new-tokens", 4)
    sparrow("tune", *target, "--draft", draft, *clips, rule)
    assert tuned_on == [True]
    assert json.loads((draft / "PROVENANCE.json").read_text())["tuned"]["vllm_positions"] is True
    assert export_vllm(draft, tmp_path / "out", QWEN / "target")["sparrow"]["position_rule"] is None


def test_other_targets_are_refused() -> None:
    with pytest.raises(TargetLoadError, match="for qwen2_5_vl and qwen2_vl targets, and this is llava_onevision"):
        load_target(str(shipped("llava-onevision") / "target"), vllm_positions=True)
