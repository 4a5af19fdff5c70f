"""What a round costs beside the target's forward: calls of PyTorch, launches, waits for the device, memory.

They are counted, not timed: the numbers are the same on every machine, and a test fails when they grow.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sparrow_hf import SparrowCandidateGenerator, SparrowDraftModel
from sparrow_hf.generation import decoding
from sparrow_hf.generation.tree import CandidateTree

from families import FAMILY_BY_NAME
from oracles import OracleGenerator

FAMILY = FAMILY_BY_NAME["qwen2_5_vl"]
NEW_TOKENS = 30

#: Calls that launch nothing on a GPU: views, and memory without contents.
FREE = frozenset(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh "
    "new_empty new_empty_strided permute select slice split split_with_sizes squeeze t transpose unbind unfold "
    "unsqueeze view".split()
)
#: Calls that wait for the device, because the host or the shape of their result needs its numbers.
WAITING = frozenset("_local_scalar_dense _unique2 equal masked_select nonzero".split())


@dataclass
class Costs:
    """Of one round without the target's forward; `in_layers` are the calls inside the draft's decoder layers."""

    calls: int = 0
    in_layers: int = 0
    launches: int = 0
    waits: int = 0
    #: Elements of every result that is no view, in order.
    sizes: list[int] = field(default_factory=list)


class Counting(TorchDispatchMode):
    """Counts what is called inside of it, round by round."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[Costs] = []
        self.is_paused = self.is_in_layers = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.rounds and not self.is_paused:
            costs, name = self.rounds[-1], function.overloadpacket.__name__
            costs.calls += 1
            costs.in_layers += self.is_in_layers
            is_choice = name.startswith("index") and any(each.dtype == torch.bool for each in tensors_in(args[1:2]))
            costs.waits += name in WAITING or is_choice
            if name not in FREE:
                costs.launches += 1
                costs.sizes += [tensor.numel() for tensor in tensors_in([result])]
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @contextmanager
    def watching(self, target: PreTrainedModel, draft: SparrowDraftModel) -> Iterator[None]:
        """Leaves out the target's forward, and counts every reading of a tensor by the host."""

        def read(method: Any, tensor: Tensor, *args: Any) -> Any:
            if self.rounds and not self.is_paused:
                self.rounds[-1].waits += 1
            with self.paused():
                return method(tensor, *args)

        def mark(module: nn.Module, name: str) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda *_: setattr(self, name, True)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: setattr(self, name, False)).remove)

        with ExitStack() as hooks:
            mark(target, "is_paused")
            for layer in draft.layers:
                mark(layer, "is_in_layers")
            for name in ("tolist", "cpu", "numpy"):
                counted = functools.partialmethod(functools.partial(read, getattr(Tensor, name)))
                hooks.enter_context(mock.patch.object(Tensor, name, counted))
            yield


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors of lists of lists."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in tensors_in(value)] if isinstance(values, (list, tuple)) else []


class CountedGenerator(OracleGenerator):
    """Drafts, which is counted as the beginning of a round, and then proposes a tree around a known text instead: a
    random draft is hardly ever right."""

    def __init__(self, *args: Any, counting: Counting, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._counting = counting

    def propose(self, max_levels: int) -> CandidateTree:
        self._counting.rounds.append(Costs())
        SparrowCandidateGenerator.propose(self, max_levels)
        with self._counting.paused():
            return super().propose(max_levels)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """A target that writes neither placeholders nor an end, so that no processor has to forbid them."""
    target = FAMILY.build_target()
    with torch.no_grad():
        unwanted = [*FAMILY.visual_token_ids, *target.generation_config.eos_token_id]
        target.get_output_embeddings().weight[unwanted] = 0
    return target


def counted(target: PreTrainedModel, shape: str, num_frames: int = 4, **options: Any) -> list[Costs]:
    """The rounds of a greedy call, but for the first, which makes what the others use, and the last ones, in which
    nothing is left to draft."""
    inputs = FAMILY.build_inputs(target, num_frames=num_frames)
    options |= {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    plain = target.generate(**inputs, **options)
    text = plain[0, inputs["input_ids"].shape[1] :].tolist()
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_glimpse_tokens=2)
    draft.config.set_tree_shape(shape)
    counting = Counting()
    make = functools.partial(CountedGenerator, counting=counting, future=text, adversarial=True, seed=2)
    with mock.patch.object(decoding, "SparrowCandidateGenerator", make), counting.watching(target, draft), counting:
        output = target.generate(**inputs, **options, assistant_model=draft)
    assert torch.equal(plain, output)
    levels = draft.config.num_draft_levels
    full = [costs for costs, left in zip(counting.rounds, tokens_left(draft), strict=True) if left > levels]
    assert len(full) >= 5 and max(draft.last_generation.accepted[1 : len(full)]) >= 3
    return full[1:]


def tokens_left(draft: SparrowDraftModel) -> list[int]:
    """How many tokens were left to write at the beginning of each round."""
    left = [NEW_TOKENS - 1]
    for accepted in draft.last_generation.accepted[:-1]:
        left.append(left[-1] - accepted - 1)
    return left


@pytest.mark.parametrize("shape", ["chain-5", "30-4-8"])
def test_print(target: PreTrainedModel, shape: str) -> None:
    for costs in counted(target, shape):
        print(costs.calls, costs.in_layers, costs.launches, costs.waits, len(costs.sizes), sum(costs.sizes))
    for costs in counted(target, shape, 8):
        print(costs.calls, costs.in_layers, costs.launches, costs.waits, len(costs.sizes), sum(costs.sizes))
