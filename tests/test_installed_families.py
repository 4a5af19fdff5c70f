"""Every class that transformers lists for images and text: made tiny by its configuration alone, and tried on text.

No family is known by name here. One that cannot be made tiny this way is skipped with the reason. For the others,
drafts give plain's text or are refused in one sentence.
"""

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import UnsupportedTargetError

from oracles import drafting_around
from tiny_targets import TEXT_SIZES, randomize

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
    if kinds := list(dict.fromkeys(getattr(config, "layer_types", None) or [])):
        fields["layer_types"] = [kinds[index % len(kinds)] for index in range(depth)]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        fields["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    return fields


def tiny(model_type: str) -> Any:
    """A random target of this type, or a skip."""
    try:
        model_class = getattr(hf, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
        config_class = model_class.config_class or CONFIG_MAPPING[model_type]
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


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*cannot verify trees.*:UserWarning")
@pytest.mark.parametrize("model_type", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_drafts_give_plains_text_or_are_refused(model_type: str) -> None:
    target = tiny(model_type)
    ids = torch.arange(20, 60)[None]
    prompt = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    plain = target.generate(ids, **prompt)
    for shape in ("chain-5", "14-4-3"):
        try:
            draft = SparrowDraftModel.from_target(target)
        except UnsupportedTargetError as error:
            assert "\n" not in str(error)
            return
        draft.config.set_tree_shape(shape)
        for seed in range(3):
            with drafting_around(plain[0, ids.shape[1] :].tolist(), adversarial=seed > 0, seed=seed):
                assert torch.equal(target.generate(ids, **prompt, assistant_model=draft), plain)
