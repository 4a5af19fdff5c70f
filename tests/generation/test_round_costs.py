"""What a round costs beside the target's forward: calls of PyTorch, launches, waits for the device, memory.

They are counted, not timed: the numbers are the same on every machine, and a test fails when they grow.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sparrow_hf import SparrowCandidateGenerator, SparrowDraftModel, _transformers
from sparrow_hf.generation import decoding, emission, verifiers
from sparrow_hf.generation.fixed_steps import traces_steps
from sparrow_hf.generation.tree import CandidateTree

from families import FAMILY_BY_NAME
from lossless import left_padded
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
    """Of one round without the target's forward.

    Attributes:
        calls: Of PyTorch's functions, views included.
        launches: Calls that compute something.
        waits: How often the host reads from the device.
        uploads: Tensors made of numbers of the host.
        sizes: Elements of every new tensor, in order.
    """

    calls: int = 0
    launches: int = 0
    waits: int = 0
    uploads: int = 0
    sizes: list[int] = field(default_factory=list)


class Counting(TorchDispatchMode):
    """Counts what is called inside of it, round by round."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[Costs] = []
        self.is_paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.rounds and not self.is_paused:
            costs, name = self.rounds[-1], function.overloadpacket.__name__
            costs.calls += 1
            is_choice = name.startswith("index") and any(each.dtype == torch.bool for each in tensors_in(args[1:2]))
            costs.waits += name in WAITING or is_choice
            costs.uploads += name == "lift_fresh"
            if name not in FREE:
                costs.launches += 1
                costs.sizes += [tensor.numel() for tensor in tensors_in([result]) if not name.endswith("_")]
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @contextmanager
    def watching(self, target: PreTrainedModel) -> Iterator[None]:
        """Leaves out the target's forward, and counts every reading of a tensor by the host."""

        def read(method: Any, tensor: Tensor, *args: Any) -> Any:
            if self.rounds and not self.is_paused:
                self.rounds[-1].waits += 1
            with self.paused():
                return method(tensor, *args)

        with ExitStack() as hooks:
            for register, paused in ((target.register_forward_pre_hook, True), (target.register_forward_hook, False)):
                hooks.callback(register(lambda *_, paused=paused: setattr(self, "is_paused", paused)).remove)
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


def counted(target: PreTrainedModel, shape: str, num_frames: int = 4, padding: int = 0, **options: Any) -> list[Costs]:
    """The rounds of a greedy call, without the first, which makes what the others use, and the last ones, which draft
    less and give out the ids."""
    inputs = FAMILY.build_inputs(target, num_frames=num_frames)
    if padding:
        inputs = left_padded(inputs, FAMILY.tokenizer.pad_token_id, padding)
    options |= {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    plain = target.generate(**inputs, **options)
    text = plain[0, inputs["input_ids"].shape[1] :].tolist()
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_glimpse_tokens=2)
    draft.config.set_tree_shape(shape)
    counting = Counting()
    make = functools.partial(CountedGenerator, counting=counting, future=text, adversarial=True, seed=2)
    with mock.patch.object(decoding, "SparrowCandidateGenerator", make), counting.watching(target), counting:
        output = target.generate(**inputs, **options, assistant_model=draft)
    assert torch.equal(plain, output)
    levels = draft.config.num_draft_levels
    full = [costs for costs, left in zip(counting.rounds, tokens_left(draft), strict=True) if left > levels]
    assert len(full) >= 5 and max(draft.last_generation.accepted[1 : len(full)]) >= 3
    return full[1:-1]


def tokens_left(draft: SparrowDraftModel) -> list[int]:
    """How many tokens were left to write at the beginning of each round."""
    left = [NEW_TOKENS - 1]
    for accepted in draft.last_generation.accepted[:-1]:
        left.append(left[-1] - accepted - 1)
    return left


#: Of the most expensive round. More is no failure of the text, but of the speed on a GPU: see docs/design.md.
MOST: dict[str, dict[str, int]] = {
    "chain-5": {"calls": 260, "launches": 180, "uploads": 1},
    "30-4-8": {"calls": 351, "launches": 223, "uploads": 4},
}


@pytest.mark.skipif(not traces_steps(), reason="the calls were counted with torch 2.11 and newer")
@pytest.mark.parametrize("shape", MOST)
def test_a_round_costs_no_more_than_it_did(target: PreTrainedModel, shape: str) -> None:
    rounds = counted(target, shape)
    dearest = {name: max(getattr(costs, name) for costs in rounds) for name in MOST[shape]}
    assert not {name: count for name, count in dearest.items() if count > MOST[shape][name]}
    # The drafted tokens, and the target's.
    assert {costs.waits for costs in rounds} == {2}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("shape", MOST)
def test_nothing_but_the_mask_grows_with_the_video(target: PreTrainedModel, shape: str, padding: int) -> None:
    short, long = (counted(target, shape, num_frames, padding) for num_frames in (4, 40))
    more_tokens = visual_tokens(target, 40) - visual_tokens(target, 4)
    assert more_tokens > 60
    for before, after in zip(short, long, strict=True):
        assert (before.calls, before.waits, before.uploads) == (after.calls, after.waits, after.uploads)
        # A mask has a column for each row of the cache, and is told which rows are padding. (The folded mask is a
        # place that it is copied to, which is not counted.)
        of_a_token = (6 if shape == "chain-5" else 30) + bool(padding)
        assert sum(after.sizes) - sum(before.sizes) == of_a_token * more_tokens


class Concatenated(TorchDispatchMode):
    """Notes how many numbers every concatenation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == "cat":
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("keeps_cache", [False, True])
def test_the_rows_of_the_target_are_not_copied_in_a_round(target: PreTrainedModel, keeps_cache: bool) -> None:
    """Unless the cache is given back: it is then the one that plain `generate()` makes."""
    copied, decode = [], _transformers.decoding
    for num_frames in (4, 40):
        inputs = FAMILY.build_inputs(target, num_frames=num_frames)
        torch.manual_seed(0)
        draft = SparrowDraftModel.from_target(target, num_glimpse_tokens=2)
        concatenated = Concatenated()

        @contextmanager
        def noted(target: Any, noted: Concatenated = concatenated) -> Iterator[None]:
            with decode(target), noted:
                yield

        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": keeps_cache}
        with mock.patch.object(_transformers, "decoding", noted):
            target.generate(**inputs, **options, assistant_model=draft)
        copied.append(sum(concatenated.sizes))
    assert (copied[0] < copied[1]) == keeps_cache


def visual_tokens(target: PreTrainedModel, num_frames: int) -> int:
    ids = FAMILY.build_inputs(target, num_frames=num_frames)["input_ids"]
    return int(torch.isin(ids, torch.tensor(FAMILY.visual_token_ids)).sum())


def test_a_processor_costs_one_wait_for_each_token(target: PreTrainedModel) -> None:
    rounds = counted(target, "chain-5", repetition_penalty=1.05)
    assert {costs.waits for costs in rounds} <= set(range(2, 8))


def wait_for_every_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emission, "stop_rules", lambda criteria: None)


def copy_ids_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = emission.TokenEmitter.commit

    def commit(self: emission.TokenEmitter, token: int) -> None:
        stock(self, token)
        assert self.input_ids.shape[1] == self.length

    monkeypatch.setattr(emission.TokenEmitter, "commit", commit)


def read_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = SparrowDraftModel.compute_logits

    def compute(self: SparrowDraftModel, *args: Any, **kwargs: Any) -> Tensor:
        logits = stock(self, *args, **kwargs)
        assert bool(logits.isfinite().any())
        return logits

    monkeypatch.setattr(SparrowDraftModel, "compute_logits", compute)


def lengthen_masks_as_plain_decoding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "advance_in_place", _transformers.advance)


@pytest.mark.parametrize("plant", [wait_for_every_criterion, copy_ids_for_every_token, read_every_level])
def test_a_planted_cost_is_found(target: PreTrainedModel, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_round_costs_no_more_than_it_did(target, "chain-5")


def test_a_mask_that_grows_with_the_video_is_found(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengthen_masks_as_plain_decoding_does(monkeypatch)
    with pytest.raises(AssertionError):
        test_nothing_but_the_mask_grows_with_the_video(target, "chain-5", padding=3)
