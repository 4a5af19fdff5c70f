"""`attention`: one layer's attention alone. Which kernels run, how long, and what a new length costs at first."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from .attending import fold, fold_mask
from .session import Part, Session
from .timing import kernels, seconds

#: Bytes of keys and values that are cycled through, so that none are found in the device's own cache of 50 MB.
_CYCLED = 200e6
_CALLS = 20
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(session: Session, part: Part) -> None:
    """First what a new length costs, then ways to attend, then backends, then FlexAttention."""
    _, middle, long, longest = session.sizes.lengths
    for length in (middle, longest):
        for rows in (1, 6):
            for way in ("stock", "folded"):
                with part.cell(prompt=length, rows=rows, way=way, what="first call at each of new lengths"):
                    _new_lengths(session, part, length, rows, way)
    for length in (longest, middle, long):
        for rows in (1, 6, 16, 48):
            for way, attend in _WAYS.items():
                with part.cell(prompt=length, rows=rows, way=way):
                    _add(session, part, length, rows, way, attend)
    for rows in (1, 6):
        for way in ("stock", "gqa", "folded"):
            for name, backend in _BACKENDS.items():
                with part.cell(prompt=longest, rows=rows, way=f"{way}, {name}"), sdpa_kernel(backend):
                    _add(session, part, longest, rows, f"{way}, {name}", _WAYS[way])
    if not session.on_cuda:
        part.header["needs"] = "CUDA for kernels and FlexAttention"
        return
    for rows in (6, 48):
        with part.cell(prompt=longest, rows=rows, way="flex"):
            _add(session, part, longest, rows, "flex", torch.compile(_flex, dynamic=False))


def _stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers' `sdpa`: masked, keys and values are repeated for every query head."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    batch, heads, length, size = key.shape
    key, value = (
        each[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)
        for each in (key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _gqa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    bias = mask[0, 0]
    return flex_attention(
        query, key, value, score_mod=lambda score, batch, head, row, column: score + bias[row, column], enable_gqa=True
    )


_WAYS: dict[str, Callable[..., Tensor]] = {"stock": _stock, "gqa": _gqa, "folded": fold}


def _tensors(session: Session, length: int, rows: int, way: str, copies: int) -> list[tuple[Any, ...]]:
    """`copies` times query, key, value and mask of a chain; a single row has no mask."""
    text = session.sizes.text
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    size, total = text["hidden_size"] // heads, length + rows
    mask = None
    if rows > 1:
        last = length + torch.arange(rows, device=session.device)[:, None]
        hidden = torch.arange(total, device=session.device) > last
        mask = torch.zeros((1, 1, rows, total), dtype=session.dtype, device=session.device)
        mask.masked_fill_(hidden, torch.finfo(session.dtype).min)
        if way.startswith("folded"):
            # Made once for all layers.
            mask = fold_mask(mask, heads, key_heads)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn((1, heads, length, size), dtype=session.dtype, device=session.device)

    return [(random(heads, rows), random(key_heads, total), random(key_heads, total), mask) for _ in range(copies)]


def _add(session: Session, part: Part, length: int, rows: int, way: str, attend: Callable[..., Tensor]) -> None:
    text = session.sizes.text
    size = text["hidden_size"] // text["num_attention_heads"]
    bytes_each = 2 * text["num_key_value_heads"] * (length + rows) * size * session.dtype.itemsize
    copies = min(math.ceil(_CYCLED / bytes_each), _CALLS) if session.on_cuda else 1
    inputs = _tensors(session, length, rows, way, copies)

    def calls() -> None:
        for index in range(_CALLS):
            attend(*inputs[index % copies])

    calls()
    found = kernels(calls, session.device)
    part.add(
        prompt=length,
        rows=rows,
        way=way,
        wall_us=seconds(calls, session.device) / _CALLS * 1e6,
        device_us=None if found is None else sum(kernel["us"] for kernel in found.values()) / _CALLS,
        kernels=None if found is None else {name[:120]: kernel["us"] / _CALLS for name, kernel in found.items()},
    )


def _new_lengths(session: Session, part: Part, length: int, rows: int, way: str) -> None:
    # Lengths that nothing else here has: a multiple of seven behind them.
    lengths = [length + 101 + 7 * number + 64 * rows for number in range(8)]
    times: list[list[float]] = []
    for each in lengths:
        (inputs,) = _tensors(session, each, rows, way, 1)
        times.append([seconds(partial(_WAYS[way], *inputs), session.device) * 1000 for _ in range(3)])
    first, _, later = zip(*times, strict=True)
    part.add(
        prompt=length,
        rows=rows,
        way=way,
        what="first call at each of 8 new lengths, against the third",
        first_ms=list(first),
        most_ms=max(first),
        later_ms=sorted(later)[len(later) // 2],
    )
