"""A language model without a vision tower is a target as well: it is loaded, answers, is recorded and drafted for."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftModel
from sparrow_hf.cli import app
from sparrow_hf.data.prepare import prepare_conversation, prepare_prompt
from sparrow_hf.errors import MessagesError
from sparrow_hf.loading import load_target
from sparrow_hf.training.regenerate import read_answers, regenerate

from tiny_targets import TEXT_SIZES
from tiny_tokenizer import EOS, build_tokenizer

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant: "
PROMPTS = [{"messages": [{"role": "user", "content": text}]} for text in ("What is a river?", "Why?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tokenizer = build_tokenizer({})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    LlamaForCausalLM(LlamaConfig(**TEXT_SIZES, **ids)).save_pretrained(folder)
    return folder


def test_from_prompts_to_a_draft(folder: Path, tmp_path: Path) -> None:
    target, tokenizer = load_target(str(folder), dtype="float32", device="cpu")
    assert type(target) is LlamaForCausalLM
    regenerate(target, tokenizer, PROMPTS, tmp_path, batch_size=2, max_new_tokens=12)
    rows = list(read_answers(tmp_path))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        question = prompt["messages"][0]["content"]
        inputs = prepare_prompt(tokenizer, row)
        assert tokenizer.decode(inputs["input_ids"][0]) == f"user: {question}\nassistant: "
        plain = target.generate(**inputs, max_new_tokens=12)
        assert row["answer_ids"] == plain[0, inputs["input_ids"].shape[1] :].tolist()
        assert prepare_conversation(tokenizer, row)["input_ids"].tolist() == plain.tolist()
        draft = SparrowDraftModel.from_target(target, copy_last_layer=True)
        assert torch.equal(target.generate(**inputs, max_new_tokens=12, assistant_model=draft), plain)
        assert draft.last_generation.rounds > 0


def test_its_draft_s_card_loads_a_language_model(folder: Path, tmp_path: Path) -> None:
    target, _ = load_target(str(folder), dtype="float32", device="cpu")
    draft = SparrowDraftModel.from_target(target)
    draft.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "target = AutoModelForCausalLM.from_pretrained(" in card.text
    assert "video" not in card.text.lower() and "ImageText" not in card.text


def test_an_answer_in_words_ends_its_turn(folder: Path) -> None:
    _, tokenizer = load_target(str(folder), device="cpu")
    row = {"messages": [*PROMPTS[0]["messages"], {"role": "assistant", "content": "water"}]}
    sample = prepare_conversation(tokenizer, row)
    assert tokenizer.decode(sample["input_ids"][0, sample["answer_start"] :]) == "water" + EOS


def test_text_in_parts_is_text_and_a_video_is_refused(folder: Path) -> None:
    _, tokenizer = load_target(str(folder), device="cpu")
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a river?"}]
    inputs = prepare_prompt(tokenizer, {"messages": [{"role": "user", "content": parts}]})
    assert torch.equal(inputs["input_ids"], prepare_prompt(tokenizer, PROMPTS[0])["input_ids"])
    seen = [{"type": "video", "video": "clip.mp4"}, *parts]
    with pytest.raises(MessagesError, match="the target reads text alone"):
        prepare_prompt(tokenizer, {"messages": [{"role": "user", "content": seen}]})


def test_generate_answers_rows_of_text(folder: Path, tmp_path: Path) -> None:
    target, tokenizer = load_target(str(folder), dtype="float32", device="cpu")
    SparrowDraftModel.from_target(target, copy_last_layer=True).save_pretrained(tmp_path / "draft")
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    words = ["generate", rows, "--target", folder, "--draft", tmp_path / "draft", "--device", "cpu", "--compare"]
    words += ["--max-new-tokens", 8, "--output", output]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    for line, prompt in zip(map(json.loads, output.read_text().splitlines()), PROMPTS, strict=True):
        inputs = prepare_prompt(tokenizer, prompt)
        answer = target.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert line["text"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert (line["identical"], line["visual_tokens"], line["error"]) == (True, 0, None)
