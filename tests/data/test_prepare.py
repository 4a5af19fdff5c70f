"""What a row is, what its prompt is, and what its answer is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparrow_hf import SparrowDraftModel
from sparrow_hf.data import append_answer, kind_of, prepare_conversation, prepare_inputs, prepare_prompt
from sparrow_hf.data.prepare import to_target
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.training import SparrowDataCollator, TrainingStates
from sparrow_hf.training.batched_answers import generate_answers
from sparrow_hf.training.recording import record

from families import FAMILY_BY_NAME

QUESTION = {"role": "user", "content": "what ?"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def answer_of(processor: Any, row: dict[str, Any]) -> list[int]:
    sample = prepare_conversation(processor, row)
    prompt = prepare_prompt(processor, {"messages": [QUESTION]})
    assert torch.equal(sample["input_ids"][:, : sample["answer_start"]], prompt["input_ids"])
    return sample["input_ids"][0, sample["answer_start"] :].tolist()


def test_a_row_is_of_one_kind() -> None:
    ids = torch.ones((1, 3), dtype=torch.long)
    states = TrainingStates(ids[0], 1, *[torch.zeros(0)] * 4).to_row()
    assert kind_of({"messages": [], "answer": "a"}) == "messages"
    assert kind_of({"input_ids": ids, "messages": []}) == kind_of({"input_ids": ids, "answer_start": 1}) == "processed"
    assert kind_of(states) == "states"
    assert kind_of({"text": "x"}) is None
    for prepare in (prepare_prompt, prepare_conversation):
        with pytest.raises(TrainingDataError, match="holds no pixels"):
            prepare(None, states)
        with pytest.raises(TrainingDataError, match="it has text"):
            prepare(None, {"text": "x"})
        with pytest.raises(TrainingDataError, match="need the target's processor"):
            prepare(None, {"messages": [QUESTION]})


def test_the_answer_is_what_the_target_wrote_else_the_text_else_the_last_turns(processor: Any) -> None:
    tokens = [*processor.tokenizer.encode("a dot"), processor.tokenizer.eos_token_id]
    row = {"messages": [QUESTION, said("a ring")]}
    assert answer_of(processor, row | {"answer": "a dot", "answer_ids": [7, 8, 9]}) == [7, 8, 9]
    assert answer_of(processor, row | {"answer": "a dot", "answer_ids": None}) == tokens
    assert answer_of(processor, {"messages": [QUESTION, said("a dot")], "answer": None}) == tokens
    both = answer_of(processor, {"messages": [QUESTION, said("a"), said("dot")]})
    assert processor.tokenizer.decode(both[:-1]) == "a dot" and both[-1] == tokens[-1]
    with pytest.raises(TrainingDataError, match="row 2: .*all its turns are answers"):
        prepare_conversation(processor, {"messages": [said("a dot")], "row_index": 2})


def test_a_processed_row_is_passed_on_without_index_and_folder(prompts_and_samples: Any) -> None:
    for prompt, sample in prompts_and_samples:
        placed = sample | {"row_index": 3, "row_folder": None}
        assert prepare_conversation(None, placed).keys() == sample.keys()
        for row in (placed, prompt):
            cut = prepare_prompt(None, row)
            assert cut.keys() == prompt.keys()
            assert all(torch.equal(value, cut[name]) for name, value in prompt.items())


@pytest.fixture
def prompts_and_samples(processor: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    rows = [{"messages": [QUESTION, said(text)]} for text in ("a dot", "a ring and a dot")]
    return [(dict(prepare_prompt(processor, row)), prepare_conversation(processor, row)) for row in rows]


@pytest.mark.parametrize("own", [{"fps": 0}, {"fps": "2"}, {"fps": float("nan")}, {"max_frames": 0.5}])
def test_a_row_with_zero_frames_is_refused(processor: Any, own: dict[str, Any]) -> None:
    with pytest.raises(TrainingDataError, match="must be a positive number"):
        prepare_prompt(processor, {"messages": [QUESTION]} | own)


@pytest.mark.parametrize("name", ["kimi_k25", "lfm3_vl", "llama4", "qwen2_5_vl"])
def test_a_target_in_bf16_reads_pixels_as_a_processor_gives_them(name: str, tmp_path: Path) -> None:
    family = FAMILY_BY_NAME[name]
    target = family.build_target()
    inputs = family.build_inputs(target)
    answers = []
    target.to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        answers += generate_answers(target, [given], 0, max_new_tokens=4, do_sample=False)
    assert answers[0] == answers[1]
    row = append_answer(inputs, [5, 6, 7])
    record(SparrowDraftModel.from_target(target), [row], tmp_path / "recording", SparrowDataCollator())


class Reader(torch.nn.Module):
    """What a target is to its inputs, in bf16."""

    dtype = torch.bfloat16

    def __init__(self, device: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 2, device=device)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding


def test_seconds_stay_exact_where_pixels_are_rounded() -> None:
    target = Reader("cpu")
    pixels, ids = torch.full((2, 3), 1.11), torch.tensor([[1, 2]])
    for name in ("second_per_grid_ts", "video_second_per_grid"):
        moved = to_target(
            {"pixel_values_videos": pixels, "input_ids": ids, name: pixels[0], "answer_start": 1}, target
        )
        assert {key: getattr(value, "dtype", None) for key, value in moved.items()} == {
            "pixel_values_videos": torch.bfloat16,
            "input_ids": torch.long,
            name: torch.float32,
            "answer_start": None,
        }
        assert torch.equal(moved[name], pixels[0])


def test_inputs_are_made_for_a_target(processor: Any) -> None:
    target = Reader("meta")
    frames = torch.zeros((4, 3, 32, 32), dtype=torch.uint8).numpy()
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "what ?"}]}]
    for made_for, device, dtype in ((None, "cpu", torch.float32), (target, "meta", torch.bfloat16)):
        inputs = prepare_inputs(processor, messages, target=made_for)
        pixels = inputs["pixel_values_videos"]
        assert (pixels.device.type, inputs["input_ids"].device.type, pixels.dtype) == (device, device, dtype)
