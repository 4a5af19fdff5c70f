"""The wrapped methods of `GenerationMixin`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UnsupportedGenerationError
from .contract import check_contract, contract_breaches
from .models import unwrap
from .names import CACHE, GenerationMixin, GenerationMode


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
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _by_name(stock_generate, self, *args, **kwargs)
        draft = unwrap(call.get("assistant_model"))
        if is_draft(draft):
            args, kwargs = (), call | {"assistant_model": draft}
            caches = [call[name] for name in (CACHE, "past_key_values") if call.get(name) is not None]
            # Whoever decodes so never comes to `check`, and is not given the draft.
            if call.get("custom_generate") is not None:
                raise UnsupportedGenerationError(
                    "custom_generate decodes in its own way, without the draft: leave out custom_generate or "
                    "assistant_model"
                )
            input_ids = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
            embeds, mask = call.get("inputs_embeds"), call.get("attention_mask")
            check_inputs(self, input_ids, embeds, caches[0] if caches else None, mask)
        return stock_generate(self, *args, **kwargs)

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
        if is_draft(unwrap(_by_name(stock, self, *args, **kwargs).get("assistant_model"))):
            check_contract()
        return stock(self, *args, **kwargs)

    GenerationMixin.generate = generate


def _by_name(function: Callable[..., Any], target: Any, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of a method of `target`, those that were given by their place as well."""
    named = inspect.signature(function).bind_partial(target, *args, **kwargs).arguments
    named.pop("self")
    return named.pop("kwargs", {}) | named
