"""Grouped heads in `generate()`: the text is plain's, and verification expands no keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.generation import verification
from sparrow_hf.generation.fixed_steps import traces_steps
from sparrow_hf.generation.grouped_attention import fold

from batches import batch_of
from batches import drafting_around as drafting_batches_around
from grouped_families import FAMILY, GROUPS, target_of
from lossless import left_padded
from oracles import drafting_around

SHAPES = {"chain": (6, 5, 1), "tree": (14, 4, 3)}


class Expanded(TorchDispatchMode):
    """Notes what a target's forwards make that is as large as the keys of all query heads, behind the prompt."""

    def __init__(self, target: PreTrainedModel, prompt_length: int):
        super().__init__()
        self.heads, self.width = target.config.get_text_config().num_attention_heads, 8
        self.prompt_length = prompt_length
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.ndim >= 4 and tensor.shape[-1] == self.width:
                if tensor.shape[-2] > self.prompt_length and tensor.shape[:-2].numel() >= self.heads:
                    self.found.append(tuple(tensor.shape))
        return output

    @contextmanager
    def watching(self, target: PreTrainedModel) -> Iterator[None]:
        """Of the target's decoder only: what the draft holds is small."""
        decoder = target.get_decoder()
        before = decoder.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        after = decoder.register_forward_hook(lambda *_: self.__exit__(None, None, None))
        try:
            yield
        finally:
            before.remove()
            after.remove()


@cache
def plain(name: str, attention: str, padding: int = 0) -> list[int]:
    target = target_of(name, attention)
    given = prompt(name, attention, padding)
    return target.generate(**given, max_new_tokens=20, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()


def prompt(name: str, attention: str, padding: int = 0) -> dict[str, Tensor]:
    given = FAMILY[name].build_inputs(target_of(name, attention))
    return left_padded(given, 0, padding) if padding else given


def draft_of(target: PreTrainedModel, shape: str) -> SparrowDraftModel:
    torch.manual_seed(3)
    draft = SparrowDraftModel.from_target(target)
    draft.config.set_tree_shape(SHAPES[shape])
    return draft


def drafted(name: str, attention: str, shape: str, padding: int = 0) -> tuple[list[int], list[int]]:
    """The text, and how many drafts of each round were accepted."""
    target, given = target_of(name, attention), prompt(name, attention, padding)
    draft = draft_of(target, shape)
    with drafting_around(plain(name, attention, padding), adversarial=True, seed=1):
        sequences = target.generate(**given, max_new_tokens=20, do_sample=False, assistant_model=draft)
    return sequences[0, given["input_ids"].shape[1] :].tolist(), draft.last_generation.accepted


def in_tiers() -> Iterator[Any]:
    """Every family on sdpa and one on each of the others at once, the rest in the full tier."""
    for name in FAMILY:
        for attention in ("sdpa", "sdpa_grouped", "eager"):
            at_once = attention == "sdpa" or name == "qwen2_5_vl-7:1"
            yield pytest.param(name, attention, marks=() if at_once else pytest.mark.full)


@pytest.mark.parametrize("name, attention", list(in_tiers()))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_is_plains(name: str, attention: str, shape: str) -> None:
    text, accepted = drafted(name, attention, shape)
    assert text == plain(name, attention)
    assert max(accepted) > 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["qwen2_5_vl-7:1", "gemma4-4:1-8:1"])
def test_the_text_is_plains_behind_padding(name: str, shape: str) -> None:
    text, accepted = drafted(name, "sdpa", shape, padding=6)
    assert text == plain(name, "sdpa", padding=6)
    assert max(accepted) > 1


@pytest.mark.parametrize("name", ["qwen2_5_vl-7:1", "gemma4-4:1-8:1"])
def test_an_interleaved_mask_changes_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "fold", lambda mask, groups: mask.repeat_interleave(groups, dim=2))
    assert drafted(name, "sdpa", "tree")[0] != plain(name, "sdpa")


def test_the_groups_of_another_kind_of_layer_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {4: 8, 8: 4}
    monkeypatch.setattr(verification, "fold", lambda mask, groups: fold(mask, other[groups]))
    with pytest.raises(RuntimeError):
        drafted("gemma4-4:1-8:1", "sdpa", "tree")


@pytest.mark.skipif(not traces_steps(), reason="an older sdpa expands the keys of single rows, which are plain steps")
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["qwen2_5_vl-7:1", "gemma4-4:1", "gemma4-shared-4:1"])
def test_verification_expands_no_keys_and_values(
    name: str, shape: str, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not folds:
        monkeypatch.setattr(verification, "groups_of", lambda view: {})
    target, given = target_of(name, "sdpa"), prompt(name, "sdpa")
    draft, expanded = draft_of(target, shape), Expanded(target, given["input_ids"].shape[1])
    with drafting_around(plain(name, "sdpa"), adversarial=True, seed=1):
        with expanded.watching(target):
            target.generate(**given, max_new_tokens=20, do_sample=False, assistant_model=draft)
    assert bool(expanded.found) is not folds


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl-7:1", "gemma4-4:1-8:1"])
def test_batches(name: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(name, "sdpa")
    given = batch_of(FAMILY[name], target, [{"videos": 0}, {"videos": 1}, {"videos": 0, "question": "Who?"}])
    masks: list[Tensor] = []
    monkeypatch.setattr(verification, "fold", lambda mask, groups: masks.append(fold(mask, groups)) or masks[-1])
    torch.manual_seed(5)
    expected = target.generate(**given, max_new_tokens=12, do_sample=do_sample)
    draft = draft_of(target, "chain")
    torch.manual_seed(5)
    with drafting_batches_around(expected[:, given["input_ids"].shape[1] :].tolist(), adversarial=True):
        ours = target.generate(**given, max_new_tokens=12, do_sample=do_sample, assistant_model=draft)
    assert torch.equal(ours, expected)
    assert any(len(mask) == 3 and mask.shape[2] % min(GROUPS[name].values()) == 0 for mask in masks)
