"""Answers that are in a folder already are kept only where they are those that would be written now."""

import json

import pytest
import torch
from kills import files_of

from sparrow_hf import SparrowDraftModel
from sparrow_hf.artifacts import write_json
from sparrow_hf.data.answers import digests_of, read_answers
from sparrow_hf.errors import BindingError, TrainingDataError
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.training import load_rows
from sparrow_hf.training.regenerate import regenerate

SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 2, "do_sample": True}


def asked(*questions, **columns):
    return [{"messages": [{"role": "user", "content": question}]} | columns for question in questions]


def test_answers_to_other_prompts_are_not_kept(tmp_path, nano, processor):
    options = {"shard_size": 2} | SETTINGS
    red, blue = asked("red ?", "red .", "a red dot ?"), asked("red ?", "blue .", "a red dot ?")
    shards = regenerate(nano, processor, red, tmp_path, **options)
    # In the shard that is kept, or in the one that is missing: as many prompts as before.
    shards[1].unlink()
    before = files_of(tmp_path)
    for other in (blue, red[::-1], asked("red ?", "red .", "a blue dot ?"), [red[0], red[1] | {"id": 7}, red[2]]):
        with pytest.raises(
            TrainingDataError,
            match=r"made differently \(prompts_sha256: '\w{64}', now '\w{64}'\): the rows ask something else, or",
        ):
            regenerate(nano, processor, other, tmp_path, **options)
        assert files_of(tmp_path) == before
    # The same prompts in another dialect, with answers that do not count.
    again = [
        {"conversations": [{"from": "human", "value": row["messages"][0]["content"]}, {"from": "gpt", "value": "a"}]}
        for row in red
    ]
    regenerate(nano, processor, again, tmp_path, **options)
    assert [row["messages"] for row in read_answers(tmp_path)] == [row["messages"] for row in red]


def test_the_split_belongs_to_the_answers(tmp_path, nano, processor):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked("red ?", "red ?", "blue ?")))
    regenerate(nano, processor, load_rows(path, "train[:1]"), tmp_path / "answers", **SETTINGS)
    # Another row that asks the same.
    regenerate(nano, processor, load_rows(path, "train[1:2]"), tmp_path / "answers", **SETTINGS)
    with pytest.raises(TrainingDataError, match="prompts_sha256"):
        regenerate(nano, processor, load_rows(path, "train[2:]"), tmp_path / "answers", **SETTINGS)


def test_a_bad_row_that_was_mended_is_another_row(tmp_path, nano, processor):
    bad, other, good = {"messages": 1}, {"messages": [], "id": object()}, asked("red ?")[0]
    for row in (bad, other):
        regenerate(nano, processor, [good, row], tmp_path, on_bad_row="skip", **SETTINGS)
    for rows in ([good, good], [bad, good]):
        with pytest.raises(TrainingDataError, match="prompts_sha256"):
            regenerate(nano, processor, rows, tmp_path, on_bad_row="skip", **SETTINGS)


def test_answers_of_a_target_that_was_trained_on_are_not_kept(tmp_path, nano, processor):
    rows = asked("red ?")
    regenerate(nano, processor, rows, tmp_path, **SETTINGS)
    name, weight = next(nano.named_parameters())
    written = weight.data.clone()
    try:
        weight.data[0] += 1
        with pytest.raises(TrainingDataError, match=r"\(target_sha256: '\w{64}', now '\w{64}'\)"):
            regenerate(nano, processor, rows, tmp_path, **SETTINGS)
    finally:
        weight.data.copy_(written)


def test_the_same_weights_by_another_name_go_on(tmp_path, nano, processor, monkeypatch):
    rows, options = asked("red ?", "red ."), {"shard_size": 1} | SETTINGS
    draft = SparrowDraftModel.from_target(nano, num_glimpse_tokens=4)
    monkeypatch.setattr(nano.config, "_name_or_path", "target")
    draft.config._name_or_path = "draft"
    shards = regenerate(nano, processor, rows, tmp_path, draft=draft, **options)
    whole = files_of(tmp_path)
    shards[1].unlink()
    nano.config._name_or_path, draft.config._name_or_path = "/home/target", "/home/draft"
    regenerate(nano, processor, rows, tmp_path, draft=draft, **options)
    assert files_of(tmp_path) == whole

    # Other weights by the same name, and names that no digest stands for.
    with torch.no_grad():
        next(draft.parameters()).add_(1)
    with pytest.raises(TrainingDataError, match=r"draft: 'draft', now '/home/draft'; draft_sha256: '\w{64}', now"):
        regenerate(nano, processor, rows, tmp_path, draft=draft, **options)
    path = tmp_path / "provenance.json"
    provenance = json.loads(path.read_text())
    write_json(path, {name: value for name, value in provenance.items() if "sha256" not in name}, indent=2)
    digests_of(tmp_path).add(path)
    with pytest.raises(TrainingDataError, match=r"\(target: 'target', now '/home/target'; draft: 'draft', now"):
        regenerate(nano, processor, rows, tmp_path, draft=draft, **options)


def test_a_draft_of_another_target_leaves_nothing_behind(tmp_path, nano, processor):
    other = build_target(processor.tokenizer, num_hidden_layers=3)
    drafts = [SparrowDraftModel.from_target(target, num_glimpse_tokens=4) for target in (other, nano)]
    for draft in drafts:
        draft._target = None
    with pytest.raises(BindingError, match="num_hidden_layers: draft 3, target 2"):
        regenerate(nano, processor, asked("red ?"), tmp_path / "a", draft=drafts[0], **SETTINGS)
    assert not (tmp_path / "a").exists()
    (shard,) = regenerate(nano, processor, asked("red ?"), tmp_path / "a", draft=drafts[1], **SETTINGS)
    assert len(shard.read_text().splitlines()) == 1


def test_a_folder_of_an_earlier_version_goes_on_and_is_checked_from_then_on(tmp_path, nano, processor):
    rows = asked("red ?", "red .")
    options = {"shard_size": 1} | SETTINGS
    shards = regenerate(nano, processor, rows, tmp_path, **options)
    whole = files_of(tmp_path)
    path = tmp_path / "provenance.json"
    provenance = json.loads(path.read_text())
    write_json(path, {name: value for name, value in provenance.items() if "sha256" not in name}, indent=2)
    digests_of(tmp_path).add(path)
    shards[1].unlink()
    with pytest.raises(TrainingDataError, match=r"\(seed: 0, now 1\)"):
        regenerate(nano, processor, rows, tmp_path, seed=1, **options)
    with pytest.warns(UserWarning, match="without target_sha256 and prompts_sha256 and processor_sha256: the"):
        regenerate(nano, processor, rows, tmp_path, **options)
    assert files_of(tmp_path) == whole
    with pytest.raises(TrainingDataError, match="prompts_sha256"):
        regenerate(nano, processor, rows[::-1], tmp_path, **options)


def test_answers_by_another_processor_are_refused(tmp_path, nano):
    processor = build_processor()
    regenerate(nano, processor, asked("red ?"), tmp_path, **SETTINGS)
    processor.video_processor.do_normalize = False
    with pytest.raises(TrainingDataError, match=r"\(processor_sha256: '\w{64}', now '\w{64}'\)"):
        regenerate(nano, processor, asked("red ?"), tmp_path, **SETTINGS)
