"""Steps of `generate()` that our loop takes too, and what is written down about a call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import transformers
from torch import Tensor

from .names import CACHE


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


def pad_token(generation_config: Any) -> Tensor | None:
    """The token that plain decoding gives to finished sequences of a batch."""
    return generation_config._pad_token_tensor


def length_with_cache(generation_config: Any, attention_mask: Tensor | None) -> int:
    """How many tokens `generate()` counts in prompt and cache together, before the prefill."""
    return generation_config._mask_length if attention_mask is None else attention_mask.shape[1]


def prompt_position_ids(target: Any, input_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`(…, 1, L)` positions `generate()` would give a prompt."""
    return target._prepare_position_ids_for_generation(input_ids, dict(inputs))


def compiles(target: Any, cache: Any, generation_config: Any) -> bool:
    """Whether `generate()` would compile the target's decoding with this cache: where, and unless told otherwise."""
    return bool(target._valid_auto_compile_criteria({CACHE: cache}, generation_config))


def compile_options(target: Any, generation_config: Any) -> dict[str, Any]:
    """Arguments of `torch.compile` that `generate()` would use."""
    return (generation_config.compile_config or target._default_compile_config()).to_dict()


def compile_config() -> Any:
    """How `generate()` compiles a model with a static cache; on every device, where by itself it leaves out CPUs."""
    config = transformers.generation.CompileConfig()
    config._compile_all_devices = True
    return config
