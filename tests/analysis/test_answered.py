"""Answers, the forward over prompt and answer, and which row belongs to which group."""

import json
from pathlib import Path

import pytest
import torch
from subjects import MAX_NEW_TOKENS, QUESTION, Subject

from sparrow_hf.analysis.answered import (
    Conversation,
    ProcessedPrompt,
    answer,
    find_text,
    process_conversation,
    read_conversations,
)
from sparrow_hf.errors import AnalysisError, TrainingDataError
from sparrow_hf.target_config import visual_token_ids
from sparrow_hf.testbed.nano import build_processor


def test_groups_part_the_rows_and_the_instruction_is_found(subject: Subject) -> None:
    answered = subject.answered
    assert torch.equal(answered.groups.sum(-1), torch.ones(len(answered.is_visual)))
    ids = answered.inputs["input_ids"][0]
    assert subject.family.tokenizer.decode(ids[answered.groups[:, 0]]).strip() == QUESTION
    assert torch.equal(answered.groups[:, 1], answered.is_visual)
    assert not answered.is_visual[answered.prompt_length :].any()
    assert ids[answered.prompt_length :].tolist() == answered.answer_ids
    assert 0 < len(answered.answer_ids) <= MAX_NEW_TOKENS


def test_one_forward_over_prompt_and_answer_is_decoding(subject: Subject) -> None:
    """Logits of the forward equal those of `generate()`, step by step: positions and types have grown rightly."""
    answered = subject.answered
    steps = subject.target.generate(
        **answered.prompt.inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        # An untrained target would write placeholders, which are no text.
        suppress_tokens=visual_token_ids(subject.target.config),
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert steps.sequences[0, answered.prompt_length :].tolist() == answered.answer_ids
    with torch.no_grad():
        logits = subject.target(**answered.inputs, use_cache=False).logits[0, answered.prompt_length - 1 : -1]
    torch.testing.assert_close(logits, torch.cat(steps.logits), atol=1e-4, rtol=0)


def test_the_last_of_two_equal_texts_is_the_instruction() -> None:
    tokenizer = build_processor().tokenizer
    ids = torch.tensor(tokenizer.encode("describe this video . then describe this video . thanks"))
    rows = find_text(tokenizer, ids, "Describe this  video.")
    assert rows.tolist() == [5, 6, 7, 8]


def test_an_instruction_that_is_not_there_is_named() -> None:
    tokenizer = build_processor().tokenizer
    with pytest.raises(AnalysisError, match="'sing'"):
        find_text(tokenizer, torch.tensor(tokenizer.encode("describe this video .")), "sing")
    with pytest.raises(AnalysisError, match="no instruction"):
        turns = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
        process_conversation(build_processor(), Conversation(turns))


def test_padding_and_prompts_without_visual_rows_are_refused(qwen: Subject) -> None:
    text_only = qwen.family.build_inputs(qwen.target, videos=0)
    with pytest.raises(AnalysisError, match="no visual tokens"):
        answer(qwen.target, ProcessedPrompt(text_only, torch.tensor([1])), 4)
    padded = dict(qwen.answered.prompt.inputs)
    padded["attention_mask"] = padded["attention_mask"].clone()
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(AnalysisError, match="unpadded"):
        answer(qwen.target, ProcessedPrompt(padded, torch.tensor([1])), 4)


def test_answers_of_rows_are_references_and_not_part_of_the_prompt(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "what ?"}]
    first = {"role": "assistant", "content": "a dot"}
    second = {"role": "assistant", "content": [{"type": "text", "text": "a red one"}]}
    rows = [
        {"messages": asked, "reference": None},
        {"messages": [*asked, first], "reference": "a circle"},
        {"messages": [*asked, first, *asked, first, second], "reference": None},
        {"messages": [first], "reference": None},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_conversations(str(path), limit=3) == [
        Conversation(asked, None),
        Conversation(asked, "a circle"),
        Conversation([*asked, first, *asked], "a dot\na red one"),
    ]
    with pytest.raises(TrainingDataError, match="row 3: all its turns are answers"):
        read_conversations(str(path))
