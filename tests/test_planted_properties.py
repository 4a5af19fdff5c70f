"""Each property of a target that the engine heeds, forgotten on purpose: the cases of a family that has it differ."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparrow_hf import hidden_states
from sparrow_hf.generation import caches, decoding, verification, verifiers
from sparrow_hf.generation.self_check import Verification
from sparrow_hf.generation.tree import CandidateTree

from lossless import make_case, mismatch

TREE = {"num_tree_nodes": 24, "num_draft_levels": 4, "beam_width": 4}
CHAIN = {"num_tree_nodes": 6, "num_draft_levels": 5, "beam_width": 1}


def positions_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that counts positions itself counts the nodes of a tree as one text."""
    inputs = verifiers.verification_inputs

    def without_positions(*args: Any) -> dict[str, Any]:
        return inputs(*args) | {"position_ids": None}

    monkeypatch.setattr(verifiers, "verification_inputs", without_positions)


def windows_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node sees all that the cache has."""
    mask = verification.tree_attention_mask

    def without_window(*args: Any, window: int | None = None) -> Tensor:
        return mask(*args)

    monkeypatch.setattr(verification, "tree_attention_mask", without_window)


def windows_by_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node stands where it lies in the tree, not where its path puts it."""
    mask = verification.tree_attention_mask

    def by_layout(tree: CandidateTree, *args: Any, window: int | None = None) -> Tensor:
        wide = mask(tree, *args)
        if window is not None:
            rows = torch.arange(wide.shape[-1])
            last = wide.shape[-1] - len(tree) + torch.arange(len(tree))
            wide = wide.masked_fill(rows <= (last - window)[:, None], torch.finfo(wide.dtype).min)
        return wide

    monkeypatch.setattr(verification, "tree_attention_mask", by_layout)


def one_mask_for_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of the layers with full attention is given to those with windows."""
    masks = verification.tree_attention_masks

    def one(*args: Any) -> Any:
        found = masks(*args)
        return found["full_attention"] if isinstance(found, dict) else found

    monkeypatch.setattr(verification, "tree_attention_masks", one)


def old_rows_dropped_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows keep as many rows as they need, rejected ones among them."""
    monkeypatch.setattr(caches, "record_past", lambda cache, on: None)


def rows_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share keys and values run for the wanted logits only."""
    monkeypatch.setattr(hidden_states._AllRowsHook, "__call__", lambda *args: None)


def convolutions_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected inputs stay in the cache of a convolution."""
    monkeypatch.setattr(caches, "convolution_layers", lambda cache: [])


def trees_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees are verified whatever the layers are."""
    everywhere = Verification("own", "own")
    monkeypatch.setattr(decoding, "how_to_verify", lambda view: everywhere)


BUGS: dict[Callable[[pytest.MonkeyPatch], None], dict[str, Any]] = {
    positions_not_given: {"family": "hyperclovax_vision_v2", "draft_fields": TREE},
    windows_forgotten: {"family": "gemma4", "draft_fields": TREE},
    windows_by_layout: {"family": "gemma4", "draft_fields": TREE},
    one_mask_for_all_kinds: {"family": "gemma4_unified", "draft_fields": TREE},
    old_rows_dropped_too_early: {"family": "gemma4", "draft_fields": CHAIN},
    rows_left_out: {"family": "gemma4-shared", "draft_fields": CHAIN},
    convolutions_not_cut: {"family": "lfm3_vl", "draft_fields": CHAIN},
    trees_everywhere: {"family": "minimax_m3_vl-sparse", "draft_fields": TREE},
}


def found(fixed: dict[str, Any], drafter: str) -> Iterator[str]:
    for number in range(6):
        case = make_case(
            number,
            drafter=drafter,
            attn_implementation="sdpa",
            generate_kwargs={"do_sample": False},
            stop={"max_new_tokens": 20},
            inputs={"videos": 1, "num_frames": 2, "seed": 0},
            prompt="plain",
            draft_vocab_size=None,
            **fixed,
        )
        try:
            yield from filter(None, [mismatch(case)])
        except RuntimeError as error:
            yield str(error)


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_forgotten_property_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert next(found(BUGS[plant], "adversary"), None)


@pytest.mark.full
@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_the_same_cases_agree_without_it(plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    assert not list(found(BUGS[plant], "adversary"))
