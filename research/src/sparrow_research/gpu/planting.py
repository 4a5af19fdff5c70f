"""Drafts that are accepted as a trained draft's would be, of a draft that is random.

The draft computes all that it always does; then tokens of its tree are replaced by those that are known to come, up to
a length drawn for each round. The target verifies them as any others.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparrow_hf import SparrowCandidateGenerator
from sparrow_hf.generation.tree import CandidateTree, build_tree

#: How often the next token of a chain is accepted: 5.4 tokens per round of a chain of 5, and 8.9 of a chain of 10,
#: close to what this project's trained drafts gave.
ACCEPTANCE = 0.957


def expected_tau(levels: int) -> float:
    """Tokens per round of a chain."""
    return sum(ACCEPTANCE**depth for depth in range(levels + 1))


@contextmanager
def planted(coming: list[int], vocabulary: int) -> Iterator[None]:
    """In this context, drafts propose `coming`, the new tokens of a call as they are known to be, with mistakes.

    Where the call decides otherwise than before (bf16), drafts are rejected.
    """
    draws = random.Random(0)

    def planting(propose: Any) -> Any:
        def proposed(generator: Any, *args: Any, **kwargs: Any) -> CandidateTree:
            tree = propose(generator, *args, **kwargs)
            return with_path(tree, coming[generator.draft.last_generation.new_tokens :], vocabulary, draws)

        return proposed

    kinds = [SparrowCandidateGenerator, *SparrowCandidateGenerator.__subclasses__()]
    stock = {kind: vars(kind)["propose"] for kind in kinds if "propose" in vars(kind)}
    for kind, propose in stock.items():
        kind.propose = planting(propose)
    try:
        yield
    finally:
        for kind, propose in stock.items():
            kind.propose = propose


def with_path(tree: CandidateTree, coming: list[int], vocabulary: int, draws: random.Random) -> CandidateTree:
    """The tree with `coming` on the path to its last deepest node, as far as luck goes; then a wrong token."""
    tokens, ancestors = tree.token_ids[0].tolist(), tree.ancestors.tolist()
    depths = tree.depths.tolist()
    # A node's parent is the nearest of its ancestors, which lie in order before it.
    parents = [max((other for other in range(node) if row[other]), default=-1) for node, row in enumerate(ancestors)]
    deepest = max(range(len(tokens)), key=lambda node: (depths[node], node))
    path = [node for node in range(1, deepest + 1) if ancestors[deepest][node]]
    for node, token in zip(path, coming, strict=False):
        is_right = draws.random() < ACCEPTANCE
        for other, parent in enumerate(parents):
            if parent == parents[node] and tokens[other] == token:
                # No other child may be the right one.
                tokens[other] = (token + 2) % vocabulary
        tokens[node] = token if is_right else (token + 1) % vocabulary
        if not is_right:
            break
    return build_tree(tokens, parents, tree.token_ids.device)
