"""Verification of a draft tree: its mask and positions for one target forward, the exact walk, the commit of its KV.

Pure functions over tensors, and the cache they act on.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from .._transformers import cache_tensors, drop_newest
from ..draft_inputs import additive_mask
from .tree import CandidateTree


def tree_attention_mask(
    tree: CandidateTree, past_length: int, dtype: torch.dtype, prefix_mask: Tensor | None = None
) -> Tensor:
    """`(1, 1, N, past + N)` additive mask: every node sees the prefix, its ancestors and itself.

    Args:
        prefix_mask: `(1, ≥ past)`, 0 on padding; `None` without padding.
    """
    prefix = tree.ancestors.new_ones((len(tree), past_length))
    if prefix_mask is not None:
        prefix &= prefix_mask[0, :past_length].to(prefix.device) != 0
    return additive_mask(torch.cat((prefix, tree.ancestors), dim=1)[None], dtype)


def tree_position_ids(tree: CandidateTree, root_position: Tensor) -> Tensor:
    """`(…, N)` positions of the nodes: the root's `(…, 1)`, plus the depth. Holds for 1-D and M-RoPE alike."""
    return root_position + tree.depths.to(root_position.device)


def walk(tree: CandidateTree, choose: Callable[[int], int], commit: Callable[[int, bool], bool]) -> list[int]:
    """Follows the target's own tokens down the tree (paper, section 3.6).

    Both callables are called exactly once per committed token, in order.

    Args:
        choose: Node → the target's token after it.
        commit: Takes that token and whether it had been drafted; returns whether generation is finished. The token
            that stops generation may be a drafted one.

    Returns:
        Nodes whose successor was committed: the root, then the accepted nodes the walk left again. Their keys and
        values are what the target's cache must keep.
    """
    node, path = 0, [0]
    while True:
        token = choose(node)
        child = tree.children[node].get(token)
        finished = commit(token, child is not None)
        if finished or child is None:
            return path
        node = child
        path.append(node)


def commit_path(cache: DynamicCache, path: list[int], num_nodes: int) -> None:
    """Keeps the entries of `path` of the `num_nodes` newest cache entries, in place, and drops the rest.

    before   … prefix | n0 n1 n2 n3 n4 |      path = [0, 2, 4]
    after    … prefix | n0 n2 n4 |
    """
    if path != list(range(len(path))):
        for keys, values in cache_tensors(cache):
            start = keys.shape[-2] - num_nodes
            source = torch.tensor(path, device=keys.device) + start
            kept = slice(start, start + len(path))
            keys[:, :, kept] = keys[:, :, source]
            values[:, :, kept] = values[:, :, source]
    drop_newest(cache, num_nodes - len(path))
