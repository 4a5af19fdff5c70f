"""Attention functions, masks and positions: what the layers of a model run on."""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from .caches import layer_kinds
from .models import attention_of
from .names import ATTENTION_FUNCTIONS, MASK_FUNCTIONS, flat_mask

#: The name of the package's own attention implementation: sdpa in which no step expands grouped keys and values.
GROUPED_ATTENTION = "sdpa_grouped"


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
    return is_own and attention_of(config) in ("eager", "sdpa", GROUPED_ATTENTION)


def makes_masks(name: str) -> bool:
    """Whether models make masks for an attention function; for others they drop every 2-D mask."""
    return name in MASK_FUNCTIONS


def takes_flat_masks_only(name: str) -> bool:
    """Whether models make masks of one row per sequence for an attention function, as FlashAttention takes them."""
    return name in MASK_FUNCTIONS and MASK_FUNCTIONS[name] is flat_mask


def registered_attention(name: str) -> Callable[..., Any] | None:
    """The attention function that has this name, if it is transformers' own."""
    function = ATTENTION_FUNCTIONS.get(name)
    is_own = function is not None and function.__module__.startswith("transformers.")
    return function if is_own else None


def register_attention(name: str, function: Callable[..., Any], masks_of: str | None = None) -> None:
    """Puts an attention function in the place of the one that has this name.

    Args:
        masks_of: Name of the one for which models make the same masks; by default the name keeps its own.
    """
    ATTENTION_FUNCTIONS.register(name, function)
    if masks_of is not None:
        masks = MASK_FUNCTIONS[masks_of]
        MASK_FUNCTIONS.register(name, masks if name == masks_of else _for_cut_rows(masks))


def _for_cut_rows(masks: Callable[..., Any]) -> Callable[..., Any]:
    """`masks`, but several rows always get a mask where layers share the keys and values of others.

    The code of such models may run these layers for the last rows only. A missing mask would then be read as that of
    the first rows. The code knows when sdpa needs one, but it asks for the name.
    """

    @functools.wraps(masks)
    def made(*args: Any, config: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        shares = "reuse" in (getattr(config, "kv_sharing_modes", None) or ())
        may_skip = allow_is_causal_skip and not (shares and kwargs["q_length"] > 1)
        return masks(*args, config=config, allow_is_causal_skip=may_skip, **kwargs)

    return made


def query_groups(layers: nn.ModuleList, config: Any) -> dict[str, int]:
    """Kind of layer → how many query heads share one KV head, if it is more than one and the same in all of the kind.

    Kinds with attention modules that read or change their mask themselves are left out.
    """
    # Unlike `layer_kinds`, this names the mask of layers that share the keys and values of another, too.
    kinds = getattr(config, "layer_types", None) or layer_kinds(config)
    found: dict[str, set[int]] = {}
    for kind, layer in zip(kinds, layers, strict=False):
        modules: list[Any] = [module for module in layer.modules() if hasattr(module, "num_key_value_groups")]
        of_layer = {each.num_key_value_groups if _hands_masks_on(type(each).forward) else 1 for each in modules}
        found.setdefault(kind, set()).update(of_layer or {1})
    return {kind: max(groups) for kind, groups in found.items() if len(groups) == 1 and max(groups) > 1}


@functools.cache
def _hands_masks_on(forward: Callable[..., Any]) -> bool:
    """Whether the forward of attention modules does nothing with the mask but give it to the attention function.

    It is read off transformers' code, as transformers itself reads off whether attention functions can be chosen.
    """
    if not forward.__module__.startswith("transformers.models."):
        return False
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return False
    nodes = list(ast.walk(code))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "attention_interface"]
    masks = [node for node in nodes if isinstance(node, ast.Name) and node.id == "attention_mask"]
    if len(calls) != 1 or len(masks) != 1:
        return False
    named = {keyword.arg: keyword.value for keyword in calls[0].keywords}
    return masks[0] in (*calls[0].args, *named.values()) and "position_bias" not in named


def takes_positions(target: Any, decoder: nn.Module) -> bool:
    """Whether positions can be handed to a model, reach its decoder, and are not counted anew by its layers."""
    outer, inner = (inspect.signature(module.forward).parameters for module in (target, decoder))
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer.values())
    reach = "position_ids" in inner and ("position_ids" in outer or passes_on)
    layers: Any = decoder.layers
    return reach and not any(_asks_for_length(type(module).forward) for module in layers.modules())


@functools.cache
def _asks_for_length(forward: Callable[..., Any]) -> bool:
    """Whether the forward of a module asks the cache how long it is, which says in which row a token stands."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "get_seq_length" in code.co_names


def takes_masks_of_kinds(target: nn.Module, decoder: nn.Module) -> bool:
    """Whether a mask for each kind of layer can be handed to a model whose layers are of several kinds.

    The model, or one between it and its decoder, may make these masks of what it is given, whatever that is
    (PaliGemma); the others leave a dictionary as it is.
    """
    place = next(name for name, module in target.named_modules() if module is decoder).split(".")
    on_the_way = [target.get_submodule(".".join(place[:depth])) for depth in range(len(place) + 1)]
    return all(_leaves_dictionaries(type(module).forward) for module in on_the_way)


@functools.cache
def _leaves_dictionaries(forward: Callable[..., Any]) -> bool:
    """Whether the forward of a module makes no masks, or not of what is a dictionary already."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    names = set() if code is None else set(code.co_names)
    makes_masks = any(name.startswith("create_") and "mask" in name for name in names)
    return not makes_masks or {"isinstance", "dict"} <= names


def computes_cache_anew(target: Any) -> int | None:
    """The number of tokens beyond which plain decoding computes all rows of a text once more; `None` if it never does.

    Phi-3 and its relatives do so where their `longrope` changes, so that rows before the border change, too.
    """
    code = getattr(inspect.unwrap(type(target).prepare_inputs_for_generation), "__code__", None)
    name = "original_max_position_embeddings"
    reads_it = code is not None and name in (*code.co_names, *code.co_consts)
    return getattr(target.config, name, None) if reads_it else None


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
