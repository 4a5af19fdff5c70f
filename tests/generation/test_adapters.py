"""Adapters of peft that a call itself sets up: those for each sequence, and those that begin within the prompt."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import UnsupportedGenerationError
from sparrow_hf.generation import static_decoding

from families import FAMILY_BY_NAME
from oracles import drafting_around

FAMILY = FAMILY_BY_NAME["qwen2_5_vl"]


def adapted(modules: list[str], **options: Any) -> tuple[PeftModel, SparrowDraftModel, dict[str, Any]]:
    """A target with the adapters "default" and "b", which change what it writes, its draft, and a prompt."""
    torch.manual_seed(3)
    target = FAMILY.build_target()
    config = {"r": 4, "lora_alpha": 64, "target_modules": modules, "init_lora_weights": False} | options
    model = get_peft_model(target, LoraConfig(task_type="CAUSAL_LM", **config))
    model.add_adapter("b", LoraConfig(task_type="CAUSAL_LM", **config))
    return model.eval(), SparrowDraftModel.from_target(target), FAMILY.build_inputs(target)


def new_ids(model: PeftModel, inputs: dict[str, Any], **options: Any) -> list[int]:
    output = model.generate(**inputs, max_new_tokens=16, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_an_adapter_that_begins_within_the_prompt_is_refused() -> None:
    """It leaves out the first rows of a forward that has more rows than the prompt has behind its invocation."""
    invocation = FAMILY.build_inputs(FAMILY.build_target())["input_ids"][0, -2:].tolist()
    model, draft, inputs = adapted(["q_proj", "v_proj", "o_proj"], alora_invocation_tokens=invocation)
    ids = inputs["input_ids"]
    # A prompt that does not name it leaves it alone.
    other = inputs | {"input_ids": ids.where(ids != invocation[1], invocation[1] - 1)}
    assert new_ids(model, other, assistant_model=draft) == new_ids(model, other)
    plain = new_ids(model, inputs)
    with model.disable_adapter():
        assert new_ids(model, inputs) != plain
    # Last, since peft leaves its hooks where a call raises.
    with pytest.raises(UnsupportedGenerationError, match="an activated LoRA"):
        new_ids(model, inputs, assistant_model=draft)


@pytest.mark.parametrize("shape", ["chain-5", "14-4-3"])
def test_adapters_of_sequences(shape: str) -> None:
    model, draft, inputs = adapted(["q_proj", "v_proj"])
    draft.config.set_tree_shape(shape)
    plain = {name: new_ids(model, inputs, adapter_names=[name]) for name in ("default", "b")}
    assert plain["default"] != plain["b"]
    for name, ids in plain.items():
        with drafting_around(ids, adversarial=True):
            assert new_ids(model, inputs, adapter_names=[name], assistant_model=draft) == ids


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapters_of_sequences_on_what_the_draft_calls_are_refused(module: str) -> None:
    model, draft, inputs = adapted(["q_proj", module])
    assert new_ids(model, inputs, assistant_model=draft) == new_ids(model, inputs)
    with pytest.raises(UnsupportedGenerationError, match="adapter_names with an adapter on the embedding or the head"):
        new_ids(model, inputs, adapter_names=["b"], assistant_model=draft)


def test_calls_with_other_adapters_share_no_fixed_shapes() -> None:
    """A captured graph would go on with the adapters that the first call named."""
    model, draft, inputs = adapted(["q_proj", "v_proj"])
    for name in ("default", "b", "default"):
        ids = new_ids(model, inputs, adapter_names=[name])
        options = {"adapter_names": [name], "cache_implementation": "static", "disable_compile": True}
        assert new_ids(model, inputs, assistant_model=draft, **options) == ids
    assert len(draft.target.static_sessions) == 2


def test_an_adapter_that_is_switched_is_seen_in_fixed_shapes() -> None:
    """Addresses and numbers of the old state would be in a captured graph."""
    model, draft, inputs = adapted(["q_proj"])
    static, states = {"assistant_model": draft, "cache_implementation": "static", "disable_compile": True}, set()
    for scale in (1.0, 7.0):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] = scale
        states.add(static_decoding._state_of(model.get_base_model()))
        assert new_ids(model, inputs, **static) == new_ids(model, inputs)
    with model.disable_adapter():
        states.add(static_decoding._state_of(model.get_base_model()))
        assert new_ids(model, inputs, **static) == new_ids(model, inputs)
    assert len(states) == 3
