"""Verification of a draft tree: its mask and positions for one target forward, and the exact walk.

Pure functions over tensors.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._transformers import CACHE, advance, attention_of, first_rows_read, makes_masks
from ..devices import on_device
from ..targets import TargetView
from .caches import HeldCache
from .grouped_attention import fold, groups_of
from .tree import CandidateTree

#: Per-token inputs that some families' forward takes; new tokens repeat the newest one (text).
TOKEN_TYPE_KEYS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")

#: What plain decoding lengthens with every token.
_PER_TOKEN_KEYS = ("attention_mask", "position_ids", *TOKEN_TYPE_KEYS)


def verification_inputs(
    view: TargetView,
    tree: CandidateTree,
    held: HeldCache,
    first_position: Tensor,
    model_kwargs: dict[str, Any],
    own_mask: bool,
) -> dict[str, Any]:
    """Inputs of one target forward over the carried tokens and all nodes of a tree.

    cached rows … | c0   c1   | root  d1   d2  …       c: carried tokens
    positions       p    p+1  | p+2   p+2+depth …      p: where the cache ends

    Args:
        first_position: `(…, 1)` position of the first generated token.
        model_kwargs: Those of the first plain step; what has an entry per token need not follow the text.
        own_mask: Give the target a mask of ours even if none can be folded. Without, it makes its own of the 2-D mask,
            as if the rows were one text: right for chains, whatever the kinds of its layers.
    """
    num_carried = len(held.carried)
    num_rows = num_carried + len(tree)
    # A single row is a plain step, which folds its heads itself.
    groups = groups_of(view) if num_rows > 1 else {}
    own_mask = own_mask or bool(groups)
    token_ids = tree.token_ids
    if num_carried:
        token_ids = torch.cat((on_device(held.carried, token_ids.device).T, token_ids), dim=1)
    positions = _positions(tree, num_carried, first_position + held.rows_since_prefill)
    step = {key: value for key, value in model_kwargs.items() if key not in ("attention_mask", "position_ids")}
    for key in TOKEN_TYPE_KEYS:
        if step.get(key) is not None:
            step[key] = step[key][..., -1:].expand(*step[key].shape[:-1], num_rows)
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        mask = held.step_mask(mask, num_rows)
    inputs = view.model.prepare_inputs_for_generation(
        token_ids,
        position_ids=positions,
        attention_mask=None if own_mask else mask,
        is_first_iteration=False,
        **step,
    )
    if own_mask:
        inputs["attention_mask"] = tree_attention_masks(view, tree, held, inputs[CACHE], mask, groups)
    if own_mask or held.is_ragged:
        if inputs.get("position_ids") is None:
            # The model counts the rows itself, as if they were one text.
            start = positions.new_zeros((1, 1)) + held.ends
            inputs["position_ids"] = _positions(tree, num_carried, start) if positions.ndim == 2 else positions
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = len(tree)
    return inputs


def on_device_of(logits: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model_kwargs` with what has an entry per token beside the target's outputs.

    Inputs of a call may lie elsewhere. transformers then moves them in every step, but only if the ids do too.
    """
    moved = {key: model_kwargs[key].to(logits.device) for key in _PER_TOKEN_KEYS if model_kwargs.get(key) is not None}
    return model_kwargs | moved


def advance_in_place(target: Any, outputs: Any, model_kwargs: dict[str, Any], num_new_tokens: int) -> dict[str, Any]:
    """`model_kwargs` after a round, without what has an entry per token: it stays as [`verification_inputs`] reads it.

    Plain decoding copies the ids, positions and masks of the whole text once more for every token.
    """
    unchanged = {key: model_kwargs[key] for key in _PER_TOKEN_KEYS if key in model_kwargs}
    others = {key: value for key, value in model_kwargs.items() if key not in unchanged}
    return advance(target, outputs, others, num_new_tokens) | unchanged


def _positions(tree: CandidateTree, num_carried: int, start: Tensor) -> Tensor:
    """`(…, n)` positions of carried tokens and nodes, the first of them at the `(…, 1)` start."""
    if num_carried == 0:
        return tree_position_ids(tree, start)
    carried = start + torch.arange(num_carried, device=start.device)
    return torch.cat((carried, tree_position_ids(tree, start + num_carried)), dim=-1)


def max_levels_before_border(view: TargetView, held: HeldCache, first_position: Tensor) -> int:
    """How deep the next tree may get without a position beyond which the target's rotary embedding changes.

    The frequencies of one forward follow its longest position, and plain decoding has one position per forward.
    """
    levels = sys.maxsize
    for border, is_constant_beyond in view.rope_borders:
        roots = (first_position + held.rows_since_prefill + len(held.carried)).flatten().tolist()
        # Models that count positions themselves count rows.
        for root in {*roots, held.length + len(held.carried)}:
            #   … border − 2   border − 1 | border   border + 1 …
            #     root         d1         | d2: another frequency
            if root < border:
                levels = min(levels, border - 1 - root)
            elif not is_constant_beyond:
                levels = 0
    return levels


def tree_attention_masks(
    view: TargetView,
    tree: CandidateTree,
    held: HeldCache,
    cache: Any,
    prefix_mask: Tensor | None,
    groups: dict[str, int],
) -> Tensor | dict[str, Tensor]:
    """The mask of a tree, or one for each kind of layer. See [`tree_attention_mask`].

    Args:
        groups: Kind of layer → how many query heads share one KV head, where masks are to be folded by it.
    """
    if not makes_masks(attention_of(view.text_config)):
        # The target drops the 2-D mask and sees the padding.
        prefix_mask = None
    masks = {
        kind: fold(
            tree_attention_mask(
                tree,
                held.length,
                view.dtype,
                prefix_mask,
                first_row,
                window=view.text_config.sliding_window if kind == "sliding_attention" else None,
            ),
            groups.get(kind, 1),
        )
        for kind, first_row in first_rows_read(cache, view.layer_kinds, len(tree)).items()
    }
    return masks if len(masks) > 1 else masks.popitem()[1]


def tree_attention_mask(
    tree: CandidateTree,
    past_length: int,
    dtype: torch.dtype,
    prefix_mask: Tensor | None = None,
    first_row: int = 0,
    window: int | None = None,
) -> Tensor:
    """`(B, 1, N, past − first + N)` additive mask: every node sees the prefix, its ancestors and itself.

    In a window, a node at depth d stands in row past + d, wherever it lies in the tree:

    rows       first … past − 1 | n0     n1       n2         (n1 and n2 are children of n0)
    stand in   first … past − 1 | past   past+1   past+1

    Args:
        prefix_mask: `(B, ≥ past)`, 0 on padding; `None` without padding (B is then 1, and holds for any batch).
        first_row: First row of the prefix that the layer still has.
        window: How many rows a node sees, itself included; `None`: all.
    """
    size, num_nodes, device = 1 if prefix_mask is None else len(prefix_mask), len(tree), tree.ancestors.device
    lowest = torch.finfo(dtype).min
    # One tensor as long as the text; what is hidden is written into it.
    mask = torch.zeros((size, 1, num_nodes, past_length - first_row + num_nodes), dtype=dtype, device=device)
    mask[..., -num_nodes:].masked_fill_(~tree.ancestors, lowest)
    if prefix_mask is not None:
        is_padding = prefix_mask[:, None, None, first_row:past_length].to(device) == 0
        mask[..., :-num_nodes].masked_fill_(is_padding, lowest)
    if window is not None:
        rows = torch.arange(first_row, past_length, device=device)
        stand_in = torch.cat((rows, past_length + tree.depths))
        mask.masked_fill_(stand_in <= (past_length + tree.depths - window)[:, None], lowest)
    return mask


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
