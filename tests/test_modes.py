"""Modes of torch and wrappers of models in which plain `generate()` works: so must a call with a draft."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel

from families import FAMILY_BY_NAME
from oracles import drafting_around

FAMILY = FAMILY_BY_NAME["qwen2_5_vl"]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY.build_target()


@pytest.fixture(scope="module")
def inputs(target: PreTrainedModel) -> dict[str, Tensor]:
    return FAMILY.build_inputs(target, num_frames=4)


def make_draft(target: PreTrainedModel, **overrides: Any) -> SparrowDraftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SparrowDraftModel.from_target(target, **({"num_glimpse_tokens": 4} | overrides))


def lora(draft: SparrowDraftModel) -> Any:
    return peft.get_peft_model(draft, peft.LoraConfig(target_modules=["fc"]))


def compiled(draft: SparrowDraftModel) -> Any:
    return torch.compile(draft, backend="eager")


def compiled_in_place(draft: SparrowDraftModel) -> Any:
    draft.compile(backend="eager")
    return draft


def assert_same_text(target: PreTrainedModel, draft: Any, inputs: dict[str, Tensor]) -> None:
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=draft), plain)
    future = plain[0, inputs["input_ids"].shape[1] :].tolist()
    with drafting_around(future, adversarial=True, seed=3):
        assert torch.equal(target.generate(**inputs, **options, assistant_model=draft), plain)


@pytest.mark.parametrize("shape", [(6, 5, 1), (14, 4, 3)], ids=["chain", "tree"])
@pytest.mark.parametrize("overrides", [{}, {"project_visual": True}], ids=["raw", "projected"])
def test_a_call_under_autocast(target, inputs, shape, overrides) -> None:
    nodes, levels, beams = shape
    sizes = {"num_tree_nodes": nodes, "num_draft_levels": levels, "beam_width": beams}
    draft = make_draft(target, **sizes, **overrides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = target.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert text.shape[1] == inputs["input_ids"].shape[1] + 8
    assert draft.last_generation.new_tokens == 8


@pytest.mark.parametrize("wrap", [lora, compiled, compiled_in_place])
def test_a_wrapped_draft(target, inputs, wrap: Callable[[SparrowDraftModel], Any]) -> None:
    draft = make_draft(target)
    assert_same_text(target, wrap(draft), inputs)
    assert draft.last_generation.rounds > 0


@pytest.mark.parametrize("wrap", [lambda draft: draft, compiled])
def test_a_draft_given_by_its_place(target, inputs, wrap: Callable[[SparrowDraftModel], Any]) -> None:
    """`assistant_model` is the seventh argument of `generate()`."""
    draft, rest = make_draft(target), {name: value for name, value in inputs.items() if name != "input_ids"}
    plain = target.generate(**inputs, max_new_tokens=16)
    output = target.generate(inputs["input_ids"], *[None] * 5, wrap(draft), max_new_tokens=16, **rest)
    assert torch.equal(output, plain)
    assert draft.last_generation.rounds > 0


def test_a_draft_used_in_inference_mode_can_still_be_trained(target, inputs) -> None:
    draft = make_draft(target)
    other_dtype = SparrowDraftModel(copy.deepcopy(draft.config)).double()
    with torch.inference_mode():
        draft.set_vocabulary(range(60))
        assert_same_text(target, draft, inputs)
        assert_same_text(target, other_dtype, inputs)
    assert other_dtype.dtype == torch.float32
    for used in (draft, other_dtype):
        hidden = used.fc(torch.randn(1, 3, 2 * used.config.hidden_size))
        used.compute_logits(hidden).logsumexp(-1).sum().backward()
        assert used.fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference-mode"])
def test_an_edited_head_is_seen_by_a_draft_of_a_smaller_vocabulary(target, inference) -> None:
    target = copy.deepcopy(target)
    draft = make_draft(target)
    draft.set_vocabulary([5, 7, 11])
    states = torch.randn(2, draft.config.hidden_size)
    with torch.inference_mode() if inference else nullcontext():
        before = draft.compute_logits(states)
        target.get_output_embeddings().weight.data.mul_(-1)
        assert torch.equal(draft.compute_logits(states), -before)
        target.to(torch.float64)
        assert torch.allclose(draft.compute_logits(states), -before, atol=1e-6)


def test_a_copy_keeps_dtype_mode_and_what_is_frozen(target, inputs) -> None:
    draft = make_draft(target).double().eval()
    draft.fc.requires_grad_(False)
    draft.provenance = {"trained": {"steps": 7}}
    draft.set_vocabulary([1, 2, 5])
    target.generate(**inputs, max_new_tokens=2, assistant_model=draft)
    twin = copy.deepcopy(draft)
    assert twin.dtype == torch.float64 and not twin.training and twin.last_generation is None
    assert [parameter.requires_grad for parameter in twin.parameters()] == [
        parameter.requires_grad for parameter in draft.parameters()
    ]
    assert all(
        torch.equal(*pair) for pair in zip(draft.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    twin.provenance["trained"]["steps"] = 8
    twin.config.beam_width = 3
    assert draft.provenance["trained"]["steps"] == 7 and draft.config.beam_width != 3
