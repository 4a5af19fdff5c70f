"""Caches and their layers: what they hold, and how it is cut."""

from typing import Any

import transformers
from torch import Tensor

from .names import layer_types_of

#: A layer without a cache of its own: it has no attention, or reads another layer's.
NO_CACHE = "no_cache"


def layer_kinds(config: Any) -> list[str]:
    """What each layer of a text decoder keeps in its cache: `"full_attention"`, `"sliding_attention"`, …"""
    kinds = [NO_CACHE if kind == "dummy" else kind for kind in layer_types_of(config)[0]]
    reading_images = getattr(config, "cross_attention_layers", None) or ()
    return ["cross_attention" if index in reading_images else kind for index, kind in enumerate(kinds)]


def first_layer_config(config: Any) -> Any:
    """The configuration as the first layer of a text decoder has it: sizes of attention may differ by layer."""
    return config.per_layer_config[0]


def is_windowed(layer: Any) -> bool:
    """Whether a layer of a cache belongs to attention that sees a window."""
    return bool(layer.is_sliding)


def attention_layers(cache: Any) -> list[Any]:
    """Layers of a cache that hold keys and values (one that shares those of another layer holds none)."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def cache_tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each of these, `(B, heads, length, head_dim)`; the cache's own, not copies."""
    return [(layer.keys, layer.values) for layer in attention_layers(cache)]


def convolution_layers(cache: Any) -> list[Any]:
    """Layers of a cache that hold the newest inputs of convolutions and no state of older ones."""
    layers = [layer for layer in cache.layers if any(getattr(layer, "is_conv_states_initialized", {}).values())]
    return [layer for layer in layers if not any(layer.is_recurrent_states_initialized.values())]


def new_inputs(layer: Any) -> int:
    """How many inputs a layer of [`convolution_layers`] holds beyond those that its convolution needs."""
    return layer.conv_states[0].shape[-1] - layer.conv_kernel_size[0]


def recurrent_states(cache: Any) -> list[Tensor]:
    """States of the layers that hold a state of all they have read (and the newest inputs of their convolution).

    They are the cache's own tensors: it overwrites them in place.
    """
    states: list[Tensor | None] = []
    for layer in cache.layers:
        recurrent = list(getattr(layer, "recurrent_states", {}).values())
        if any(state is not None for state in recurrent):
            states += [*layer.conv_states.values(), *recurrent]
    return [state for state in states if state is not None]


def outlives_call(cache: Any, generation_config: Any) -> bool:
    """Whether somebody holds the cache of a `generate()` call afterwards: it was passed in, or will be returned."""
    return bool(generation_config.return_dict_in_generate) or getattr(cache, "_is_user_defined", False)


def drop_newest(cache: Any, count: int) -> None:
    """Drops the `count` newest positions of a dynamic cache, or of one of its layers."""
    cache.crop(-count)


def new_cache(target: Any) -> Any:
    """An empty cache, as `generate()` makes one for this model."""
    return transformers.DynamicCache(config=target.config.get_text_config())


def first_rows_read(cache: Any, kinds: list[str], num_rows: int) -> dict[str, int]:
    """Kind of layer → the first row of a cache that the next `num_rows` attend to: windows leave old rows behind."""
    indices = {kind: index for index, kind in reversed(list(enumerate(kinds))) if kind != NO_CACHE}
    return {kind: cache.get_mask_sizes(num_rows, index)[1] for kind, index in indices.items()}


def record_past(cache: Any, on: bool) -> None:
    """Layers that hold a window of rows, or the newest inputs of a convolution, keep older ones until they are cut."""
    for layer in cache.layers:
        if hasattr(layer, "record_past") and not any(getattr(layer, "is_recurrent_states_initialized", {}).values()):
            layer.record_past = on
