"""Attention functions in which query heads that share a key head are laid out as further rows: no key is repeated."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def fold(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention of `(B, heads, n, d)` queries to `(B, key heads, L, d)` keys.

    heads of a key head   h0: n0 n1 n2 | h1: n0 n1 n2 | …      rows of one head that attends to it

    Args:
        mask: Of one row, or of all rows of a key head (`fold_mask`).
    """
    batch, heads, rows, size = query.shape
    folded = query.reshape(batch, key.shape[1], heads // key.shape[1] * rows, size)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, rows, size)


def fold_mask(mask: Tensor, heads: int, key_heads: int) -> Tensor:
    """`(1, 1, n, L)` → `(1, 1, heads / key_heads · n, L)`."""
    return mask.repeat(1, 1, heads // key_heads, 1)


def folded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """For models whose mask is folded when it is handed to them."""
    return fold(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


def packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """For plain decoding, compiled too: a single row is folded, which transformers' sdpa does in eager mode only."""
    if query.shape[2] == 1:
        return folded(module, query, key, value, mask, **kwargs)
    return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)


for _name, _function in (("folded", folded), ("packed", packed)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
