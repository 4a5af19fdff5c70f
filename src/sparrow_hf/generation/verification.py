"""Verification of a draft tree: its mask and positions for one target forward, and the exact walk.

Pure functions over tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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


def walk(
    tree: CandidateTree, choose: Callable[[int], int], commit: Callable[[int, bool], bool], path: list[int]
) -> None:
    """Follows the target's own tokens down the tree (paper, section 3.6).

    Both callables are called exactly once per committed token, in order.

    Args:
        choose: Node → the target's token after it.
        commit: Takes that token and whether it had been drafted; returns whether generation is finished. The token
            that stops generation may be a drafted one.
        path: Empty; gets the nodes whose successor is chosen, each before it is: the root, then the accepted nodes the
            walk leaves again. The target's cache must keep their keys and values, even if a callable raises.
    """
    node: int | None = 0
    while node is not None:
        path.append(node)
        token = choose(node)
        child = tree.children[node].get(token)
        finished = commit(token, child is not None)
        node = None if finished else child
