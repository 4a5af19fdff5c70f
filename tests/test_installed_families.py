"""Every class that transformers lists for images and text, or as a causal language model: made tiny by its
configuration alone, and tried on text.

No family is known by name here. One that cannot be made tiny this way is skipped with the reason. For the others,
drafts give plain's text or are refused in one sentence.
"""

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import UnsupportedTargetError

from oracles import drafting_around
from tiny_targets import TEXT_SIZES, randomize

#: Class → its `model_type`, the last of several.
CLASSES = {
    name: model_type
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type, name in mapping.items()
}
MAX_PARAMETERS = 30_000_000
_TEXT = TEXT_SIZES | {
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "sliding_window": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "depth": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": TEXT_SIZES["hidden_size"],
}


def smaller(config: Any, sizes: dict[str, int], depth: int) -> dict[str, Any]:
    """The sizes that a configuration has, and its kinds of layers in turn."""
    fields: dict[str, Any] = {name: size for name, size in sizes.items() if type(getattr(config, name, None)) is int}
    is_computed = isinstance(getattr(type(config), "layer_types", None), property)
    kinds = [] if is_computed else list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if kinds:
        fields["layer_types"] = [kinds[index % len(kinds)] for index in range(depth)]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        fields["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    return fields


def tiny(name: str) -> Any:
    """A random target of this class, or a skip."""
    try:
        model_class = getattr(hf, name)
        config_class = model_class.config_class or CONFIG_MAPPING[CLASSES[name]]
        default = config_class()
        parts = {name: getattr(default, name, None) for name in getattr(config_class, "sub_configs", {})}
        fields = {
            name: smaller(part, _TEXT, 4) if part is default.get_text_config() else smaller(part, _VISION, 2)
            for name, part in parts.items()
            if part is not None
        }
        config = config_class(**(fields or smaller(default, _TEXT, 4)))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
        if size > MAX_PARAMETERS:
            pytest.skip(f"its configuration alone does not make it tiny: {size:,} parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            target = model_class._from_config(config, dtype=torch.float32).eval()
            randomize(target, [2])
        target.generation_config = hf.GenerationConfig(pad_token_id=0)
        ids = torch.arange(20, 60)[None]
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    except Exception as error:  # whatever a class needs that is not known here
        pytest.skip(f"not made by its configuration alone: {type(error).__name__}: {error}"[:200])
    return target


def refusal(name: str) -> str | None:
    """What a target of this class is refused with; `None` if it is accepted, and drafts then give plain's text."""
    target = tiny(name)
    ids = torch.arange(20, 60)[None]
    prompt = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    plain = target.generate(ids, **prompt)
    for shape in ("chain-5", "14-4-3"):
        try:
            draft = SparrowDraftModel.from_target(target)
        except UnsupportedTargetError as error:
            return str(error)
        assert (draft.dtype, draft.device) == (torch.float32, ids.device)
        draft.config.set_tree_shape(shape)
        for seed in range(3):
            with drafting_around(plain[0, ids.shape[1] :].tolist(), adversarial=seed > 0, seed=seed):
                assert torch.equal(target.generate(ids, **prompt, assistant_model=draft), plain)
    return None


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*cannot verify trees.*:UserWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_drafts_give_plains_text_or_are_refused(name: str) -> None:
    assert "\n" not in (refusal(name) or "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # Their last norm has no weights.
        ("OlmoForCausalLM", None),
        ("NanoChatForCausalLM", None),
        ("MiniMaxForCausalLM", "generate() gives MiniMaxForCausalLM no dynamic cache; "),
        ("MambaForCausalLM", "generate() gives MambaForCausalLM no position_ids; "),
    ],
)
def test_some_of_them(name: str, message: str | None) -> None:
    found = refusal(name)
    assert found is None if message is None else (found or "").startswith(message), found


def test_a_decoder_whose_norm_is_none_is_refused() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    target = hf.OPTForCausalLM(hf.OPTConfig(**sizes, word_embed_proj_dim=16, do_layer_norm_before=False))
    with pytest.raises(UnsupportedTargetError, match="OPTForCausalLM has no decoder with `layers` and a norm behind"):
        SparrowDraftModel.from_target(target)


def test_a_norm_without_weights_is_copied_as_one_of_ones() -> None:
    target = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT_SIZES)).to(torch.bfloat16)
    target.model.norm = torch.nn.RMSNorm(TEXT_SIZES["hidden_size"], elementwise_affine=False)
    draft = SparrowDraftModel.from_target(target, copy_last_layer=True)
    assert draft.dtype == torch.bfloat16 and draft.norm.weight.eq(1).all()
    assert torch.equal(draft.layers[0].mlp.up_proj.weight, target.model.layers[-1].mlp.up_proj.weight)
