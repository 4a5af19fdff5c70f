"""What a draft cannot be combined with is refused before any part of the target runs, its vision tower included."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE
from sparrow_hf.errors import UnsupportedGenerationError
from sparrow_hf.generation.refusals import _OTHER_WAYS, named_mode

from batches import batch_of
from families import FAMILY_BY_NAME

FAMILIES = ("qwen2_5_vl", "llava_onevision")


@pytest.fixture(params=FAMILIES)
def setting(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, SparrowDraftModel, dict[str, Any]]:
    family = FAMILY_BY_NAME[request.param]
    target = family.build_target()
    return target, SparrowDraftModel.from_target(target), family.build_inputs(target)


@contextmanager
def refused(target: PreTrainedModel, message: str) -> Iterator[None]:
    """The call inside raises, and no module of the target has run."""
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in target.named_modules()
    ]
    try:
        with pytest.raises(UnsupportedGenerationError, match=message):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran


def test_the_vision_tower_is_watched(setting) -> None:
    """A call that is served runs modules, so one that is refused too late is seen."""
    target, draft, inputs = setting
    with pytest.raises(pytest.fail.Exception), refused(target, "."):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=2)


#: Options of a call, and what is said of them.
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 3}, r"draft: beam_search \(num_beams=3\)$"),
    ({"num_beams": 3, "do_sample": True}, r"draft: beam_sample \(num_beams=3\)$"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    ({"use_cache": False}, "use_cache=False"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    ({"assistant_early_exit": 2}, "assistant_early_exit=2"),
    ({"use_mtp": True}, "use_mtp=True"),
    ({"speculation_type": "dflash"}, "speculation_type='dflash'"),
    ({"dola_layers": "high"}, "dola_layers='high'"),
    ({"custom_generate": lambda model, **options: None}, "custom_generate decodes in its own way"),
    ({"custom_generate": "somebody/decoding"}, "custom_generate decodes in its own way"),
    ({"dola_layers": [1], "use_cache": False}, r"use_cache=False; dola_layers=\[1\]"),
]


def test_the_page_of_refusals_names_every_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "support-matrix.md").read_text()
    section = page.partition("## What is refused")[2].partition("\n## ")[0]
    of_others = {"synced_gpus", "inputs_embeds", "output_attentions", "output_hidden_states"}
    refused_options = {name for kwargs, _ in OPTIONS for name in kwargs} - {"do_sample"} | of_others
    assert refused_options >= set(_OTHER_WAYS)
    assert not {name for name in refused_options if not re.search(rf"`{name}\b", section)}


# transformers itself asks for `trust_remote_code` first in these modes.
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search (penalty_alpha=0.6, top_k=4)"),
        ({"force_words_ids": [[5]], "num_beams": 1}, "constrained_beam_search"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "constrained_beam_search (num_beams=2)"),
    ],
)
def test_a_mode_is_named_with_the_options_that_ask_for_it(options: dict[str, Any], named: str) -> None:
    config = GenerationConfig(**options)
    assert named_mode(config.get_generation_mode(), config) == named


@pytest.mark.parametrize(("kwargs", "message"), OPTIONS)
def test_options(setting, kwargs: dict[str, Any], message: str) -> None:
    target, draft, inputs = setting
    with refused(target, message):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=4, **kwargs)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("rows", [[0, 1], [0]], ids=["two", "one"])
def test_padding_of_layers_that_count_it(positional: bool, rows: list[int]) -> None:
    family = FAMILY_BY_NAME["minimax_m3_vl-sparse"]
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target)
    batch = batch_of(family, target, [{"videos": 0, "question": question} for question in ("Who?", "Where is it?")])
    batch = {name: value[rows] for name, value in batch.items()}
    first = (batch.pop("input_ids"),) if positional else ()
    with refused(target, "the prompt is padded: layers of the kind minimax_m3_sparse"):
        target.generate(*first, **batch, assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize("length", [None, 3])
def test_embeddings_without_all_of_their_ids(setting, length: int | None) -> None:
    target, draft, inputs = setting
    with torch.no_grad():
        embeds = target.get_input_embeddings()(inputs.pop("input_ids"))
    ids = {} if length is None else {"input_ids": torch.full((1, length), 20)}
    with refused(target, f"inputs_embeds has {embeds.shape[1]} positions and input_ids {length or 0}"):
        target.generate(inputs_embeds=embeds, **ids, assistant_model=draft, max_new_tokens=4)


# Since 5.24 transformers takes the cache by either name.
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_caches_that_cannot_step_back(setting, name: str) -> None:
    target, draft, inputs = setting
    cache = StaticCache(config=target.config.get_text_config(), max_cache_len=200)
    with refused(target, "found StaticCache"):
        target.generate(**inputs, **{name: cache}, assistant_model=draft, max_new_tokens=4)
    offloaded = DynamicCache(config=target.config.get_text_config())
    # Made on a machine with an accelerator only.
    offloaded.offloading = True
    with refused(target, "needs the default dynamic cache"):
        target.generate(**inputs, **{name: offloaded}, assistant_model=draft, max_new_tokens=4)


def test_attentions_of_windows() -> None:
    target = FAMILY_BY_NAME["gemma4"].build_target("eager")
    draft, inputs = SparrowDraftModel.from_target(target), FAMILY_BY_NAME["gemma4"].build_inputs(target)
    wanted = {"output_attentions": True, "return_dict_in_generate": True}
    with refused(target, "output_attentions with layers that see a window"):
        target.generate(**inputs, **wanted, assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning", "multitask"])
def test_virtual_tokens_of_peft(setting, method: str) -> None:
    from peft import (
        MultitaskPromptTuningConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )

    target, draft, inputs = setting
    text = target.config.get_text_config()
    kinds = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig, "p-tuning": PromptEncoderConfig}
    config = kinds.get(method, MultitaskPromptTuningConfig)(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=text.num_hidden_layers,
        token_dim=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
    )
    wrapped = get_peft_model(target, config)
    with refused(target, "prompt or prefix tuning of peft"):
        wrapped.generate(**inputs, assistant_model=draft, max_new_tokens=4)
    # The model itself is as it was.
    plain = target.generate(**inputs, max_new_tokens=4)
    assert torch.equal(plain, target.generate(**inputs, max_new_tokens=4, assistant_model=draft))


def with_adapter(draft: SparrowDraftModel) -> None:
    """LoRA with dropout on the draft, as its fine-tuning leaves it."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], lora_dropout=0.2), draft)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("part", ["attention", "adapter"])
def test_dropout_of_a_draft_in_training_mode(part: str, batch: int) -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    draft = SparrowDraftModel.from_target(target, attention_dropout=0.3 if part == "attention" else 0.0)
    if part == "adapter":
        with_adapter(draft)
    ids = torch.arange(20, 40).repeat(batch, 1)
    call = {"attention_mask": torch.ones_like(ids), "do_sample": True, "max_new_tokens": 30}

    def sampled(draft: SparrowDraftModel | None) -> torch.Tensor:
        torch.manual_seed(3)
        return target.generate(ids, **call, assistant_model=draft)

    draft.train()
    with refused(target, r"the draft is in training mode and has dropout: .* call draft\.eval\(\) first"):
        sampled(draft)
    assert torch.equal(sampled(draft.eval()), sampled(None))


def test_training_mode_without_dropout_is_served(setting) -> None:
    target, draft, inputs = setting
    draft = SparrowDraftModel(draft.config)
    assert draft.training
    torch.manual_seed(3)
    plain = target.generate(**inputs, do_sample=True, max_new_tokens=12)
    torch.manual_seed(3)
    assert torch.equal(plain, target.generate(**inputs, do_sample=True, max_new_tokens=12, assistant_model=draft))


def test_dropout_of_a_target_in_training_mode() -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target(attention_dropout=0.3)
    draft, inputs = SparrowDraftModel.from_target(target).eval(), family.build_inputs(target)
    assert torch.equal(target.generate(**inputs, max_new_tokens=4, assistant_model=draft)[:, :-4], inputs["input_ids"])
    target.train()
    with refused(target, r"the target is in training mode and has dropout: .* call target\.eval\(\) first"):
        target.generate(**inputs, max_new_tokens=4, assistant_model=draft)
