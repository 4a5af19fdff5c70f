"""Rivals for a language model are trained as `sparrow train` trains, and drafts of it are measured and tabled."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparrow_hf.data import load_rows
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.loading import load_target
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.recording import record
from sparrow_hf.training.regenerate import regenerate
from sparrow_research.baselines import HiViSDraftModel
from sparrow_research.language import text
from sparrow_research.language.rivals import TEXT_RIVALS, train_rival

from tiny_targets import TEXT_SIZES
from tiny_tokenizer import build_tokenizer

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant: "
QUESTIONS = ("What is a river?", "Why?", "Write a poem.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of 30 layers, prompts, and a recording of its answers."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer = build_tokenizer({})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "target")
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    LlamaForCausalLM(LlamaConfig(**TEXT_SIZES | {"num_hidden_layers": 30}, **ids)).save_pretrained(folder / "target")
    prompts = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    target, tokenizer = load_target(str(folder / "target"), device="cpu")
    regenerate(target, tokenizer, prompts, folder / "answers", batch_size=3, max_new_tokens=12)
    draft = SparrowDraftModel.from_target(target)
    record(draft, load_rows(folder / "answers"), folder / "recording", SparrowDataCollator(tokenizer))
    draft.save_pretrained(folder / "draft")
    return folder


def trained(name: str, folder: Path, output: Path, *words: str) -> SparrowDraftModel:
    return train_rival(
        name,
        f"--target {folder}/target --train {folder}/recording --output {output} --max-steps 1 --learning-rate 0.1 "
        "--use-cpu true --device cpu --report-to none --disable-tqdm true".split()
        + list(words),
    )


def test_each_rival_is_what_its_name_says(folder: Path, tmp_path: Path) -> None:
    drafts = {name: trained(name, folder, tmp_path / name) for name in TEXT_RIVALS}
    passes = {name: draft.config.num_mtp_steps for name, draft in drafts.items()}
    fewer = {"eagle": 1, "text-only": 1, "one-pass": 1, "paper": 2}
    assert passes == dict.fromkeys(TEXT_RIVALS, 4) | fewer
    assert drafts["eagle3"].config.feature_layers == [2, 15, 27]
    assert drafts["one-pass"].config.feature_layers == [2, 15, 27, -1]
    assert all(drafts[name].config.feature_layers == [-1] for name in ("last-layer", "eagle", "hivis", "paper"))
    losses = {name: draft.provenance["recipe"]["losses"] for name, draft in drafts.items()}
    assert losses["paper"] == "10 × probability_l1, 0.1 × list_mle"
    assert losses["no-state-loss"] == losses["eagle3"] == "1 × soft_cross_entropy"
    assert isinstance(drafts["hivis"], HiViSDraftModel) and drafts["hivis"].step_residuals.weight.abs().min() > 0
    hidden = drafts["text-only"].config.hidden_size
    assert drafts["text-only"].fc.weight[:, hidden:].eq(0).all()
    assert drafts["text-only"].fc.weight[:, :hidden].ne(0).any()
    assert drafts["eagle"].fc.weight[:, hidden:].ne(0).any()
    for name in drafts:
        assert (tmp_path / name / "model.safetensors").exists()


def test_the_command_line_takes_precedence_over_the_rival(folder: Path, tmp_path: Path) -> None:
    draft = trained("eagle3", folder, tmp_path / "a", "--feature-layers", "15", "-1", "--num-mtp-steps", "2")
    assert (draft.config.feature_layers, draft.config.num_mtp_steps) == ([15, -1], 2)


def test_drafts_are_measured_and_tabled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    draft = SparrowDraftModel.from_pretrained(folder / "draft")
    draft.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "trained.json").write_text('{"tokens": 28000, "steps": 5, "rows": 16}')
    page = tmp_path / "page.md"
    page.write_text(f"# Text\n\nWords.\n\n{text.BEGIN}old\n{text.END}\nMore words.\n")
    words = ["--target", folder / "target", "--draft", folder / "draft", "--compare", f"28k={tmp_path / 'small'}"]
    words += [
        "--prompts",
        folder / "prompts.jsonl",
        "--limit",
        2,
        "--max-new-tokens",
        8,
        "--shapes",
        "chain-3",
        "8-3-2",
        "--others",
        "none",
    ]
    words += ["--work", tmp_path / "runs", "--output", tmp_path / "text.json", "--report", page]
    text.main([str(word) for word in words])

    found = json.loads((tmp_path / "text.json").read_text())
    arms = {(row["benchmark"], row["temperature"], row["arm"]): row for row in found["rows"]}
    trees = ["plain", "none", "draft:sparrow@chain-3", "draft:sparrow@8-3-2"]
    compared = ["plain", *(f"draft:{name}@{tree}" for name in ("sparrow", "28k") for tree in ("chain-5", "30-4-8"))]
    measured = [("trees", arm) for arm in trees] + [("drafts", arm) for arm in compared]
    assert set(arms) == {(name, t, arm) for t in (0.0, 1.0) for name, arm in measured}
    assert all(row["identical"] in (2, None) for row in arms.values())
    assert found["drafts"] == {"sparrow": {}, "28k": {"tokens": 28000, "steps": 5, "rows": 16}}
    written = page.read_text()
    assert written.startswith(f"# Text\n\nWords.\n\n{text.BEGIN}\n### Trees, greedy\n") and "old" not in written
    assert written.endswith(f" |\n\n{text.END}\nMore words.\n")
    for temperature in (0.0, 1.0):
        row = arms["drafts", temperature, "draft:28k@30-4-8"]
        assert f"| 28k | 28,000 | 5 × 16 | 30-4-8 | 2/2 | {row['tau']:.2f} |" in written
        assert f"| {row['dsr']:.2f} |\n" in written
    of_tables = [block.splitlines() for block in written.split("\n\n") if block.startswith("|")]
    assert len(of_tables) == 4 and all(len({line.count("|") for line in lines}) == 1 for lines in of_tables)

    before = (tmp_path / "runs" / "trees.jsonl").read_bytes()
    text.main([str(word) for word in words])
    assert (tmp_path / "runs" / "trees.jsonl").read_bytes() == before
    assert page.read_text() == written

    # Of fewer prompts, the table has as many.
    words[words.index("--limit") + 1] = 1
    text.main([str(word) for word in words])
    assert (tmp_path / "runs" / "trees.jsonl").read_bytes() == before
    assert {row["prompts"] for row in json.loads((tmp_path / "text.json").read_text())["rows"]} == {1}


@pytest.mark.parametrize("marks", ["", text.BEGIN, text.END + text.BEGIN])
def test_a_page_without_a_place_for_the_tables_stays_as_it_is(tmp_path: Path, marks: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Words.\n{marks}More words.\n")
    with pytest.raises(BenchmarkError, match="needs the line '<!-- tables of language.text -->', and after it"):
        text.write_report({"rows": [], "drafts": {}}, page)
    assert page.read_text() == f"Words.\n{marks}More words.\n"
