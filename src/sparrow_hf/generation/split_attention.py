"""Attention of few rows to many keys on a GPU: the keys are split, so that all of the device has work.

A fused kernel gives each KV head and block of rows to one multiprocessor, which then reads all keys alone: 4 of the
132 of an H100, for a target with 4 KV heads. Here each split of the keys is a head of its own, and the outputs are
brought together by the sums of their softmax.

    keys       0 … c−1 | c … 2c−1 | … | (S−1)·c … S·c−1
    outputs    o₀, l₀  | o₁, l₁   | … | o(S−1), l(S−1)          l: log-sum-exp of the scores
    together   Σ oₛ · exp(lₛ) / Σ exp(lₛ)
"""

import torch
from torch import Tensor

#: Keys of a split at least: below it the splits cost more than they save.
_FEWEST_KEYS = 256
#: KV heads times splits: about the multiprocessors of a GPU.
_NUM_BLOCKS = 128
#: Query rows (those of all heads of a group) of a call at most; with more, a device has work without splits.
_MOST_ROWS = 512
#: The kernel wants rows and splits of a mask to begin at multiples of this.
ALIGNMENT = 8


def number_of_splits(query: Tensor, key: Tensor, mask: Tensor) -> int | None:
    """Into how many splits the keys of a call are best cut; `None`: the call is not one for [`split_attention`].

    Without splits too, its kernel has an advantage over the one that torch would choose for a mask: it makes no plan
    for every new number of keys.

    Args:
        query: `(B, KV, rows, d)`, the heads of a group among the rows.
        key: `(B, KV, R, d)`.
        mask: `(B | 1, 1, rows, R)`, additive.
    """
    batch, heads, rows, _ = query.shape
    on_cuda = query.device.type == "cuda" and torch.version.cuda is not None
    is_aligned = mask.shape[2] == rows and mask.stride(2) % ALIGNMENT == 0 and mask.dtype == query.dtype
    if not on_cuda or not is_aligned or batch != 1 or rows > _MOST_ROWS:
        return None
    most = min(_NUM_BLOCKS // heads, key.shape[2] // _FEWEST_KEYS)
    fits = (number for number in range(most, 1, -1) if key.shape[2] % (number * ALIGNMENT) == 0)
    return next(fits, 1)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_splits: int, scaling: float | None = None
) -> Tensor:
    """Attention over keys in `num_splits` equal parts, shapes as in [`number_of_splits`].

    Returns:
        `(1, KV, rows, width of a value)`.
    """
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2] // num_splits
    # Each KV head is a sequence, each split of its keys a head of it. Nothing is copied.
    queries = query[0][:, None].expand(heads, num_splits, rows, query.shape[-1])
    split_keys, split_values = (each[0].unflatten(1, (num_splits, keys)) for each in (key, value))
    masks = mask[0, 0].unflatten(1, (num_splits, keys)).transpose(0, 1)[None].expand(heads, -1, -1, -1)
    outputs, sums = _with_sums(queries, split_keys, split_values, masks, scaling)
    weights = sums[..., :rows].float().softmax(dim=1)
    return (outputs.float() * weights[..., None]).sum(dim=1).to(query.dtype)[None]


def _with_sums(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention`, and the `(B, heads, ≥ rows)` log-sum-exp of its scores."""
    if query.device.type == "cuda":
        output, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, False, scale=scaling
        )
    else:
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scaling
        )
    return output, sums
