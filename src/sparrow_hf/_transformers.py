"""Everything of transformers that is private, or that its versions name differently. No other file uses these names.

`contract_breaches` checks the installed transformers against all of it. When a new version breaks something, change
this file; `docs/compatibility.md` explains how.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import TransformersContractError

#: Oldest and newest version that the tests ran on; `docs/compatibility.md` says when.
TESTED_VERSIONS = ("5.23.0", "5.24.0")
SUPPORTED_VERSIONS = ">=5.23,<5.25"


# -- names that change ------------------------------------------------------------------------------------------------

_not_found: list[str] = []


def _find(module: str, name: str) -> Any:
    """`module.name`, or `None`, noted as missing: an import of the package must not fail for a version."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _not_found.append(f"{module}.{name}")
        return None


# Public names too, because no class of the package can be defined without them.
for _name in ("Cache", "DynamicCache", "GenerationConfig", "PreTrainedConfig", "PreTrainedModel"):
    _find("transformers", _name)
for _name in ("BaseStreamer", "CandidateGenerator"):
    _find("transformers.generation", _name)
_find("transformers.initialization", "copy_")

GenerationMixin: Any = _find("transformers.generation", "GenerationMixin")
DecoderOutput: Any = _find("transformers.modeling_outputs", "BaseModelOutputWithPast")
GenerationMode: Any = _find("transformers.generation", "GenerationMode")
GenerateOutput: Any = _find("transformers.generation", "GenerateDecoderOnlyOutput")
#: Activation functions by name.
ACTIVATIONS: Any = _find("transformers.activations", "ACT2FN")
_attention_functions: Any = _find("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
_mask_functions: Any = _find("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS")
_flat_mask: Any = _find("transformers.masking_utils", "flash_attention_mask")
_cache_layer_types: Any = _find("transformers.cache_utils", "get_layer_types_and_kwargs")
LlamaRMSNorm: Any = _find("transformers.models.llama.modeling_llama", "LlamaRMSNorm")
LlamaRotaryEmbedding: Any = _find("transformers.models.llama.modeling_llama", "LlamaRotaryEmbedding")

#: `block_type` of a draft → its decoder layer.
DECODER_LAYERS: dict[str, Any] = {
    "qwen2": _find("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"),
    "qwen3": _find("transformers.models.qwen3.modeling_qwen3", "Qwen3DecoderLayer"),
    "llama": _find("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"),
}

#: What `generate()`, the models' forward and their outputs call the cache: `cache` since 5.24.
CACHE: str = (
    "cache"
    if GenerateOutput is None or "cache" in {field.name for field in fields(GenerateOutput)}
    else "past_key_values"
)


def missing_names() -> list[str]:
    """Names without which the package's classes cannot be defined."""
    return list(_not_found)


# -- the contract -----------------------------------------------------------------------------------------------------

#: Methods of `GenerationMixin` that the package wraps or calls, with the parameters it passes.
_METHODS = {
    "generate": {
        "inputs",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "assistant_model",
        "streamer",
        "kwargs",
    },
    "_assisted_decoding": {
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "inputs_tensor",
        "assistant_model",
        "tokenizer",
    },
    "_validate_generation_mode": {"generation_mode", "generation_config", "generation_mode_kwargs"},
    "_prefill": {"input_ids", "generation_config", "model_kwargs"},
    "_update_model_kwargs_for_generation": {"outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"},
    "_optimize_model_for_decode": {"self"},
    "_prepare_position_ids_for_generation": {"inputs_tensor", "model_kwargs"},
    "_get_candidate_generator": {"generation_config"},
    "prepare_inputs_for_generation": {"next_sequence_length", "is_first_iteration", CACHE},
}

_LAYER_ARGUMENTS = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", CACHE}

#: Attributes that are read of configurations and models.
_ATTRIBUTES = {
    "PreTrainedConfig": ("_name_or_path", "_attn_implementation", "get_text_config"),
    "PreTrainedModel": ("get_decoder", "get_input_embeddings", "get_output_embeddings"),
}


@functools.cache
def contract_breaches() -> tuple[str, ...]:
    """What this package needs and the installed transformers lacks or does differently; empty if all is well."""
    found = [f"{name} is missing" for name in _not_found]
    if not found:
        found += _changed_methods() + _changed_attributes() + _changed_cache()
    return tuple(found)


def check_contract() -> None:
    """Raises [`TransformersContractError`] if the installed transformers breaks the contract."""
    if breaches := contract_breaches():
        raise TransformersContractError(
            f"a Sparrow draft cannot be used with transformers {transformers.__version__}: {'; '.join(breaches)}. "
            f"sparrow-hf was tested with transformers {' to '.join(TESTED_VERSIONS)}: install "
            f'"transformers{SUPPORTED_VERSIONS}", or a newer sparrow-hf. generate() without a draft works as before.'
        )


def _changed_methods() -> list[str]:
    changed = []
    for name, needed in _METHODS.items():
        changed += _lacking(f"GenerationMixin.{name}", getattr(GenerationMixin, name, None), needed)
    for layer in DECODER_LAYERS.values():
        changed += _lacking(f"{layer.__name__}.forward", layer.forward, _LAYER_ARGUMENTS)
    for output, needed in ((GenerateOutput, {"sequences", "scores", "logits", CACHE}), (DecoderOutput, {CACHE})):
        changed += _lacking(output.__name__, output, needed)
    modes = getattr(importlib.import_module("transformers.generation.utils"), "GENERATION_MODES_MAPPING", {})
    if "_assisted_decoding" not in modes.values():
        changed.append("generate() does not call GenerationMixin._assisted_decoding")
    return changed


def _lacking(name: str, function: Any, needed: set[str]) -> list[str]:
    if function is None:
        return [f"{name} is missing"]
    lacking = needed - set(inspect.signature(function).parameters)
    return [f"{name} takes no {', '.join(sorted(lacking))}"] if lacking else []


def _changed_attributes() -> list[str]:
    return [
        f"{name}.{attribute} is missing"
        for name, attributes in _ATTRIBUTES.items()
        for attribute in attributes
        if not _has(getattr(transformers, name), attribute)
    ]


def _has(kind: type, attribute: str) -> bool:
    # Some attributes of a configuration exist on its objects only.
    return hasattr(kind, attribute) or (kind is transformers.PreTrainedConfig and hasattr(kind(), attribute))


def _changed_cache() -> list[str]:
    """The layers of a dynamic cache must show their tensors, not copies, and it must drop its newest positions."""
    try:
        cache = transformers.DynamicCache()
        states = torch.arange(3.0).view(1, 1, 3, 1)
        cache.update(states, states + 3, 0)
        for tensors in cache_tensors(cache):
            for tensor in tensors:
                tensor[:, :, 1] = tensor[:, :, 2]
        drop_newest(cache, 1)
        kept = [tensor.flatten().tolist() for tensors in cache_tensors(cache) for tensor in tensors]
        works = kept == [[0.0, 2.0], [3.0, 5.0]] and cache.get_seq_length() == 2
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return [f"DynamicCache cannot be cut back ({type(error).__name__}: {error})"]
    return [] if works else ["DynamicCache.crop keeps the wrong positions"]


# -- wrapped methods --------------------------------------------------------------------------------------------------


def install_seam(
    is_draft: Callable[[Any], bool],
    check_inputs: Callable[..., None],
    check: Callable[..., None],
    decode: Callable[..., Any],
) -> None:
    """Lets `generate(assistant_model=draft)` dispatch to our loop; calls without a draft pass through untouched.

    transformers has no registry for assisted decoding, so three methods of `GenerationMixin` are wrapped, once and at
    class level. Where the contract is broken only `generate()` is wrapped, to raise an error for drafts.

    Args:
        is_draft: Whether an `assistant_model` is ours.
        check_inputs: Called first, as `check_inputs(target, input_ids, inputs_embeds, cache, attention_mask)` with
            those of the call; raises for inputs that a draft cannot decode. Later, `check` does not get the inputs,
            and before `decode` the vision tower has run.
        check: Called before anything is computed, as `check(target, draft, generation_mode, generation_config,
            generation_mode_kwargs)`; raises what cannot be combined with a draft.
        decode: Called in the place of transformers' own loop, as `decode(target, draft, input_ids, logits_processor=,
            stopping_criteria=, generation_config=, streamer=, model_kwargs=)`.
    """
    if GenerationMixin is None or hasattr(GenerationMixin, "_sparrow"):
        return
    GenerationMixin._sparrow = True
    if contract_breaches():
        _refuse_drafts(is_draft)
        return
    stock_generate = GenerationMixin.generate
    stock_decode = GenerationMixin._assisted_decoding
    stock_validate = GenerationMixin._validate_generation_mode

    @functools.wraps(stock_generate)
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        draft = unwrap(kwargs.get("assistant_model"))
        if is_draft(draft):
            kwargs["assistant_model"] = draft
            caches = [kwargs[name] for name in (CACHE, "past_key_values") if kwargs.get(name) is not None]
            input_ids = kwargs.get("input_ids") if inputs is None else inputs
            embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
            check_inputs(self, input_ids, embeds, caches[0] if caches else None, mask)
        return stock_generate(self, inputs, *args, **kwargs)

    # `wraps`: generate() inspects the signature of the method it is about to call.
    @functools.wraps(stock_decode)
    def assisted_decoding(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        draft = kwargs.get("assistant_model")
        if not is_draft(draft):
            return stock_decode(self, input_ids, *args, **kwargs)
        named = ("logits_processor", "stopping_criteria", "generation_config")
        ours = {name: kwargs.pop(name) for name in named} | {"streamer": kwargs.pop("streamer", None)}
        for name in ("assistant_model", "synced_gpus", "inputs_tensor", "tokenizer"):
            kwargs.pop(name, None)
        return decode(self, draft, input_ids, **ours, model_kwargs=kwargs)

    @functools.wraps(stock_validate)
    def validate_generation_mode(
        self: Any, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        draft = generation_mode_kwargs.get("assistant_model")
        if is_draft(draft):
            check(self, draft, generation_mode, generation_config, generation_mode_kwargs)
            # Our loop is plain decoding's counterpart. Assisted decoding would be refused for targets with a state.
            generation_mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
        stock_validate(self, generation_mode, generation_config, generation_mode_kwargs)

    GenerationMixin.generate = generate
    GenerationMixin._assisted_decoding = assisted_decoding
    GenerationMixin._validate_generation_mode = validate_generation_mode


def _refuse_drafts(is_draft: Callable[[Any], bool]) -> None:
    stock = GenerationMixin.generate

    @functools.wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_draft(kwargs.get("assistant_model")):
            check_contract()
        return stock(self, *args, **kwargs)

    GenerationMixin.generate = generate


# -- steps of generate() ----------------------------------------------------------------------------------------------


def prefill(target: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The target's outputs of what its cache does not hold of the prompt, in chunks if the configuration says so."""
    return target._prefill(input_ids, generation_config, model_kwargs)


@contextmanager
def replaced_prefill(target: Any, replacement: Callable[[Callable[[], Any], dict[str, Any]], Any]) -> Iterator[None]:
    """In this context, the target's `generate()` takes the outputs of its prefill from `replacement`.

    Args:
        replacement: Called with the prefill it replaces, ready to be called, and the `model_kwargs`.
    """
    stock = target._prefill

    def prefilled(input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        return replacement(lambda: stock(input_ids, generation_config, model_kwargs, **kwargs), model_kwargs)

    target._prefill = prefilled
    try:
        yield
    finally:
        del target._prefill


@contextmanager
def replaced_candidate_generator(target: Any, make: Callable[..., Any]) -> Iterator[None]:
    """In this context, transformers' assisted loop on this target drafts with `make(generation_config)`."""

    def generator(generation_config: Any, **_: Any) -> Any:
        return make(generation_config)

    target._get_candidate_generator = generator
    try:
        yield
    finally:
        del target._get_candidate_generator


def decoding(target: Any) -> AbstractContextManager[Any]:
    """What transformers changes about a model while it decodes (kernels of mixtures of experts, for example)."""
    return target._optimize_model_for_decode()


def advance(target: Any, outputs: Any, model_kwargs: dict[str, Any], num_new_tokens: int = 1) -> dict[str, Any]:
    """`model_kwargs` of the next forward, after one whose `num_new_tokens` first tokens stay."""
    return target._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=target.config.is_encoder_decoder, num_new_tokens=num_new_tokens
    )


def compile_config() -> Any:
    """How `generate()` compiles a model with a static cache; on every device, where by itself it leaves out CPUs."""
    config = transformers.generation.CompileConfig()
    config._compile_all_devices = True
    return config


def pad_token(generation_config: Any) -> Tensor | None:
    """The token that plain decoding gives to finished sequences of a batch."""
    return generation_config._pad_token_tensor


def length_with_cache(generation_config: Any, attention_mask: Tensor | None) -> int:
    """How many tokens `generate()` counts in prompt and cache together, before the prefill."""
    return generation_config._mask_length if attention_mask is None else attention_mask.shape[1]


def prompt_position_ids(target: Any, input_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`(…, 1, L)` positions `generate()` would give a prompt."""
    return target._prepare_position_ids_for_generation(input_ids, dict(inputs))


def unwrap(model: Any) -> Any:
    """The transformers model inside the wrappers of peft, `torch.compile` and distributed training, or what it is."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # compiled
            model = model._orig_mod
        else:
            return model


# -- caches and layers ------------------------------------------------------------------------------------------------


#: A layer without a cache of its own: it has no attention, or reads another layer's.
NO_CACHE = "dummy"


def layer_kinds(config: Any) -> list[str]:
    """What each layer of a text decoder keeps in its cache: `"full_attention"`, `"sliding_attention"`, …"""
    kinds, _ = _cache_layer_types(config)
    reading_images = getattr(config, "cross_attention_layers", None) or ()
    return ["cross_attention" if index in reading_images else kind for index, kind in enumerate(kinds)]


def run_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Any,
    position_embeddings: tuple[Tensor, Tensor],
    is_causal: bool,
) -> Tensor:
    """One decoder layer of [`DECODER_LAYERS`]. `is_causal` is set: sdpa takes a missing mask as a causal one."""
    return layer(
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        position_embeddings=position_embeddings,
        is_causal=is_causal,
        **{CACHE: cache},
    )


def attention_layers(cache: Any) -> list[Any]:
    """Layers of a cache that hold keys and values (one that shares those of another layer holds none)."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def checkpoint_with_cache(layer: nn.Module) -> None:
    """Lets gradient checkpointing run a layer with its cache, which must not grow when the layer is run again."""
    layer._can_checkpoint_with_cache = True  # type: ignore[assignment]


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


# -- attention --------------------------------------------------------------------------------------------------------


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
    return name in _mask_functions


def takes_flat_masks_only(name: str) -> bool:
    """Whether models make masks of one row per sequence for an attention function, as FlashAttention takes them."""
    return name in _mask_functions and _mask_functions[name] is _flat_mask


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Puts an attention function in the place of the one that has this name."""
    _attention_functions.register(name, function)


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


# -- configurations, models, trainers, files --------------------------------------------------------------------------


def name_of(config: Any) -> str:
    """Folder or Hub id that a configuration was loaded from; empty if it was not."""
    return config._name_or_path or ""


def commit_of(config: Any) -> str | None:
    """Commit of the Hub repository that a configuration was loaded from."""
    return getattr(config, "_commit_hash", None)


def attention_of(config: Any) -> str:
    """Name of the attention implementation a model runs on."""
    return config._attn_implementation or ""


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere; `None` if it does not."""
    hook = getattr(module, "_hf_hook", None)
    return None if hook is None else torch.device(hook.execution_device)


def on_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch, moved to where a `Trainer` trains."""
    return trainer._prepare_inputs(inputs)


def smart_resize(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """Height and width that Qwen's processors give a picture; it needs torchvision to import."""
    from transformers.models.qwen2_vl import image_processing_qwen2_vl

    return image_processing_qwen2_vl.smart_resize(*args, **kwargs)


def find_file(source: Any, name: str, *, needs_hub: bool, **hub_options: Any) -> str | None:
    """Local path of a file of a folder or a Hub repository, downloaded if necessary.

    Args:
        needs_hub: Raise `OSError` if the Hub cannot be reached; otherwise the file counts as missing.
    """
    return transformers.utils.cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=needs_hub,
        **hub_options,
    )
