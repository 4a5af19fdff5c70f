"""Whatever raises in the middle of a call, the user's cache ends as plain `generate()` leaves it, and can go on."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE, attention_layers, cache_tensors, recurrent_states

from families import FAMILY_BY_NAME
from oracles import OracleGenerator, drafting_around

FULL = pytest.mark.full
pytestmark = pytest.mark.filterwarnings("ignore:.* cannot verify trees")
NEW_TOKENS = 12
QUESTION = torch.tensor([[20, 21, 22, 23]])
SHAPES = {
    "chain": {"num_draft_levels": 5},
    "tree": {"num_tree_nodes": 14, "num_draft_levels": 4, "beam_width": 3},
}


class Stop(BaseException):
    """Raised on purpose; no `Exception`, as Ctrl-C is none."""


class Raising(BaseStreamer):
    """A streamer that raises once the text has `length` tokens."""

    def __init__(self, length: int):
        self.length = length
        self.streamed = 0

    def check(self, length: int) -> None:
        if length == self.length:
            raise Stop

    def put(self, value: Tensor) -> None:
        self.streamed += value.numel()
        self.check(self.streamed)

    def end(self) -> None: ...


class RaisingProcessor(LogitsProcessor, Raising):
    """A processor that does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check(input_ids.shape[1])
        return scores


class RaisingCriterion(StoppingCriteria, Raising):
    """A criterion that does."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.check(input_ids.shape[1])
        return torch.tensor([False])


ROLES: dict[str, Callable[[int], dict[str, Any]]] = {
    "streamer": lambda length: {"streamer": Raising(length)},
    "processor": lambda length: {"logits_processor": LogitsProcessorList([RaisingProcessor(length)])},
    "criterion": lambda length: {"stopping_criteria": StoppingCriteriaList([RaisingCriterion(length)])},
}


def new_cache(target: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=target.config.get_text_config())


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    return [*(tensor for pair in cache_tensors(cache) for tensor in pair), *recurrent_states(cache)]


def second_turn(target: PreTrainedModel, text: Tensor, cache: DynamicCache, draft: SparrowDraftModel | None) -> Tensor:
    ids = torch.cat((text, QUESTION), dim=1)
    kwargs = {CACHE: cache, "max_new_tokens": 8, "assistant_model": draft}
    return target.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)


@pytest.fixture(
    params=["qwen2_5_vl", "qwen3_5", *(pytest.param(name, marks=FULL) for name in ("llava_onevision", "qwen3_5_moe"))],
    scope="module",
)
def setting(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Any], Tensor]:
    """A target, inputs, and the text plain `generate()` gives."""
    family = FAMILY_BY_NAME[request.param]
    target = family.build_target()
    inputs = family.build_inputs(target)
    return target, inputs, target.generate(**inputs, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("token", [1, 3, pytest.param(2, marks=FULL), pytest.param(9, marks=FULL)])
def test_the_cache_is_plains(setting, shape: str, role: str, token: int) -> None:
    target, inputs, text = setting
    prompt = inputs["input_ids"].shape[1]
    draft = SparrowDraftModel.from_target(target, **SHAPES[shape])
    caches = []
    for assistant in (None, draft):
        caches.append(new_cache(target))
        kwargs = inputs | {CACHE: caches[-1], "max_new_tokens": NEW_TOKENS} | ROLES[role](prompt + token)
        with pytest.raises(Stop), drafting_around(text[0, prompt:].tolist(), adversarial=True, seed=token):
            target.generate(**kwargs, assistant_model=assistant)
    for expected, found in zip(*map(tensors_of, caches), strict=True):
        assert expected.shape == found.shape
        assert torch.allclose(expected, found, atol=1e-3)
    said = text[:, : prompt + token]
    assert torch.equal(second_turn(target, said, caches[0], None), second_turn(target, said, caches[1], draft))


@contextmanager
def raising_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int):
    """`owner.name` raises at its `call`-th call."""
    stock, calls = getattr(owner, name), []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Stop
        return stock(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising)
        yield


def places(target: PreTrainedModel) -> dict[str, tuple[Any, str, int, int]]:
    """What raises: an owner, its method, in which call, and rows more than the committed tokens but the newest."""
    layers = target.get_decoder().layers
    return {
        "draft-prefill": (OracleGenerator, "prefill", 1, 0),
        "draft-proposes": (OracleGenerator, "propose", 2, 0),
        "draft-extends": (OracleGenerator, "extend", 2, 0),
        # Plain `generate()` would have the row of the newest token in every layer, too.
        "head": (target.get_output_embeddings(), "forward", 3, 1),
        "norm": (target.get_decoder().norm, "forward", 3, 1),
        # Plain `generate()` would have it in some layers only: nothing of it is kept.
        "first-layer": (layers[0], "forward", 3, 0),
        "last-layer": (layers[-1].mlp, "forward", 3, 1),
        "between-layers": (layers[2], "forward", 3, 0),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", places(FAMILY_BY_NAME["qwen2_5_vl"].build_target()))
def test_raised_by_draft_or_target(setting, shape: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs, text = setting
    prompt = inputs["input_ids"].shape[1]
    draft = SparrowDraftModel.from_target(target, **SHAPES[shape])
    owner, name, call, more = places(target)[place]
    cache = new_cache(target)
    with drafting_around(text[0, prompt:].tolist(), adversarial=True, seed=1):
        with raising_at(monkeypatch, owner, name, call), pytest.raises(Stop):
            target.generate(**inputs, **{CACHE: cache}, max_new_tokens=NEW_TOKENS, assistant_model=draft)
    committed = draft.last_generation.new_tokens
    assert {layer.get_seq_length() for layer in attention_layers(cache)} == {prompt + committed - 1 + more}
    said = text[:, : prompt + committed]
    # Plain generate() goes on from that cache as from none.
    fresh = new_cache(target)
    target.generate(**inputs, **{CACHE: fresh}, max_new_tokens=committed)
    assert torch.equal(second_turn(target, said, cache, None), second_turn(target, said, fresh, None))
