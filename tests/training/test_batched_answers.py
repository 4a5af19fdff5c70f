"""Prompts answered in one batch: the answers are those of each alone, or the batch is refused."""

import pytest
import torch

from sparrow_hf.errors import TrainingDataError
from sparrow_hf.training.batched_answers import generate_answers, left_pad
from sparrow_hf.video import prepare_inputs

from families import FAMILY_BY_NAME


def test_answers_of_a_batch_are_those_of_each_prompt(nano, processor, rows):
    prompts = [dict(prepare_inputs(processor, row["messages"][:1])) for row in rows[:2]]
    settings = {"max_new_tokens": 8, "do_sample": False}
    pad = processor.tokenizer.pad_token_id
    together = generate_answers(nano, prompts, pad, **settings)
    alone = [generate_answers(nano, [prompt], pad, **settings)[0] for prompt in prompts]
    assert together == alone
    prompts[0]["second_per_grid_ts"] = torch.zeros(1, 3)
    with pytest.raises(TrainingDataError, match="batch_size=1"):
        left_pad(prompts, pad)


@pytest.mark.parametrize("order", [(0, 2), (2, 0), (3, 1, 4, 0)], ids=str)
def test_prompts_with_and_without_a_video_share_a_batch(nano, processor, rows, order):
    prompts = [dict(prepare_inputs(processor, rows[index]["messages"][:1])) for index in order]
    settings = {"max_new_tokens": 8, "do_sample": False}
    pad = processor.tokenizer.pad_token_id
    together = generate_answers(nano, prompts, pad, **settings)
    assert together == [generate_answers(nano, [prompt], pad, **settings)[0] for prompt in prompts]
    videos = [prompt["video_grid_thw"] for prompt in prompts if "video_grid_thw" in prompt]
    assert torch.equal(left_pad(prompts, pad)["video_grid_thw"], torch.cat(videos))
    # What has an entry for every token cannot be made up.
    del prompts[0]["attention_mask"]
    with pytest.raises(TrainingDataError, match=r"attention_mask have shapes none, \(1, .*batch_size=1"):
        left_pad(prompts, pad)


PROMPTS = {
    "video": {"seed": 1},
    "text": {"videos": 0, "question": "Tell me a long story."},
    "image": {"videos": 0, "images": 1},
}


def answered(family, kinds):
    """Answers of the family's tiny target, together and one by one."""
    target = family.build_target()
    prompts = [family.build_inputs(target, **PROMPTS[kind]) for kind in kinds]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    pad = family.tokenizer.pad_token_id
    together = generate_answers(target, prompts, pad, **settings)
    return together, [generate_answers(target, [prompt], pad, **settings)[0] for prompt in prompts]


def test_every_family_answers_prompts_with_and_without_a_video_in_one_batch(family):
    together, alone = answered(family, ("text", "video", "text"))
    assert together == alone


def test_prompts_with_different_numbers_of_frames_share_a_batch_where_pixels_are_masked():
    together, alone = answered(FAMILY_BY_NAME["smolvlm"], ("image", "video", "text"))
    assert together == alone


@pytest.mark.parametrize(
    ("name", "kinds", "reason"),
    [
        ("molmo2", ("video", "video"), "video_token_pooling"),
        ("cosmos3_edge", ("video", "text"), "mm_token_type_ids have shapes .* none"),
        ("glm4v", ("image", "video"), "the target does not read these prompts in one batch"),
    ],
)
def test_prompts_that_a_family_cannot_read_together_are_refused(name, kinds, reason):
    with pytest.raises(TrainingDataError, match=f"{reason}.*batch_size=1"):
        answered(FAMILY_BY_NAME[name], kinds)


def test_padding_behind_a_stop_string_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    target.generation_config.eos_token_id = 2
    prompts = [{"input_ids": torch.tensor([[5, 6]])}] * 3
    answers = torch.tensor([[7, 8, 0, 0], [7, 2, 0, 0], [7, 0, 9, 0]])
    monkeypatch.setattr(target, "generate", lambda input_ids, **_: torch.cat((input_ids, answers), dim=1))
    assert generate_answers(target, prompts, 0) == [[7, 8], [7, 2], [7, 0, 9]]
