"""The dynamic draft tree of EAGLE-2 (paper, section 3.6): grown level by level, reranked, laid out for one forward.

Pure functions over tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import on_device


@dataclass(frozen=True)
class CandidateTree:
    """Drafted tokens as a tree whose root is the last committed token. Parents precede their children.

    Attributes:
        token_ids: `(1, N)`; node 0 is the root. Several sequences have chains of the same length, `(B, N)`.
        depths: `(N,)` distance from the root.
        ancestors: `(N, N)` bool, row i true at i and at every ancestor of i.
        children: Per node, drafted token id → child node. Empty for a batch, whose chains are read off `token_ids`.
        is_chain: Every node is the child of the one before.
    """

    token_ids: Tensor
    depths: Tensor
    ancestors: Tensor
    children: list[dict[int, int]]
    is_chain: bool

    def __len__(self) -> int:
        return self.token_ids.shape[1]


def build_tree(token_ids: list[int], parents: list[int], device: torch.device | str = "cpu") -> CandidateTree:
    """Lays out a tree.

    Args:
        token_ids: Token of each node, the root first.
        parents: Parent of each node, −1 for the root; `parents[i] < i`.
    """
    depths = [0] * len(token_ids)
    children: list[dict[int, int]] = [{} for _ in token_ids]
    ancestors: list[list[int]] = []
    for node, parent in enumerate(parents):
        ancestors.append([0] * len(token_ids) if parent < 0 else ancestors[parent].copy())
        ancestors[node][node] = 1
        if parent >= 0:
            depths[node] = depths[parent] + 1
            children[parent][token_ids[node]] = node
    # One copy to the device.
    rows = on_device([token_ids, depths, *ancestors], device)
    return CandidateTree(
        token_ids=rows[:1],
        depths=rows[1],
        ancestors=rows[2:] != 0,
        children=children,
        is_chain=all(parent == node - 1 for node, parent in enumerate(parents)),
    )


def build_chain(token_ids: Tensor, tokens: list[int]) -> CandidateTree:
    """The chain of one sequence.

    Args:
        token_ids: `(1, N)` tokens of its nodes, the root first.
        tokens: The same without the root, read from the device.
    """
    children = [{token: node} for node, token in enumerate(tokens, start=1)]
    return build_chains(token_ids, [*children, {}])


def build_chains(token_ids: Tensor, children: Sequence[dict[int, int]] = ()) -> CandidateTree:
    """The chains of a batch, from the `(B, N)` tokens of their nodes, the roots first."""
    order = torch.arange(token_ids.shape[1], device=token_ids.device)
    return CandidateTree(token_ids, order, ancestors=order <= order[:, None], children=[*children], is_chain=True)


class CandidatePool:
    """All candidates of one round, in level order, so that a parent always comes before its children.

    Args:
        beam_width: Candidates kept per frontier node, and frontier nodes per level.
        token_ids: `(V,)` token of each column of the log-probabilities; by default column i is token i.
    """

    def __init__(self, beam_width: int, token_ids: Tensor | None = None):
        self._beam = beam_width
        self._token_ids = token_ids
        self._scores: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._size = 0
        # Pool index and cumulative log-probability of the frontier the next level grows from; at first the root.
        self._frontier: Tensor | None = None
        self._frontier_scores: Tensor | None = None

    def add_level(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the best continuations of every frontier node and moves the frontier to the best of them.

        Args:
            log_probs: `(F, V)` log-probabilities after each of the F frontier nodes.

        Returns:
            tokens: `(F',)` ids of the new frontier, F' = `beam_width` at most.
            origins: `(F',)` which node of the old frontier each one continues.
        """
        width = min(self._beam, log_probs.shape[-1])
        scores, tokens = log_probs.topk(width, dim=-1)
        if self._token_ids is not None:
            tokens = self._token_ids[tokens]
        if self._frontier is None or self._frontier_scores is None:
            parents = torch.full_like(tokens, -1)
        else:
            scores = scores + self._frontier_scores[:, None]
            parents = self._frontier[:, None].expand(-1, width)
        # pool      … | f0c0 f0c1 f1c0 f1c1 |        f = frontier node, c = its continuation
        # origins        0    0    1    1            and first = pool index of f0c0
        first, scores, tokens = self._size, scores.flatten(), tokens.flatten()
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._parents.append(parents.flatten())
        self._size += len(scores)

        self._frontier_scores, chosen = scores.topk(min(self._beam, len(scores)))
        self._frontier = chosen + first
        return tokens[chosen], chosen // width

    def best_tree(self, root_token: int, num_nodes: int, device: torch.device | str) -> CandidateTree | None:
        """The `num_nodes − 1` most probable candidates under their root, or `None` if a score is not a number."""
        return tree_of_nodes(root_token, self.best(num_nodes).tolist(), device=device)

    def best(self, num_nodes: int) -> Tensor:
        """The `num_nodes − 1` most probable candidates, in the order of the pool.

        A child is never more probable than its parent and comes after it in the pool, so a stable sort never keeps a
        child without its parent.

        Returns:
            `(4, n)` tokens, parents and places in the pool, scores: all in fp32, which holds whole numbers below 2^24
            exactly, so that they are read from the device at once.
        """
        scores = torch.cat(self._scores)
        order = torch.sort(scores, descending=True, stable=True).indices[: num_nodes - 1].sort().values
        columns = (torch.cat(self._tokens)[order], torch.cat(self._parents)[order], order, scores[order])
        return torch.cat(columns).reshape(len(columns), -1)


def tree_of_nodes(
    root_token: int, nodes: list[list[float]], max_levels: int | None = None, device: torch.device | str = "cpu"
) -> CandidateTree | None:
    """The tree of what [`~CandidatePool.best`] returned; impossible tokens (placeholders) are left out.

    Args:
        max_levels: Deeper nodes are left out as well.

    Returns:
        `None` if a score is not a number.
    """
    if any(math.isnan(score) for score in nodes[-1]):
        return None
    # In the pool: −1 is the root.
    node_of = {-1: 0}
    tokens, parents, depths = [root_token], [-1], [0]
    for token, parent, index, score in zip(*nodes, strict=True):
        node = node_of.get(int(parent))
        if score == -math.inf or node is None or depths[node] == max_levels:
            continue
        node_of[int(index)] = len(tokens)
        tokens.append(int(token))
        parents.append(node)
        depths.append(depths[node] + 1)
    return build_tree(tokens, parents, device)
