"""Bugs of targets with recurrent layers, planted: the comparison with plain `generate()` finds each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from transformers import DynamicCache

from sparrow_hf.generation import caches, verifiers
from sparrow_hf.generation.caches import HeldCache, RecurrentCache
from sparrow_hf.generation.tree import CandidateTree

from lossless import Case, make_case, mismatch

pytestmark = pytest.mark.filterwarnings("ignore:.* cannot verify trees")


def state_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecurrentCache, "_put_back", lambda self: HeldCache._keep_rows(self, []))


def convolution_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = caches.recurrent_states

    def without_convolutions(cache: DynamicCache) -> list[Tensor]:
        # (B, channels, kernel) inputs of convolutions, (B, heads, K, V) states.
        return [state for state in stock(cache) if state.ndim == 4]

    monkeypatch.setattr(caches, "recurrent_states", without_convolutions)


def _after_keep(monkeypatch: pytest.MonkeyPatch, change: Callable[[RecurrentCache, int], None]) -> None:
    stock = RecurrentCache._keep

    def keep(self: RecurrentCache, tree: CandidateTree, path: list[int]) -> None:
        before = len(self.carried)
        stock(self, tree, path)
        change(self, before)

    monkeypatch.setattr(RecurrentCache, "_keep", keep)


def carried_tokens_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    _after_keep(monkeypatch, lambda held, before: held.carried.clear())


def carried_tokens_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _after_keep(monkeypatch, lambda held, before: held.carried.extend(held.carried[before:]))


def carried_by_the_last_round_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(held: RecurrentCache, before: int) -> None:
        held.carried = held.carried[before:]

    _after_keep(monkeypatch, forget)


def old_state_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a chain that was accepted to its end, the states before it count as saved."""
    stock = RecurrentCache._keep

    def keep(self: RecurrentCache, tree: CandidateTree, path: list[int]) -> None:
        saved = self._saved
        stock(self, tree, path)
        self._saved = saved

    monkeypatch.setattr(RecurrentCache, "_keep", keep)


def walk_reads_the_carried_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are counted from the first row of the forward, not from the tree's."""
    stock = verifiers.TargetVerifier.verifying

    @contextmanager
    def verifying(self: Any, tree: CandidateTree) -> Iterator[tuple[Tensor, list[int]]]:
        with stock(self, tree) as (logits, path):
            yield logits.roll(self._lead, dims=1), path

    monkeypatch.setattr(verifiers.TargetVerifier, "verifying", verifying)


BUGS = (
    state_not_put_back,
    convolution_not_put_back,
    carried_tokens_lost,
    carried_tokens_twice,
    carried_by_the_last_round_only,
    old_state_put_back,
    walk_reads_the_carried_rows,
)


def healthy_case(number: int) -> Case:
    return make_case(
        number,
        family="qwen3_5",
        drafter="adversary",
        draft_fields={"num_draft_levels": 4},
        generate_kwargs={"do_sample": False},
        stop={"max_new_tokens": 20},
    )


def test_healthy_cases_agree() -> None:
    assert [mismatch(healthy_case(number)) for number in range(3)] == [None] * 3


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(mismatch(healthy_case(number)) is not None for number in range(3))
