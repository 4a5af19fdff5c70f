"""Checks of a `generate()` call with a draft. They run before the vision tower and refuse what cannot be combined.

What depends on the target alone is refused when the draft is made or bound (`targets.py`, `target_config.py`,
`self_check.py`), what fixed shapes cannot have in `static_decoding.py` and `integration.py`, `custom_generate`, which
leaves `generate()` before it is checked, in `_transformers/seam.py`. `docs/support-matrix.md` lists all of it.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation import GenerationMode

from .._transformers import CACHE, layer_kinds
from ..errors import UnsupportedGenerationError
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView

#: Options of `generate()` for other ways to draft or to decode, which a draft would silently replace.
_OTHER_WAYS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type", "dola_layers")

#: Kinds of layers that count padding as text.
_COUNTS_PADDING = frozenset({"minimax_m3_sparse"})

#: In names of a module's settings that are above 0 where its forward draws random numbers in training mode: dropout,
#: dropped layers or paths, and jitter of routers. `nn.Dropout` calls its own `p`.
_RANDOM = ("drop", "jitter")


def check_inputs(
    target: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, attention_mask: Tensor | None
) -> None:
    """Checks the tensors of a call, as the user passed them or as `generate()` completed them.

    Args:
        input_ids: `(B, L)`; `None` if the call has none.
        inputs_embeds: `(B, L, H)`, if the call has them.
        cache: The cache passed to the call, or the one made for it.
        attention_mask: `(B, L)`, if the call has one.

    Raises:
        UnsupportedGenerationError: There are embeddings without ids, another kind of cache, or padding that a layer
            would read.
    """
    length = 0 if input_ids is None else input_ids.shape[1]
    if inputs_embeds is not None and inputs_embeds.shape[1] != length:
        raise UnsupportedGenerationError(
            f"inputs_embeds has {inputs_embeds.shape[1]} positions and input_ids {length}: the draft must know which "
            "positions are visual, so pass the input_ids of all of them as well"
        )
    if cache is not None and (type(cache) is not DynamicCache or getattr(cache, "offloading", False)):
        raise UnsupportedGenerationError(
            f"a Sparrow draft needs the default dynamic cache, found {type(cache).__name__}: leave {CACHE} at its "
            "default (use_cache=True), or pass cache_implementation='static'"
        )
    is_padded = attention_mask is not None and not attention_mask.all()
    if is_padded and (unfit := sorted(_COUNTS_PADDING.intersection(kinds_of_layers(target)))):
        raise UnsupportedGenerationError(
            f"the prompt is padded: layers of the kind {', '.join(unfit)} count the padding, and give other states "
            "for several tokens in one forward than one by one; call generate() for each prompt, without padding"
        )


def check_request(
    generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any], target: Any
) -> None:
    """Checks the options of a call and how the target is set up.

    Raises:
        UnsupportedGenerationError: Something cannot be combined with a draft; all of it is named.
    """
    found: list[str] = []
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        found.append(named_mode(generation_mode, generation_config))
    if (generation_config.num_return_sequences or 1) > 1:
        found.append(f"num_return_sequences={generation_config.num_return_sequences}")
    if generation_config.assistant_ensemble_weight is not None:
        found.append("assistant_ensemble_weight (it would change the output)")
    if generation_config.use_cache is False:
        found.append("use_cache=False")
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        found.append(f"cache_implementation={generation_config.cache_implementation!r}")
    if generation_mode_kwargs.get("synced_gpus"):
        found.append("synced_gpus (ZeRO-3 or FSDP generation)")
    for name in _OTHER_WAYS:
        value = getattr(generation_config, name, None)
        if value not in (None, False):
            found.append(f"{name}={value!r}")
    if generation_config.output_attentions and generation_config.return_dict_in_generate and has_windows(target):
        found.append("output_attentions with layers that see a window (the rows that they have left differ)")
    if learns_prompt(target):
        found.append("prompt or prefix tuning of peft on the target (its virtual tokens are not in input_ids)")
    if adapts_part_of_prompt(target):
        found.append("an activated LoRA (aLoRA) of peft (it leaves out rows of a forward over several tokens)")
    if chooses_adapters(target.get_input_embeddings(), target.get_output_embeddings()):
        found.append("adapter_names with an adapter on the embedding or the head (the draft calls both by itself)")
    if found:
        raise UnsupportedGenerationError(f"cannot be combined with a Sparrow draft: {'; '.join(found)}")


def named_mode(generation_mode: Any, generation_config: Any) -> str:
    """A way to decode, with the options that ask for it."""
    options: tuple[str, ...] = ()
    if (generation_config.num_beams or 1) > 1:
        options = ("num_beams",)
    elif generation_mode == GenerationMode.CONTRASTIVE_SEARCH:
        options = ("penalty_alpha", "top_k")
    settings = ", ".join(f"{name}={getattr(generation_config, name)}" for name in options)
    return f"{generation_mode.value} ({settings})" if settings else generation_mode.value


def check_modes(draft: SparrowDraftModel, view: TargetView) -> None:
    """Checks that neither a bound draft nor its target draws random numbers beside those that choose tokens.

    Raises:
        UnsupportedGenerationError: One of them is in training mode and has dropout.
    """
    for name, model in (("draft", draft), ("target", view.decoder)):
        if draws_numbers(model):
            raise UnsupportedGenerationError(
                f"the {name} is in training mode and has dropout: its random numbers come from the generator that "
                f"sampled tokens are drawn from, so the text would not be plain generate()'s; call {name}.eval() first"
            )


def draws_numbers(model: nn.Module) -> bool:
    """Whether a forward of a model in its present mode draws random numbers."""
    for module in model.modules():
        settings = vars(module).items() if module.training else ()
        for name, value in settings:
            is_rate = name == "p" or any(part in name for part in _RANDOM)
            if is_rate and type(value) in (int, float) and value > 0:
                return True
    return False


def has_windows(target: Any) -> bool:
    """Whether layers of the target drop old rows from their cache."""
    return bool({"sliding_attention", "chunked_attention"}.intersection(kinds_of_layers(target)))


def kinds_of_layers(target: Any) -> list[str]:
    """What each layer of the target's decoder keeps in its cache."""
    return layer_kinds(target.config.get_text_config())


def learns_prompt(target: Any) -> bool:
    """Whether a peft wrapper that puts virtual tokens before the prompt is generating with this model."""
    # While it generates, the wrapper replaces a method of the model with its own.
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", None)
    return bool(getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False))


def adapts_part_of_prompt(target: nn.Module) -> bool:
    """Whether an adapter of peft that begins to act within the prompt takes part in this call (aLoRA).

    It counts its rows from the end of each forward, so it leaves out the first rows of a long one.
    """
    return any(
        offset is not None
        for module in target.modules()
        for arguments in arguments_of_hooks(module)
        for offset in arguments.get("alora_offsets") or []
    )


def chooses_adapters(*modules: nn.Module | None) -> bool:
    """Whether peft gives one of these modules an adapter for each sequence of this call (`adapter_names`).

    It then takes one entry per sequence, and the draft calls it with other numbers of rows.
    """
    given = (arguments for module in modules if module is not None for arguments in arguments_of_hooks(module))
    return any("adapter_names" in arguments for arguments in given)


def arguments_of_hooks(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What the hooks in front of a module were given by whoever put them there; peft's are partial functions."""
    return (getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values())
