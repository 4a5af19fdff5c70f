"""The target's own answers: batched as alone, resumed as whole, and ready to train on."""

import json

import pytest
import torch

from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.regenerate import generate_answers, left_pad, read_answers, regenerate
from sparrow_hf.video import prepare_inputs

SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 2, "do_sample": True}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def nano(processor):
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    return target


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips = [make_clip(folder / f"{seed}.mp4", seed, tokens) for seed, tokens in enumerate((16, 32))]
    text = [{"role": "user", "content": question} for question in ("describe this video .", "a dot ?", "what ?")]
    rows = [{"messages": clip.messages, "id": index} for index, clip in enumerate(clips)]
    # An assistant turn is what the target is to write itself.
    return rows + [{"messages": [turn, {"role": "assistant", "content": "first ,"}]} for turn in text]


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


def test_a_resumed_run_writes_what_the_whole_one_would(tmp_path, nano, processor, rows):
    whole = regenerate(nano, processor, rows, tmp_path / "a", shard_size=2, **SETTINGS)
    assert [path.name for path in whole] == [f"answers-0000{number}.jsonl" for number in range(3)]
    resumed = regenerate(nano, processor, rows, tmp_path / "b", shard_size=2, **SETTINGS)
    kept = resumed[0].stat().st_mtime_ns
    resumed[1].unlink()
    regenerate(nano, processor, rows, tmp_path / "b", shard_size=2, **SETTINGS)
    assert resumed[0].stat().st_mtime_ns == kept
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in resumed]
    assert not list(tmp_path.rglob("*.partial"))
    provenance = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert provenance["settings"] == SETTINGS
    with pytest.raises(TrainingDataError, match="seed: 0, now 1"):
        regenerate(nano, processor, rows, tmp_path / "b", shard_size=2, seed=1, **SETTINGS)


def test_answers_are_ready_to_train_on(tmp_path, nano, processor, rows):
    regenerate(nano, processor, rows, tmp_path, **SETTINGS)
    answered = list(read_answers(tmp_path))
    assert [row.get("id") for row in answered] == [0, 1, None, None, None]
    samples = SparrowDataCollator(processor)([answered[0]])["samples"]
    sample, answer = samples[0], answered[0]["answer_ids"]
    assert sample["input_ids"][0, sample["answer_start"] :].tolist() == answer
    prompt = prepare_inputs(processor, rows[0]["messages"])
    assert torch.equal(sample["input_ids"][:, : sample["answer_start"]], prompt["input_ids"])
    assert sample["attention_mask"].shape == sample["mm_token_type_ids"].shape == sample["input_ids"].shape
    assert sample["attention_mask"].all() and not sample["mm_token_type_ids"][0, sample["answer_start"] :].any()


def test_answers_may_be_text_or_the_last_turn(processor):
    collate = SparrowDataCollator(processor)
    turns = [
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]},
    ]
    spoken, written = collate([{"messages": turns}, {"messages": turns[:1], "answer": "a dot"}])["samples"]
    assert torch.equal(spoken["input_ids"], written["input_ids"])
    answer = spoken["input_ids"][0, spoken["answer_start"] :].tolist()
    assert processor.tokenizer.decode(answer[:-1]) == "a dot" and answer[-1] == processor.tokenizer.eos_token_id
    with pytest.raises(TrainingDataError, match="no answer"):
        collate([{"messages": turns[:1]}])
