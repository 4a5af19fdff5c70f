"""Long clips in one prefill: the answers of `generate()`, and the states that `sparrow record` stores of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparrow_hf import SparrowDraftModel, testbed
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.recording import record
from sparrow_research.language import video_long


@pytest.mark.parametrize("length", ["12", "320"], ids=["cut", "whole"])
def test_answers_and_states_are_those_of_generate_and_record(
    length: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks, the last one not whole.
    monkeypatch.setattr(video_long, "BLOCK", 48)
    target, processor, _ = testbed.load()
    clips = [testbed.make_clip(tmp_path / f"{seed}.mp4", seed, visual_tokens=120) for seed in (1, 2)]
    rows = [{"messages": clip.messages} for clip in clips]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--target", str(testbed.shipped() / "target"), "--prompts", str(tmp_path / "prompts.jsonl")]
    chosen = ["--output", str(tmp_path / "long"), "--dtype", "float32", "--new-tokens", length]
    video_long.main([*asked, *chosen, "--rows", "1"])
    first = tmp_path / "long" / "rows" / "row-000000.safetensors"
    written = first.stat().st_mtime_ns
    # Goes on behind the first.
    video_long.main([*asked, *chosen])
    assert first.stat().st_mtime_ns == written

    collator = SparrowDataCollator(processor)
    answered = []
    for row in rows:
        inputs = collator.prepare_prompt(row)
        output = target.generate(**inputs, max_new_tokens=int(length))
        assert (output[0, -1] == processor.tokenizer.eos_token_id) == (length == "320")
        answered.append(row | {"answer_ids": output[0, inputs["input_ids"].shape[1] :].tolist()})
    record(SparrowDraftModel.from_target(target), answered, tmp_path / "usual", collator)
    for index in range(2):
        mine, theirs = (
            load_file(tmp_path / name / "rows" / f"row-{index:06d}.safetensors") for name in ("long", "usual")
        )
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if tensor.is_floating_point():
                assert (mine[name] - tensor).abs().max() < 1e-5 * tensor.abs().max(), name
            else:
                assert torch.equal(mine[name], tensor), name
