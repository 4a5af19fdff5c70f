"""Attention functions, masks and positions: what the layers of a model run on."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from .models import attention_of
from .names import ATTENTION_FUNCTIONS, MASK_FUNCTIONS, flat_mask


def attention_function(layers: nn.ModuleList, config: Any) -> Callable[..., Any] | None:
    """The attention function that decoder layers run on; `None` if they do not take it from transformers' register."""
    for scope in map(_scope, layers[-1].modules()):
        if scope is not None:
            name = attention_of(config)
            return scope["ALL_ATTENTION_FUNCTIONS"].get_interface(name, scope["eager_attention_forward"])
    return None


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that the model of an attention module has of its own. It follows any mask."""
    scope = _scope(module)
    if scope is None:
        raise NotImplementedError(f"{type(module).__name__} has no attention function of its own")
    return scope["eager_attention_forward"]


def _scope(module: nn.Module) -> dict[str, Any] | None:
    """The names of the file that a module's class is written in, if attention functions are chosen there."""
    for kind in type(module).__mro__:
        scope = vars(sys.modules[kind.__module__])
        if {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= scope.keys():
            return scope
    return None


def is_stock_attention(layers: nn.ModuleList, config: Any) -> bool:
    """Whether decoder layers run on an attention function of transformers that follows 4-D masks."""
    function = attention_function(layers, config)
    is_own = function is not None and function.__module__.startswith("transformers.")
    return is_own and attention_of(config) in ("eager", "sdpa")


def makes_masks(name: str) -> bool:
    """Whether models make masks for an attention function; for others they drop every 2-D mask."""
    return name in MASK_FUNCTIONS


def takes_flat_masks_only(name: str) -> bool:
    """Whether models make masks of one row per sequence for an attention function, as FlashAttention takes them."""
    return name in MASK_FUNCTIONS and MASK_FUNCTIONS[name] is flat_mask


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Puts an attention function in the place of the one that has this name."""
    ATTENTION_FUNCTIONS.register(name, function)


def takes_positions(target: Any, decoder: nn.Module) -> bool:
    """Whether positions can be handed to a model, and reach its decoder."""
    outer, inner = (inspect.signature(module.forward).parameters for module in (target, decoder))
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer.values())
    return "position_ids" in inner and ("position_ids" in outer or passes_on)


def rope_borders(decoder: nn.Module) -> list[tuple[int, bool]]:
    """Positions from which on the frequencies of a rotary embedding follow the longest position of a forward.

    Returns:
        Each border, and whether the frequencies stay the same beyond it (`longrope`) or grow on (`dynamic`).
    """
    borders = set()
    module: Any
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        # One for all layers, or one for each kind of layer.
        for layer_kind, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and "dynamic" in kind:
                borders.add((int(module.original_max_seq_len), False))
            elif kind == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters if layer_kind is None else parameters[layer_kind]
                borders.add((int(parameters["original_max_position_embeddings"]), True))
    return sorted(borders)
