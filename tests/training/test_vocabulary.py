"""Counting and choosing by hand, the file and what is refused of it, and the verb over real answers."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from typer.testing import CliRunner

from sparrow_hf.artifacts import StoredTensors, tensor_digest
from sparrow_hf.checksums import unseal
from sparrow_hf.cli import app
from sparrow_hf.errors import TrainingDataError, VocabularyError
from sparrow_hf.training.vocabulary import (
    TargetTokens,
    choose_vocabulary,
    count_tokens,
    coverage,
    load_vocabulary,
    save_vocabulary,
)

from meta_targets import META_TARGETS

TOKENS = TargetTokens(vocab_size=10, end_ids=frozenset({9}), visual_ids=frozenset({7, 8}))
ROWS = [{"answer_ids": [5, 5, 3, 2]}, {"answer_ids": []}, {"answer_ids": [3, 2, 5, 6]}]
#: 2 and 3 twice, 5 three times, 6 once, the end of the answer never.
COUNTS = torch.tensor([0, 0, 2, 2, 0, 3, 1, 0, 0, 0])


def test_counts_by_hand():
    assert torch.equal(count_tokens(iter(ROWS), 10), COUNTS)
    assert count_tokens(ROWS, 10).dtype == torch.int64
    tensors = [{"answer_ids": torch.tensor(row["answer_ids"], dtype=torch.long)} for row in ROWS]
    assert torch.equal(count_tokens(tensors, 10), COUNTS)


@pytest.mark.parametrize(
    ("size", "chosen", "share"),
    [
        (1, [9], 0),
        (2, [5, 9], 3 / 8),
        (3, [2, 5, 9], 5 / 8),
        (4, [2, 3, 5, 9], 7 / 8),
        (5, [2, 3, 5, 6, 9], 1),
        (8, [0, 1, 2, 3, 4, 5, 6, 9], 1),
    ],
)
def test_the_most_frequent_ids_are_chosen_and_lower_ones_among_equals(size, chosen, share):
    ids = choose_vocabulary(COUNTS, size, TOKENS)
    assert ids.tolist() == chosen and ids.dtype == torch.int64
    assert coverage(COUNTS, ids) == pytest.approx(share)


def test_frequent_placeholders_stay_out():
    counts = torch.full((10,), 5)
    counts[7] = 1_000_000
    assert choose_vocabulary(counts, 3, TOKENS).tolist() == [0, 1, 9]


@pytest.mark.parametrize("size", [0, 9, 11])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(VocabularyError, match=f"1 … 8 tokens, found {size}"):
        choose_vocabulary(COUNTS, size, TOKENS)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "no answers to count"),
        ([{"answer_ids": [1]}, {"answer": "a dot"}], "row 1 has no 'answer_ids'"),
        ([{"answer_ids": [1, 10]}], "row 0 holds the token ids 1 … 10"),
        ([{"answer_ids": [-1, 2]}], "another target"),
    ],
)
def test_answers_that_cannot_be_counted_are_refused(rows, sentence):
    with pytest.raises(TrainingDataError, match=sentence):
        count_tokens(rows, 10)


def test_a_file_holds_the_ids_their_counts_and_where_they_come_from(tmp_path):
    path = tmp_path / "new" / "vocabulary.safetensors"
    ids = choose_vocabulary(COUNTS, 4, TOKENS)
    save_vocabulary(path, ids, COUNTS, {"target": "someone/a-target"})
    assert torch.equal(load_vocabulary(path), ids) and torch.equal(load_vocabulary(path, 10), ids)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:
        assert file.get_tensor("counts").tolist() == [2, 2, 3, 0]
        metadata, has_digest = unseal(file.metadata())
        assert has_digest and metadata == {
            "vocab_size": "10",
            "answer_tokens": "8",
            "covered_tokens": "7",
            "target": "someone/a-target",
            "tensors_sha256": tensor_digest(StoredTensors([path])),
        }
    # All ids exist in a larger target, where they are other words.
    for size in (9, 1_000):
        with pytest.raises(VocabularyError) as refused:
            load_vocabulary(path, size)
        assert str(refused.value) == (
            f"{path} was made for someone/a-target, which has 10 tokens, and this target has {size:,}: make it again "
            "with `sparrow vocab` from the answers of this target"
        )


def test_ids_of_a_file_that_names_no_size_must_exist(tmp_path):
    path = tmp_path / "vocabulary.safetensors"
    save_file({"draft_to_target": torch.tensor([2, 9])}, path)
    with pytest.warns(UserWarning, match="digest"):
        assert load_vocabulary(path, 10).tolist() == [2, 9]
    with pytest.warns(UserWarning), pytest.raises(VocabularyError, match="2 … 9, but the target has 0 … 8"):
        load_vocabulary(path, 9)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"draft_to_target": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"draft_to_target": torch.tensor([[1, 2]])}, "shape"),
        ({"draft_to_target": torch.tensor([], dtype=torch.int64)}, "shape"),
        ({"draft_to_target": torch.tensor([2, 1])}, "ascending"),
        ({"draft_to_target": torch.tensor([1, 1])}, "ascending"),
        ({"draft_to_target": torch.tensor([-1, 1])}, "-1 … 1"),
        ({"d2t": torch.tensor([1, 2])}, "cannot be read"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(tmp_path, tensors, sentence):
    path = tmp_path / "vocabulary.safetensors"
    save_file(tensors, path)
    with pytest.raises(VocabularyError, match=sentence):
        load_vocabulary(path)


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "notes.safetensors").write_text("not safetensors")
    for name in ("notes.safetensors", "missing.safetensors"):
        with pytest.raises(VocabularyError, match=name):
            load_vocabulary(tmp_path / name)


@pytest.mark.parametrize("checkpoint", META_TARGETS, ids=lambda checkpoint: checkpoint.name)
def test_what_ends_an_answer_comes_from_both_configurations(tmp_path, checkpoint):
    config = checkpoint.config()
    config.save_pretrained(tmp_path)
    alone = TargetTokens.from_pretrained(str(tmp_path))
    assert alone.end_ids == {151645} and alone.vocab_size == config.get_text_config().vocab_size
    GenerationConfig(eos_token_id=[151645, 151643]).save_pretrained(tmp_path)
    tokens = TargetTokens.from_pretrained(str(tmp_path))
    assert tokens.end_ids == {151645, 151643}
    assert len(tokens.visual_ids) == 2
    chosen = choose_vocabulary(torch.ones(tokens.vocab_size, dtype=torch.int64), 32_768, tokens)
    assert len(chosen) == 32_768 and set(chosen[-2:].tolist()) == {151645, 151643}


@pytest.mark.parametrize("name", ["Molmo2Config", "Qwen3VLConfig", "Glm4vConfig", "GlmOcrConfig"])
@pytest.mark.parametrize("ends", [None, 5, [5, 10**6]], ids=["none", "one", "one-that-is-no-id"])
def test_text_configurations_without_an_end_and_ids_behind_the_vocabulary(name, ends):
    config = getattr(transformers, name)()
    size = config.get_text_config().vocab_size
    # Molmo 2's own placeholder is behind its vocabulary, too.
    config.image_token_id, config.video_token_id = size + 2, 7
    tokens = TargetTokens.from_configs(config, GenerationConfig(eos_token_id=ends))
    assert tokens == TargetTokens(size, frozenset({5} if ends else ()), frozenset({7}))
    assert 7 not in choose_vocabulary(torch.ones(size, dtype=torch.int64), size - 1, tokens)


def run(*arguments):
    return CliRunner().invoke(app, ["vocab", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_verb_counts_and_writes(tmp_path):
    META_TARGETS[0].config().save_pretrained(tmp_path / "target")
    for number, ids in enumerate(([11, 11, 12], [11, 13, 151645])):
        (tmp_path / f"answers-0000{number}.jsonl").write_text(json.dumps({"answer_ids": ids}) + "\n")
    where = ("--target", tmp_path / "target", "--answers", tmp_path, "--output", tmp_path / "draft")
    result = run(*where, "--size", 3)
    assert result.exit_code == 0, result.output
    assert "6 answer tokens, 4 different ones" in result.output
    assert "83.333%" in result.output and "32,768" in result.output
    assert load_vocabulary(tmp_path / "draft" / "vocabulary.safetensors", 152064).tolist() == [11, 12, 151645]
    with safe_open(tmp_path / "draft" / "vocabulary.safetensors", "pt") as file:
        assert file.metadata()["target"] == str(tmp_path / "target")


def test_the_verb_reports_what_is_wrong(tmp_path):
    META_TARGETS[0].config().save_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with warnings.catch_warnings():
            # No earlier version wrote what is not there.
            warnings.simplefilter("error", UserWarning)
            nothing = run("--target", tmp_path, "--answers", tmp_path / name, "--output", tmp_path, "--size", 8)
        assert nothing.exit_code == 2 and "no answers to count" in nothing.output
    for target, size, sentence in ((tmp_path, 8, "no answers to count"), (tmp_path / "nowhere", 8, "nowhere")):
        result = run("--target", target, "--answers", tmp_path, "--output", tmp_path, "--size", size)
        assert result.exit_code == 2
        assert sentence in result.output and "Traceback" not in result.output
