"""The lossless tests have teeth: each classic bug of tree verification, planted, makes a handful of cases differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from sparrow_hf._transformers import CACHE
from sparrow_hf.generation import decoding, verification, verifiers
from sparrow_hf.generation.caches import HeldCache
from sparrow_hf.generation.emission import TokenEmitter
from sparrow_hf.generation.tree import CandidateTree, build_tree

import oracles
from families import FAMILIES
from lossless import Case, make_case, mismatch

TREE = {"num_tree_nodes": 24, "num_draft_levels": 4, "beam_width": 4}
NO_PROCESSOR = {"do_sample": False}


def wrong_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rerank a node hangs under the node before its parent: it sees the wrong ancestors."""

    def build(token_ids: list[int], parents: list[int], *args: Any) -> CandidateTree:
        tree = build_tree(token_ids, parents, *args)
        for node in range(2, len(token_ids)):
            wrong = tree.ancestors[max(parents[node] - 1, 0)].clone()
            wrong[node] = True
            tree.ancestors[node] = wrong
        return tree

    monkeypatch.setattr(oracles, "build_tree", build)


def swapped_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two children of a node answer to each other's token."""

    def build(*args: Any) -> CandidateTree:
        tree = build_tree(*args)
        for children in tree.children:
            if len(children) > 1:
                tokens = list(children)
                nodes = [children[token] for token in tokens]
                children.update(zip(tokens, nodes[1:] + nodes[:1], strict=True))
        return tree

    monkeypatch.setattr(oracles, "build_tree", build)


def unprocessed_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors are left out."""
    choose = TokenEmitter.choose

    def without_processor(self: TokenEmitter, logits: Tensor, argmax: int | None = None) -> int:
        self.choice._processor = LogitsProcessorList()
        return choose(self, logits, argmax)

    monkeypatch.setattr(TokenEmitter, "choose", without_processor)


def two_draws_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The global generator is advanced twice for each token."""
    choose = TokenEmitter.choose

    def choose_twice(self: TokenEmitter, logits: Tensor, argmax: int | None = None) -> int:
        torch.rand(1)
        return choose(self, logits, argmax)

    monkeypatch.setattr(TokenEmitter, "choose", choose_twice)


def position_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are one position too far."""
    monkeypatch.setattr(verification, "tree_position_ids", lambda tree, root: root + tree.depths + 1)


def missing_mrope_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions count tokens, as if visual tokens had one position each."""
    inputs = verifiers.verification_inputs

    def without_delta(target: Any, tree: CandidateTree, *args: Any) -> dict[str, Any]:
        result = inputs(target, tree, *args)
        past = result[CACHE].get_seq_length()
        result["position_ids"] = (past + tree.depths).expand_as(result["position_ids"])
        return result

    monkeypatch.setattr(verifiers, "verification_inputs", without_delta)


def boolean_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention adds a boolean mask as 0 and 1."""
    additive = verification.tree_attention_mask
    monkeypatch.setattr(verification, "tree_attention_mask", lambda *args, **kw: additive(*args, **kw) == 0)


def wrong_kv_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps the newest nodes in layout order, whatever the path."""
    keep = HeldCache._keep
    monkeypatch.setattr(HeldCache, "_keep", lambda self, tree, path: keep(self, tree, list(range(len(path)))))


def criteria_once_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping criteria are checked at the end of a round only."""
    accept, commit = decoding.accept, TokenEmitter.commit

    def commit_unchecked(self: TokenEmitter, token: int) -> None:
        criteria, self._criteria = self._criteria, lambda ids, scores: torch.tensor([False])  # type: ignore[assignment]
        commit(self, token)
        self._criteria = criteria

    def accept_then_check(tree: Any, logits: Any, emitter: TokenEmitter, *args: Any) -> None:
        accept(tree, logits, emitter, *args)
        emitter.finished = bool(emitter._criteria(emitter.input_ids, emitter.choice.scores).all())

    monkeypatch.setattr(TokenEmitter, "commit", commit_unchecked)
    monkeypatch.setattr(decoding, "accept", accept_then_check)


BUGS: dict[Callable[[pytest.MonkeyPatch], None], dict[str, Any]] = {
    wrong_parent: {"draft_fields": TREE},
    swapped_siblings: {"draft_fields": TREE},
    unprocessed_logits: {"generate_kwargs": {"do_sample": False, "repetition_penalty": 1.6}},
    two_draws_per_token: {"generate_kwargs": {"do_sample": True}},
    position_off_by_one: {"draft_fields": TREE},
    missing_mrope_delta: {"family": "qwen2_5_vl", "inputs": {"videos": 1, "num_frames": 4, "seed": 1}},
    boolean_mask: {"attn_implementation": "eager", "draft_fields": TREE},
    wrong_kv_gathered: {"draft_fields": TREE},
    criteria_once_per_round: {"stop": {"max_new_tokens": 24, "custom": 4}},
}


def cases(fixed: dict[str, Any]) -> list[Case]:
    defaults = {
        "drafter": "oracle",
        "generate_kwargs": NO_PROCESSOR,
        "stop": {"max_new_tokens": 20},
        "prompt": "plain",
    }
    return [make_case(number, **({"family": FAMILIES[number].name} | defaults | fixed)) for number in range(4)]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = [mismatch(case) for case in cases(BUGS[plant])]
    assert healthy == [None] * len(healthy)
    plant(monkeypatch)
    assert any(mismatch(case) is not None for case in cases(BUGS[plant]))
