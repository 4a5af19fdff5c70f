"""Which attention function verifies: the target's own, or its model's eager one, which follows any mask.

FlashAttention, and functions registered by others, may take no 4-D mask or ignore it. Such a target keeps its function
for everything else. Only inside [`following_masks`] does it run the eager function of the same model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor

from .._transformers import eager_attention, register_attention

_FOLLOWING: "ContextVar[bool]" = ContextVar("sparrow_following_masks", default=False)


def let_follow_masks(name: str, function: Callable[..., Any]) -> None:
    """Registers, under the name of an attention function, one that also follows 4-D masks in [`following_masks`].

    Outside of it, and for other masks, it is the function itself: no other call is changed, and no module.
    """
    if hasattr(function, "_follows_masks"):
        return

    @wraps(function)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if _FOLLOWING.get() and isinstance(mask, Tensor) and mask.ndim == 4:
            return eager_attention(module)(module, query, key, value, mask, **kwargs)
        return function(module, query, key, value, mask, **kwargs)

    attention._follows_masks = True  # type: ignore[attr-defined]
    register_attention(name, attention)


@contextmanager
def following_masks(on: bool) -> Iterator[None]:
    """In this context and thread, attention functions that were registered above follow 4-D masks."""
    token = _FOLLOWING.set(on)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)
