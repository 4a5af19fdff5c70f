"""Answers that outlive what is computed once for many tokens: positions of the draft, masks of the target."""

from typing import Any

import pytest
import torch
from greedy import greedy

from sparrow_hf import SparrowCandidateGenerator, SparrowDraftModel
from sparrow_hf.generation import caches, candidate_generator

from families import FAMILY_BY_NAME
from lossless import built_target

NEW = 60


@pytest.mark.parametrize("shape", ["chain-7", "20-5-4"])
def test_what_is_computed_for_few_tokens_is_what_is_computed_for_many(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = built_target("qwen2_5_vl", "eager")
    inputs = FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target)
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target)
    draft.config.set_tree_shape(shape)
    plain = target.generate(**inputs, **greedy(NEW))
    proposed: list[list[int]] = []
    propose = SparrowCandidateGenerator.propose

    def spy(self: Any, max_levels: int) -> Any:
        tree = propose(self, max_levels)
        proposed.append(tree.token_ids[0].tolist())
        return tree

    monkeypatch.setattr(SparrowCandidateGenerator, "propose", spy)
    runs = []
    for room in (512, 8, 1):
        # A table begins at any offset to the drafts of a round.
        monkeypatch.setattr(candidate_generator, "ROTARY_ROWS", room)
        monkeypatch.setattr(caches, "MASK_ROOM", room)
        assert torch.equal(target.generate(**inputs, assistant_model=draft, **greedy(NEW)), plain)
        runs.append(proposed[:])
        proposed.clear()
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) > 20
