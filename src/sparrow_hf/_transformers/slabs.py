"""A target's cache in memory that has room: rows are written where they belong, and nothing is copied to grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from .caches import is_windowed
from .names import DynamicLayer

#: Rows that a slab gets beyond those it must hold, where it is not known how many will come.
ROOM = 512


class SlabLayer(DynamicLayer):
    """A layer of a dynamic cache whose rows lie at the start of a slab.

        slab     [ r0 r1 r2 … r(n−1) | free … ]
        keys     [ r0 r1 r2 … r(n−1) ]                a view, made anew when it is read after rows came or went

    While `at` is set, the layer is one of a fixed step: new rows go to these places of the slab, and attention reads
    all of it under a mask.

    Args:
        num_rows: Rows of the slab. When they are full, a larger slab takes its place.
        is_sliding: The layer's attention sees a window. The slab keeps all rows; the mask knows the window.
    """

    def __init__(self, num_rows: int, is_sliding: bool = False):
        self._length = 0
        self._views: tuple[Tensor, Tensor] | None = None
        super().__init__()
        self.num_rows = num_rows
        self.is_sliding = is_sliding
        self.slab: tuple[Tensor, Tensor] | None = None
        self.at: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.slab is None:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self.slab = tuple(  # type: ignore[assignment]
                    states.new_zeros((*states.shape[:2], self.num_rows, states.shape[-1]))
                    for states in (key_states, value_states)
                )
        self.device, self.dtype = key_states.device, key_states.dtype
        self.hold(0)
        self.is_initialized = True

    def hold(self, num_rows: int) -> None:
        """The first `num_rows` rows of the slab are what the layer holds."""
        self._length, self._views = num_rows, None

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.slab is not None
        if self._views is None:
            keys, values = self.slab
            self._views = keys.narrow(2, 0, self._length), values.narrow(2, 0, self._length)
        return self._views

    def _forget(self, nothing: None) -> None:
        """What transformers assigns to keys and values to empty a layer. Other rows cannot be put in their place."""
        if nothing is not None:
            raise NotImplementedError("the rows of a slab are not replaced as a whole")
        self.hold(0)

    keys = property(lambda self: self._held()[0] if self.is_initialized else None, _forget)
    values = property(lambda self: self._held()[1] if self.is_initialized else None, _forget)

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        self.hold(max(self._length + min(tokens_to_remove, 0), 0))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.at is not None and self.slab is not None:
            for rows, states in zip(self.slab, (key_states, value_states), strict=True):
                rows.index_copy_(2, self.at, states)
            return self.slab
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, count = self._length, key_states.shape[2]
        if start + count > self.num_rows:
            self._enlarge(start + count + ROOM)
        assert self.slab is not None
        keys, values = self.slab
        keys.narrow(2, start, count).copy_(key_states)
        values.narrow(2, start, count).copy_(value_states)
        self.hold(start + count)
        return self._held()

    def _enlarge(self, num_rows: int) -> None:
        held = self._held()
        self.slab, self.num_rows, self.is_initialized = None, num_rows, False
        self.update(*held)


def grow_in_place(cache: transformers.DynamicCache) -> None:
    """Gives layers of full attention room behind their rows; those that hold rows already copy them once.

    An ordinary layer copies all of its rows in every forward. In a long video that takes longer than the forward.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = roomy = SlabLayer(0)
            if layer.is_initialized:
                roomy.update(layer.keys, layer.values)


def grows_in_place(cache: transformers.DynamicCache) -> bool:
    """Whether [`grow_in_place`] has seen a cache."""
    return any(isinstance(layer, SlabLayer) for layer in cache.layers)


def slab_cache(config: Any, num_rows: int) -> transformers.DynamicCache:
    """An empty cache of slabs, as `DynamicCache(config=config)` lays out its layers; memory is taken at first use."""
    cache = transformers.DynamicCache(config=config)
    cache.layers = [
        SlabLayer(num_rows, is_windowed(layer)) if isinstance(layer, DynamicLayer) else layer for layer in cache.layers
    ]
    return cache


def slab_layers(cache: transformers.DynamicCache) -> list[SlabLayer]:
    """Its layers that have taken memory."""
    return [layer for layer in cache.layers if isinstance(layer, SlabLayer) and layer.slab is not None]


def has_windows(cache: transformers.DynamicCache) -> bool:
    """Whether a layer's attention sees a window."""
    return any(isinstance(layer, SlabLayer) and layer.is_sliding for layer in cache.layers)


def take_rows(slabs: transformers.DynamicCache, cache: transformers.DynamicCache) -> None:
    """Moves the rows of an ordinary cache into slabs, layer by layer. What it has dropped stays free.

    cache     r2 r3 r4              a window that has dropped r0 and r1
    slab    [ –  –  r2 r3 r4 | free … ]
    """
    length = cache.get_seq_length()
    for layer, source in zip(slabs.layers, cache.layers, strict=True):
        if not isinstance(layer, SlabLayer) or source.keys is None:
            continue
        if not layer.is_initialized:
            layer.lazy_initialization(source.keys, source.values)
        assert layer.slab is not None
        for rows, states in zip(layer.slab, (source.keys, source.values), strict=True):
            rows[:, :, length - states.shape[-2] : length] = states
        layer.hold(length)
        source.reset()


def empty(cache: transformers.DynamicCache) -> None:
    """Forgets all rows; the memory stays.

    It is zeroed: attention reads all of it, and what is not a number stays so under a mask.
    """
    for layer in slab_layers(cache):
        layer.at = None
        layer.hold(0)
        for rows in layer.slab or ():
            rows.zero_()


def move_rows(layers: Sequence[SlabLayer], sources: Tensor, destinations: Tensor) -> None:
    """Copies the `(n,)` rows `sources` to `destinations`, in place."""
    for layer in layers:
        assert layer.slab is not None
        for rows in layer.slab:
            rows.index_copy_(2, destinations, rows.index_select(2, sources))


def dynamic_copy(cache: transformers.DynamicCache, config: Any) -> transformers.DynamicCache:
    """What a cache of slabs holds, in an ordinary one."""
    copied = transformers.DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, SlabLayer) and layer.slab is not None:
            copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied
