"""The fixtures themselves: tiny targets read their pixels, and generate texts that depend on all inputs."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from families import FAMILIES
from tiny_targets import Family

VARIANTS = [
    pytest.param({"videos": 1}, id="video"),
    pytest.param({"videos": 2}, id="two-videos"),
    pytest.param({"videos": 1, "images": 1}, id="video-and-image"),
    pytest.param({"videos": 0, "images": 1}, id="image"),
    pytest.param({"videos": 0}, id="text"),
]


def generate(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> GenerateDecoderOnlyOutput:
    return target.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def decoder_input(target: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The rows the text decoder receives for a prompt, (1, L, H)."""
    seen = []
    hook = target.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        target(**inputs)
    hook.remove()
    return seen[0]


def test_families_are_the_nine_supported_ones() -> None:
    assert [family.name for family in FAMILIES] == [
        "qwen2_5_vl",
        "llava_onevision",
        "internvl",
        "qwen2_vl",
        "qwen3_vl",
        "llava_next_video",
        "video_llava",
        "smolvlm",
        "video_llama_3",
    ]
    for family in FAMILIES:
        assert family.build_target().config.model_type == family.name


def build_inputs(family: Family, target: PreTrainedModel, variant: dict[str, int]) -> dict[str, torch.Tensor]:
    if variant.get("videos") and variant.get("images") and not family.mixes_modalities:
        pytest.skip(f"the processor of {family.name} takes images or videos, not both")
    return family.build_inputs(target, **variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_varies_without_near_ties(family: Family, variant: dict[str, int]) -> None:
    target = family.build_target()
    inputs = build_inputs(family, target, variant)
    output = generate(target, inputs)
    new_tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(new_tokens) == 12 or new_tokens[-1] in target.generation_config.eos_token_id
    assert len(set(new_tokens)) > len(new_tokens) // 3
    best, second = torch.cat(output.logits).topk(2).values.unbind(-1)
    # Block verification and one-token decoding differ by about 1e-5 in fp32.
    assert (best - second).min() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_features_replace_exactly_the_placeholders(family: Family, variant: dict[str, int]) -> None:
    target = family.build_target()
    inputs = build_inputs(family, target, variant)
    is_placeholder = torch.isin(inputs["input_ids"], torch.tensor(family.visual_token_ids))
    embedded = target.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal((decoder_input(target, inputs) != embedded).any(-1), is_placeholder)
    assert is_placeholder.any() == bool(variant.get("videos", 1) or variant.get("images"))


def test_pixels_change_the_answer_but_not_the_prompt(family: Family) -> None:
    target = family.build_target()
    inputs, others = (family.build_inputs(target, seed=seed) for seed in (0, 1))
    assert torch.equal(inputs["input_ids"], others["input_ids"])
    with torch.no_grad():
        logits, other_logits = (target(**each).logits[0, -1] for each in (inputs, others))
    assert (logits - other_logits).abs().max() > 0.2 * logits.std()
    assert not torch.equal(generate(target, inputs).sequences, generate(target, others).sequences)


def test_every_frame_counts(family: Family) -> None:
    target = family.build_target()
    counts = []
    for num_frames in (2, 4, 8):
        ids = family.build_inputs(target, num_frames=num_frames)["input_ids"]
        counts.append(int(torch.isin(ids, torch.tensor(family.visual_token_ids)).sum()))
    # Linear in the frames; LLaVA-OneVision ends a video with one newline feature.
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0


def test_seed_decides_weights_whatever_the_attention(family: Family) -> None:
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    sdpa = family.build_target("sdpa", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    eager = family.build_target("eager", seed=3)
    other = family.build_target("sdpa", seed=4)
    assert sdpa.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    for (name, weight), (_, same) in zip(sdpa.named_parameters(), eager.named_parameters(), strict=True):
        assert torch.equal(weight, same), name
        assert weight.isfinite().all(), name
    assert not torch.equal(sdpa.get_input_embeddings().weight, other.get_input_embeddings().weight)
    inputs = family.build_inputs(sdpa)
    with torch.no_grad():
        torch.testing.assert_close(sdpa(**inputs).logits, eager(**inputs).logits, atol=2e-5, rtol=1e-5)
