"""Drafters that know the answer, so that tests cover what an untrained draft never reaches.

A random draft is right once in a vocabulary: nearly every round ends at the root. Here the text that plain
`generate()` gave is known beforehand, and trees are grown around it:

* an *oracle* drafts the true continuation in full, hidden among wrong branches;
* an *adversary* drafts it up to a random depth only and goes wrong there; right tokens hang under wrong parents, and
  siblings are in random order.

Only the proposals are replaced: the draft still reads the target's states, the loop still verifies.
"""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from sparrow_hf import SparrowCandidateGenerator, TreeShape
from sparrow_hf.generation import decoding
from sparrow_hf.generation.static_drafts import StaticCandidateGenerator
from sparrow_hf.generation.tree import CandidateTree, build_tree


class _Knowing:
    """Of a candidate generator: proposes trees grown around a known text.

    Args:
        future: All tokens plain `generate()` emitted.
        adversarial: Leave the text at a random depth of each round, instead of following it to the end.
        seed: Of everything random about the trees; torch's generators are left alone.
    """

    def __init__(self, *args: Any, future: list[int], adversarial: bool, seed: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._future = future
        self._adversarial = adversarial
        self._random = random.Random(seed)
        self._root_index = 0  # of the root in `future`
        self._root = -1

    def prefill(self, states: dict[int, Tensor], first_token: int) -> None:
        super().prefill(states, first_token)
        self._root = first_token

    def extend(self, features: Tensor, next_tokens: list[int]) -> None:
        super().extend(features, next_tokens)
        self._root_index += len(next_tokens)
        self._root = next_tokens[-1]

    def propose(self, max_levels: int) -> CandidateTree:
        config = self.draft.config
        levels = min(self.shape.num_draft_levels, max_levels)
        shape = TreeShape(self.shape.num_tree_nodes if levels else 1, levels, self.shape.beam_width)
        forbidden = set(config.visual_token_ids or [])
        allowed = [token for token in range(config.vocab_size) if token not in forbidden]
        truth = self._future[self._root_index + 1 :][:levels]
        # What would follow the end of the text, were it not the end: stopping is not the drafter's business.
        truth += self._random.choices(allowed, k=levels - len(truth))
        depth = self._random.randint(0, levels) if self._adversarial else levels
        # No drafter may propose a placeholder, not even where the target generates one.
        depth = next((index for index, token in enumerate(truth[:depth]) if token in forbidden), depth)
        return grow_tree(self._random, self._root, truth, depth, shape, allowed)


class OracleGenerator(_Knowing, SparrowCandidateGenerator):
    """In place of the one that drafts as texts grow."""


class StaticOracleGenerator(_Knowing, StaticCandidateGenerator):
    """In place of the one that drafts in fixed shapes."""


def grow_tree(
    rng: random.Random, root: int, truth: list[int], depth: int, shape: TreeShape, allowed: list[int]
) -> CandidateTree:
    """A tree that holds the first `depth` tokens of `truth` as a path from its root, and decoys.

    Args:
        truth: True continuation of the root, as long as the tree may get deep.
        shape: With `beam_width=1` the tree is a chain that goes wrong after `depth` tokens.
        allowed: Token ids a decoy may have.
    """
    parents, tokens, depths = [-1, *range(depth)], [root, *truth[:depth]], list(range(depth + 1))
    num_nodes = len(truth) + 1 if shape.beam_width == 1 else shape.num_tree_nodes
    while len(tokens) < num_nodes:
        inner = [node for node, node_depth in enumerate(depths) if node_depth < len(truth)]
        parent = len(tokens) - 1 if shape.beam_width == 1 else rng.choice(inner)
        taken = {token for node, token in enumerate(tokens) if parents[node] == parent}
        true_token = truth[depths[parent]]
        # Under a wrong parent the right token is the best decoy; under a right one it would be no decoy.
        if parent <= depth or true_token in taken or true_token not in allowed or rng.random() < 0.3:
            token = rng.choice([token for token in allowed if token not in taken and token != true_token])
        else:
            token = true_token
        parents.append(parent)
        tokens.append(token)
        depths.append(depths[parent] + 1)

    # Number the nodes anew, in a random order that puts parents before children.
    order = [0]
    while len(order) < len(tokens):
        order.append(
            rng.choice([node for node, parent in enumerate(parents) if node not in order and parent in order])
        )
    position = {node: index for index, node in enumerate(order)} | {-1: -1}
    return build_tree([tokens[node] for node in order], [position[parents[node]] for node in order])


@contextmanager
def drafting_around(future: list[int], *, adversarial: bool, seed: int = 0) -> Iterator[None]:
    """Lets every `generate()` call inside draft around `future` (the new tokens of a plain run)."""
    knowing = {"future": future, "adversarial": adversarial, "seed": seed}
    with (
        mock.patch.object(decoding, "SparrowCandidateGenerator", functools.partial(OracleGenerator, **knowing)),
        mock.patch.object(decoding, "StaticCandidateGenerator", functools.partial(StaticOracleGenerator, **knowing)),
    ):
        yield
