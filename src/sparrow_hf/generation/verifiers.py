"""What the loop asks of a target in each round: one forward over a tree, and its states at the nodes that stay."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from ..devices import on_device
from ..hidden_states import HiddenStateCollector
from ..targets import TargetView
from .attention import following_masks
from .caches import HeldCache
from .emission import recorded_step
from .self_check import Verification
from .tree import CandidateTree, build_chains
from .verification import advance_in_place, max_levels_before_border, verification_inputs


class Verifier(Protocol):
    """One call's target, as the loop sees it."""

    def max_levels(self) -> int:
        """How deep the next tree may be."""

    def verifying(self, tree: CandidateTree) -> AbstractContextManager[tuple[Tensor, list[int]]]:
        """One forward over the tree. Gives its `(1, N, V)` logits and the path to keep, empty."""

    def features(self, path: list[int]) -> Tensor:
        """`(1, n, features · H)` states of the last forward at the nodes of a path."""

    def close(self, outlives_call: bool) -> None:
        """After the last round; the cache may be used by others if it outlives the call."""


class TargetVerifier:
    """Verifies with the target as it is and its own cache: trees of one sequence, or chains of several.

    Args:
        ways: With which attention function chains and trees are verified.
        layer_ids: Layers whose states the draft reads.
        first_position: `(…, 1)` position of the first generated token.
        model_kwargs: Those of the next plain step.
        held: The cache of `model_kwargs`, as one keeps paths in it.
        recorded: Outputs of every step that the call asked for; each round adds those of its tokens.
    """

    def __init__(
        self,
        view: TargetView,
        ways: Verification,
        layer_ids: Sequence[int],
        first_position: Tensor,
        model_kwargs: dict[str, Any],
        held: HeldCache,
        recorded: dict[str, tuple[Any, ...]],
    ):
        self._view = view
        self._ways = ways
        self._layer_ids = layer_ids
        self._first_position = first_position
        self._model_kwargs = model_kwargs
        self._recorded = recorded
        self._held = held
        self._collector = HiddenStateCollector({})
        self._lead = 0

    def max_levels(self) -> int:
        """How deep the next tree may be."""
        on_this_side = max_levels_before_border(self._view, self._held, self._first_position)
        return min(self._held.spare_slots - 1, on_this_side)

    @contextmanager
    def verifying(self, tree: CandidateTree) -> Iterator[tuple[Tensor, list[int]]]:
        """One forward over the tree. Yields its `(B, N, V)` logits and the path to keep, empty."""
        past_length, self._lead = self._held.length, len(self._held.carried)
        with self._held.verifying(tree) as path:
            by_mask = self._ways.of(tree) == "eager"
            inputs = verification_inputs(
                self._view,
                tree,
                self._held,
                self._first_position,
                self._model_kwargs,
                by_mask or not tree.is_chain,
            )
            self._collector = HiddenStateCollector(dict.fromkeys(self._layer_ids))
            with self._collector.active(), following_masks(by_mask):
                outputs = self._view.model(**inputs, return_dict=True)
            yield outputs.logits[:, -len(tree) :], path
        self._model_kwargs = advance_in_place(self._view.model, outputs, self._model_kwargs, len(path))
        for name in self._recorded:
            self._recorded[name] += tuple(recorded_step(outputs, name, past_length, self._lead, path))

    def features(self, path: list[int]) -> Tensor:
        """`(B, n, features · H)` states of the last forward at the nodes of a path."""
        return self._collector.take_rows([self._lead + node for node in path])

    def close(self, outlives_call: bool) -> None:
        """After the last round.

        Args:
            outlives_call: Somebody will use the cache: it must hold all of the text but its newest token.
        """
        try:
            if self._held.carried and outlives_call:
                self._read_carried()
        finally:
            self._held.close()

    def _read_carried(self) -> None:
        """Runs the target over the carried tokens alone, so that the cache holds them."""
        chain = build_chains(on_device(self._held.carried, self._first_position.device).T)
        self._held.carried = []
        by_mask = self._ways.of(chain) == "eager"
        with self._held.verifying(chain) as path, following_masks(by_mask):
            inputs = verification_inputs(
                self._view, chain, self._held, self._first_position, self._model_kwargs, by_mask
            )
            self._view.model(**inputs, return_dict=True)
            path += range(len(chain))
