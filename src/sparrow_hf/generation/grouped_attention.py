"""Attention of grouped heads that reads keys and values in place.

Where g query heads share one KV head, sdpa expands keys and values g times if a forward has several rows and a mask.
Here the query heads of one KV head become rows of one query instead, and the rows of the mask are repeated with them:

    query heads      0  1  2  3 | 4  5  6  7        H = 8, KV = 2, g = 4
    KV heads         0          | 1

    rows of KV head 0      head 0: a b c | head 1: a b c | head 2: a b c | head 3: a b c        n = 3: a, b, c
    rows of the mask               a b c |         a b c |         a b c |         a b c

A mask with g times as many rows as there are tokens is the signal. The function registered as sdpa folds if it gets
one, and is transformers' own for everything else, so calls without a draft, and other threads, run as they always did.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .._transformers import (
    GROUPED_ATTENTION,
    attention_function,
    attention_of,
    register_attention,
    registered_attention,
)
from ..targets import TargetView
from .split_attention import ALIGNMENT, number_of_splits, split_attention

#: Name → the attention function registered under it that takes folded masks.
_TAKING_FOLDED_MASKS: dict[str, Callable[..., Any]] = {}


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of H query heads over KV heads that are not expanded.

    Args:
        query: `(B, H, n, d)`.
        key, value: `(B, KV, R, d)`; a value may have another width.
        mask: `(B | 1, 1, g·n, R)` from [`fold`], bool or additive; `(B | 1, 1, 1, R)` if all rows see the same keys;
            `None`: every row sees every key.
        scaling: By default `1/√d`.

    Returns:
        `(B, n, H, d)`, as attention functions of transformers do.
    """
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        # Decoders may keep their norms, of which masks have the dtype, in a higher precision than their heads.
        mask = mask.to(query.dtype)
    folded = query.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    num_splits = None if mask is None or dropout > 0 else number_of_splits(folded, key, mask)
    if mask is not None and num_splits is not None:
        output = split_attention(folded, key, value, mask, num_splits, scaling)
    else:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    if rows == 1:
        return output.reshape(batch, rows, heads, value.shape[-1])
    return output.reshape(batch, heads, rows, value.shape[-1]).transpose(1, 2).contiguous()


def fold(mask: Tensor, groups: int) -> Tensor:
    """`(B, 1, n, R)` mask → `(B, 1, groups · n, R)`: repeated for each of the query heads that share one KV head.

    Its rows begin where fused kernels want them to.
    """
    if groups == 1:
        return mask
    *_, rows, columns = mask.shape
    folded = mask.new_empty((len(mask), 1, groups * rows, columns + -columns % ALIGNMENT))[..., :columns]
    folded.unflatten(2, (groups, rows)).copy_(mask[:, :, None])
    return folded


def groups_of(view: TargetView) -> dict[str, int]:
    """By what the masks of a target can be folded, with the attention function it has now.

    Returns:
        Kind of layer → how many query heads share one KV head. Kinds that are left out take masks as they are: their
        heads are not grouped, or their attention modules do something with the mask themselves. Empty too where the
        target's layers take no masks of ours, or do not run on sdpa.
    """
    function = _TAKING_FOLDED_MASKS.get(attention_of(view.text_config))
    if function is None or view.obstacle_to_trees:
        return {}
    return view.query_groups if attention_function(view.layers, view.text_config) is function else {}


def install_grouped_attention() -> None:
    """Lets sdpa take folded masks, and registers `"sdpa_grouped"`, which folds the heads of plain steps too.

    Idempotent. Without effect where sdpa is not transformers' own.
    """
    stock = registered_attention("sdpa")
    if stock is None or _TAKING_FOLDED_MASKS:
        return
    _TAKING_FOLDED_MASKS["sdpa"] = _taking_folded_masks(stock, folds_steps=False)
    _TAKING_FOLDED_MASKS[GROUPED_ATTENTION] = _taking_folded_masks(stock, folds_steps=True)
    for name, function in _TAKING_FOLDED_MASKS.items():
        register_attention(name, function, masks_of="sdpa")


def _taking_folded_masks(stock: Callable[..., Any], folds_steps: bool) -> Callable[..., Any]:
    """`stock`, but grouped for folded masks, and for single rows if `folds_steps`."""

    # `wraps`: it passes for transformers' own, which it is for every call that could have been made of it.
    @wraps(stock)
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        groups, rows = query.shape[1] // key.shape[1], query.shape[2]
        if groups > 1 and _may_be_grouped(attention_mask, groups, rows, folds_steps) and _asks_no_more(args, kwargs):
            return grouped_attention(query, key, value, attention_mask, scaling, dropout), None
        return stock(module, query, key, value, attention_mask, dropout, scaling, *args, **kwargs)

    return attention


def _may_be_grouped(mask: Any, groups: int, rows: int, folds_steps: bool) -> bool:
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:
        return mask.shape[2] == groups * rows or (folds_steps and rows == 1 and mask.shape[2] == 1)
    return folds_steps and rows == 1 and mask is None


def _asks_no_more(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked that sdpa may do or refuse beside masked attention."""
    return not args and kwargs.get("position_bias") is None and kwargs.get("softcap") is None
