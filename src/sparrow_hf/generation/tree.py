"""The dynamic draft tree of EAGLE-2 (paper, section 3.6): grown level by level, reranked, laid out for one forward.

Pure functions over tensors; imports torch only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    ancestors = torch.eye(len(token_ids), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            children[parent][token_ids[node]] = node
            ancestors[node] |= ancestors[parent]
    return CandidateTree(
        token_ids=torch.tensor([token_ids], device=device),
        depths=torch.tensor(depths, device=device),
        ancestors=ancestors.to(device),
        children=children,
        is_chain=all(parent == node - 1 for node, parent in enumerate(parents)),
    )


def build_chains(token_ids: Tensor) -> CandidateTree:
    """The chains of a batch, from the `(B, N)` tokens of their nodes, the roots first."""
    order = torch.arange(token_ids.shape[1], device=token_ids.device)
    return CandidateTree(token_ids, depths=order, ancestors=order <= order[:, None], children=[], is_chain=True)


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
        # Pool index and cumulative log-probability of the frontier the next level grows from.
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
        device = log_probs.device
        if self._frontier is None or self._frontier_scores is None:
            # The root is −1.
            self._frontier = torch.full((1,), -1, device=device)
            self._frontier_scores = log_probs.new_zeros(1)
        width = min(self._beam, log_probs.shape[-1])
        best, tokens = log_probs.topk(width, dim=-1)
        if self._token_ids is not None:
            tokens = self._token_ids[tokens]
        scores = (best + self._frontier_scores[:, None]).flatten()
        # pool      … | f0c0 f0c1 f1c0 f1c1 |        f = frontier node, c = its continuation
        # origins        0    0    1    1            and first = pool index of f0c0
        first, tokens = self._size, tokens.flatten()
        origins = torch.arange(log_probs.shape[0], device=device).repeat_interleave(width)
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._parents.append(self._frontier[origins])
        self._size += len(scores)

        self._frontier_scores, chosen = scores.topk(min(self._beam, len(scores)))
        self._frontier = first + chosen
        return tokens[chosen], origins[chosen]

    def best_tree(self, root_token: int, num_nodes: int, device: torch.device | str) -> CandidateTree | None:
        """The `num_nodes − 1` most probable candidates under their root, or `None` if a score is not a number."""
        if not self._scores:
            return build_tree([root_token], [-1], device)
        return tree_of_nodes(root_token, self.best(num_nodes).tolist(), device=device)

    def best(self, num_nodes: int) -> Tensor:
        """The `num_nodes − 1` most probable candidates, in the order of the pool.

        A child is never more probable than its parent and comes after it in the pool, so a stable sort never keeps a
        child without its parent.

        Returns:
            `(4, n)` float64, which holds every id exactly: tokens, parents in the pool, places in the pool, scores.
        """
        scores = torch.cat(self._scores)
        order = torch.sort(scores, descending=True, stable=True).indices[: num_nodes - 1].sort().values
        parts = (torch.cat(self._tokens)[order], torch.cat(self._parents)[order], order, scores[order])
        return torch.stack([part.double() for part in parts])


def tree_of_nodes(
    root_token: int, nodes: list[list[float]], max_levels: int | None = None, device: torch.device | str = "cpu"
) -> CandidateTree | None:
    """The tree of what [`~CandidatePool.best`] returned; impossible tokens (placeholders) are left out.

    Args:
        max_levels: Deeper nodes are left out as well.

    Returns:
        `None` if a score is not a number.
    """
    tokens, parents, depths, node_of = [root_token], [-1], [0], {-1: 0}
    for token, parent, index, score in zip(*nodes, strict=True):
        if math.isnan(score):
            return None
        if score > -math.inf and parent in node_of and (max_levels is None or depths[node_of[int(parent)]] < max_levels):
            node_of[int(index)] = len(tokens)
            tokens.append(int(token))
            parents.append(node_of[int(parent)])
            depths.append(depths[parents[-1]] + 1)
    return build_tree(tokens, parents, device)
