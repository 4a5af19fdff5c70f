"""A draft that proposes a part of the target's vocabulary only. Output identity is in `lossless.py`."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import DraftConfigError

from families import FAMILY_BY_NAME

FAMILY = FAMILY_BY_NAME["qwen2_5_vl"]
TREE = {"num_tree_nodes": 20, "num_draft_levels": 4, "beam_width": 4}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY.build_target()


def make_draft(target: PreTrainedModel, **fields: object) -> SparrowDraftModel:
    torch.manual_seed(0)
    return SparrowDraftModel.from_target(target, **TREE, **fields)


def drafted(target: PreTrainedModel, draft: SparrowDraftModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """All trees of one `generate()`, as token ids."""
    from sparrow_hf import SparrowCandidateGenerator

    trees, propose = [], SparrowCandidateGenerator.propose

    def spy(self, max_levels):
        tree = propose(self, max_levels)
        trees.append(tree.token_ids[0].tolist())
        return tree

    with monkeypatch.context() as patch:
        patch.setattr(SparrowCandidateGenerator, "propose", spy)
        target.generate(**FAMILY.build_inputs(target), assistant_model=draft, do_sample=False, max_new_tokens=8)
    return trees


def allowed_ids(draft: SparrowDraftModel) -> torch.Tensor:
    return torch.tensor([i for i in range(draft.config.vocab_size) if i not in draft.config.visual_token_ids])


def test_the_whole_vocabulary_as_a_part_changes_no_tree(target, monkeypatch) -> None:
    draft = make_draft(target)
    expected = drafted(target, draft, monkeypatch)
    draft.set_vocabulary(allowed_ids(draft))
    assert drafted(target, draft, monkeypatch) == expected
    assert {len(tree) for tree in expected} >= {20}


def test_only_tokens_of_the_part_are_drafted(target, monkeypatch) -> None:
    draft = make_draft(target)
    part = allowed_ids(draft)[5:90:3]
    draft.set_vocabulary(part)
    for tree in drafted(target, draft, monkeypatch):
        assert set(tree[1:]) <= set(part.tolist())


@pytest.mark.parametrize("plain_head", [True, False], ids=["copied-rows", "whole-head"])
def test_logits_are_those_of_the_whole_head(target, plain_head, monkeypatch) -> None:
    draft = make_draft(target)
    hidden = torch.randn(2, 3, draft.config.hidden_size)
    whole = draft.compute_logits(hidden)
    part = allowed_ids(draft)[[1, 4, 40, 77]]
    draft.set_vocabulary(part)
    if not plain_head:  # as a quantised one
        monkeypatch.setattr(draft.target, "head", torch.nn.Sequential(draft.target.head))
    torch.testing.assert_close(draft.compute_logits(hidden), whole[..., part])
    assert torch.equal(draft.compute_logits(hidden, full_vocabulary=True), whole)


def test_another_part_replaces_the_first(target) -> None:
    draft = make_draft(target)
    hidden = torch.randn(1, draft.config.hidden_size)
    for part in (torch.tensor([1, 2, 3]), torch.tensor([7, 9])):
        draft.set_vocabulary(part)
        assert draft.compute_logits(hidden).shape == (1, len(part))
        assert draft.config.draft_vocab_size == len(part)


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, torch.tensor, partial(torch.tensor, dtype=torch.uint8)],
    ids=["list", "tuple", "array", "tensor", "bytes"],
)
def test_a_part_may_be_of_any_kind_of_ids(target, kind) -> None:
    draft = make_draft(target)
    ids = kind([1, 2, 5])
    draft.set_vocabulary(ids)
    assert draft.config.draft_vocab_size == 3
    assert draft.draft_to_target.dtype == torch.int64 and draft.draft_to_target.tolist() == [1, 2, 5]
    if hasattr(ids, "ndim"):
        # What becomes of the caller's own array is nothing to the draft.
        ids[0] = 0
        assert draft.draft_to_target.tolist() == [1, 2, 5]
    with pytest.raises(DraftConfigError, match="ascending"):
        draft.set_vocabulary(kind([2, 1]))


@pytest.mark.parametrize("ids", [["a"], [[1, 2]], [[1], [2, 3]], {1, 2}, 7, [True, False], None, []], ids=repr)
def test_what_are_no_ids_is_refused(target, ids) -> None:
    draft = make_draft(target)
    with pytest.raises(DraftConfigError, match="one row of token ids"):
        draft.set_vocabulary(ids)
    assert draft.config.draft_vocab_size is None and draft.draft_to_target is None


def test_the_part_is_saved_with_the_draft(target, tmp_path) -> None:
    draft = make_draft(target)
    draft.set_vocabulary(allowed_ids(draft)[10:20])
    draft.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.draft_to_target, draft.draft_to_target)
    assert loaded.config.draft_vocab_size == 10 and loaded.config.vocab_size == draft.config.vocab_size
    loaded.bind(target)
    hidden = torch.randn(1, draft.config.hidden_size)
    assert torch.equal(loaded.compute_logits(hidden), draft.compute_logits(hidden))


@pytest.mark.parametrize(
    "ids", [[3, 2], [2, 2], [-1, 4], [0, 10**6], [], "placeholder", [0.5, 1.0]], ids=lambda ids: str(ids)
)
def test_bad_parts_are_refused(target, ids) -> None:
    draft = make_draft(target)
    if ids == "placeholder":
        ids = draft.config.visual_token_ids
    with pytest.raises(DraftConfigError):
        draft.set_vocabulary(torch.tensor(ids))
    assert draft.config.draft_vocab_size is None and draft.draft_to_target is None


def test_a_bad_part_in_a_checkpoint_is_refused_when_bound(target, tmp_path) -> None:
    draft = make_draft(target)
    draft.set_vocabulary(torch.tensor([1, 2]))
    draft.draft_to_target = torch.tensor([2, 1])
    draft.save_pretrained(tmp_path)
    with pytest.raises(DraftConfigError, match="ascending"):
        SparrowDraftModel.from_pretrained(tmp_path).bind(target)
