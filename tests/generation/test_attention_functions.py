"""Attention functions that take no 4-D mask, ignore it, or compute something else: the text stays plain's.

FlashAttention runs on a GPU only. `flash` below stands in for it: as it does, it gets masks of one row per sequence
from transformers, aligns a block of queries with the newest keys, and fails for a 4-D mask.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import UnsupportedTargetError
from sparrow_hf.generation import decoding, verifiers
from sparrow_hf.generation.self_check import Verification, how_to_verify

from batches import batch_of
from batches import drafting_around as drafting_batches_around
from families import FAMILY_BY_NAME
from lossless import left_padded
from oracles import drafting_around

TREE = {"num_tree_nodes": 14, "num_draft_levels": 4, "beam_width": 3}


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, visible: Any, scale: float | None) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    result = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    return result.transpose(1, 2).contiguous(), None


def causal(query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """Bool `(Q, K)`: the last query sees all keys, the one before all but one, …"""
    rows, keys = query.shape[2], key.shape[2]
    last = torch.arange(keys - rows, keys)[:, None]
    visible = torch.arange(keys) <= last
    return visible if window is None else visible & (torch.arange(keys) > last - window)


def ignores_masks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> Any:
    return attend(module, query, key, value, causal(query, key), scaling)


def flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: Any = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Any:
    if mask is not None and mask.ndim != 2:
        raise RuntimeError(f"FlashAttention takes masks of shape (batch, keys), found {tuple(mask.shape)}")
    if not module.is_causal:
        return attend(module, query, key, value, None, scaling)
    visible = causal(query, key, sliding_window)
    if mask is not None:
        # A row of padding sees itself, else it would be no number.
        visible = visible & mask[:, None, None, :].bool() | causal(query, key, window=1)
    return attend(module, query, key, value, visible, scaling)


def follows_masks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> Any:
    return attend(module, query, key, value, causal(query, key) if mask is None else mask, scaling)


def of_its_own_kind(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1, **_: Any
) -> Any:
    """Ignores masks, and its weights are flatter than softmax attention's."""
    return attend(module, query, key, value, causal(query, key), scaling / 4)


def sees_the_whole_block(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> Any:
    """Causal for prompts; a short block of queries sees all of itself."""
    visible = causal(query, key) if query.shape[2] > 9 else None
    return attend(module, query, key, value, visible, scaling)


def whole_block_of_its_own_kind(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1, **_: Any
) -> Any:
    """Both."""
    return sees_the_whole_block(module, query, key, value, mask, scaling / 4)


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    names: list[str] = []

    def add(function: Callable[..., Any], mask: Callable[..., Any] | None = None) -> str:
        names.append(f"test_{function.__name__}")
        AttentionInterface.register(names[-1], function)
        if mask is not None:
            AttentionMaskInterface.register(names[-1], mask)
        return names[-1]

    yield add
    for name in names:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def build(name: str, family: str = "llava_onevision") -> PreTrainedModel:
    """A target whose text decoder runs on this function; its tower keeps its own."""
    target = FAMILY_BY_NAME[family].build_target("eager")
    target.config.get_text_config()._attn_implementation_internal = name
    return target


def compared(target: PreTrainedModel, inputs: dict[str, Any], draft: SparrowDraftModel, **kwargs: Any) -> None:
    def new_tokens(assistant: SparrowDraftModel | None) -> list[int]:
        torch.manual_seed(5)
        sequences = target.generate(**inputs, assistant_model=assistant, max_new_tokens=20, **kwargs)
        return sequences[0, inputs["input_ids"].shape[1] :].tolist()

    plain = new_tokens(None)
    with drafting_around(plain, adversarial=True, seed=1):
        assert new_tokens(draft) == plain
    with drafting_around(plain, adversarial=False):
        assert new_tokens(draft) == plain
    assert draft.last_generation.k > 2


@pytest.mark.parametrize("do_sample", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("shape", ["chain-5", "14-4-3"])
@pytest.mark.parametrize(
    ("function", "mask", "chains", "trees"),
    [
        (ignores_masks, None, "own", "eager"),
        # It ignores padding too, unlike the function that would verify.
        (ignores_masks, sdpa_mask, "own", None),
        (flash, flash_attention_mask, "own", "eager"),
        (follows_masks, None, "own", "own"),
        (follows_masks, sdpa_mask, "own", "own"),
        # Narrowed to chains.
        (of_its_own_kind, None, "own", None),
        (sees_the_whole_block, None, "eager", "eager"),
    ],
)
def test_the_text_is_plains(register, function, mask, chains, trees, shape: str, do_sample: bool) -> None:
    target = build(register(function, mask))
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    draft = SparrowDraftModel.from_target(target)
    draft.config.set_tree_shape(shape)
    compared(target, inputs, draft, do_sample=do_sample)
    ways = how_to_verify(draft.target)
    assert (ways.chains, ways.trees) == (chains, trees)


@pytest.mark.parametrize("family", [*filter(FAMILY_BY_NAME.get, ["qwen2_5_vl", "gemma4", "kimi_k25", "lfm3_vl"])])
@pytest.mark.parametrize("shape", ["chain-5", "14-4-3"])
def test_flash_attention_of_other_families(register, family: str, shape: str) -> None:
    """Several positions per token, windows, keys wider than values, convolutions; with padding."""
    target = build(register(flash, flash_attention_mask), family)
    draft = SparrowDraftModel.from_target(target)
    draft.config.set_tree_shape(shape)
    inputs = FAMILY_BY_NAME[family].build_inputs(target)
    compared(target, inputs, draft)
    compared(target, left_padded(inputs, 0, 5), draft)


@pytest.mark.parametrize(
    ("function", "mask", "own_pace"),
    [
        (ignores_masks, None, False),
        # The target makes masks, of padding and of what lies behind a row's end, and none is followed.
        (ignores_masks, sdpa_mask, False),
        (flash, flash_attention_mask, True),
        (follows_masks, sdpa_mask, True),
        (of_its_own_kind, None, False),
        (sees_the_whole_block, None, False),
    ],
)
def test_batches(register, function, mask, own_pace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target, family = build(register(function, mask)), FAMILY_BY_NAME["llava_onevision"]
    inputs = batch_of(family, target, [{"videos": 0}, {"videos": 1}, {"videos": 0, "question": "Who?"}])
    draft, held = SparrowDraftModel.from_target(target, num_draft_levels=4), []
    stock = verifiers.verification_inputs

    def noted(view: Any, tree: Any, cache: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        held.append(cache)
        return stock(view, tree, cache, *args, **kwargs)

    monkeypatch.setattr(verifiers, "verification_inputs", noted)
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    futures = plain[:, inputs["input_ids"].shape[1] :].tolist()
    with drafting_batches_around(futures, adversarial=True):
        ours = target.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, ours)
    assert {cache.is_ragged for cache in held} == {own_pace}


def test_a_mask_that_is_not_followed_is_found(register, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree in the function that ignores masks, as if nothing had been tried."""
    target = build(register(ignores_masks))
    draft = SparrowDraftModel.from_target(target, **TREE)
    monkeypatch.setattr(decoding, "how_to_verify", lambda view: Verification("own", "own"))
    with pytest.raises(AssertionError):
        compared(target, FAMILY_BY_NAME["llava_onevision"].build_inputs(target), draft)


def test_a_function_without_a_right_way_is_refused_before_anything_runs(register) -> None:
    target = build(register(whole_block_of_its_own_kind))
    draft = SparrowDraftModel.from_target(target)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    ran: list[int] = []
    target.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedTargetError, match="test_whole_block_of_its_own_kind"):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=4)
    assert not ran


def test_a_function_is_tried_once(register, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparrow_hf.generation import self_check

    tried: list[Any] = []
    measure = self_check.measure
    monkeypatch.setattr(self_check, "measure", lambda view: tried.append(view) or measure(view))
    target = build(register(ignores_masks))
    draft = SparrowDraftModel.from_target(target, **TREE)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    for _ in range(2):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=3)
    assert len(tried) == 1
    # Another function is another question.
    target.config.get_text_config()._attn_implementation_internal = register(follows_masks)
    target.generate(**inputs, assistant_model=draft, max_new_tokens=3)
    assert len(tried) == 2
    target.config.get_text_config()._attn_implementation_internal = "eager"
    target.generate(**inputs, assistant_model=draft, max_new_tokens=3)
    assert len(tried) == 2


def test_calls_without_a_draft_stay_with_the_function(register) -> None:
    """Also beside a verification in another thread, and with a mask of theirs."""
    name = register(ignores_masks, sdpa_mask)
    target, family = build(name), FAMILY_BY_NAME["llava_onevision"]
    inputs = left_padded(family.build_inputs(target), 0, 6)
    before = target.generate(**inputs, max_new_tokens=12)
    draft = SparrowDraftModel.from_target(target, **TREE)
    future = before[0, inputs["input_ids"].shape[1] :].tolist()
    with drafting_around(future, adversarial=False), ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(target.generate, **inputs, max_new_tokens=12, assistant_model=draft if number % 2 else None)
            for number in range(8)
        ]
        assert all(torch.equal(call.result(), before) for call in calls)
