"""Rotary embeddings whose frequencies follow the longest position of a forward: rounds end at their borders."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import UnsupportedGenerationError
from sparrow_hf.generation import verifiers

from families import FAMILY_BY_NAME
from oracles import drafting_around
from tiny_targets import TEXT_SIZES, randomize

TREE = {"num_tree_nodes": 14, "num_draft_levels": 4, "beam_width": 3}
NEW_TOKENS = 40
#: Half a head has four frequencies.
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def target_with(rope: dict[str, Any], border: int, family: str = "llava_onevision") -> PreTrainedModel:
    """A target whose frequencies change at a position."""
    if rope["rope_type"] == "longrope":
        rope = rope | {"original_max_position_embeddings": border, "factor": 4.0}
        return FAMILY_BY_NAME[family].build_target(rope_parameters=rope, max_position_embeddings=4 * border)
    return FAMILY_BY_NAME[family].build_target(rope_parameters=rope, max_position_embeddings=border)


def text_target(name: str, rope: dict[str, Any], border: int) -> PreTrainedModel:
    """A language model of this class without other inputs than text."""
    sizes = TEXT_SIZES | {"vocab_size": 200, "max_position_embeddings": 256, "rope_parameters": rope}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "original_max_position_embeddings": border}
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**sizes)
    target = getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=torch.float32)
    randomize(target, [2])
    target.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return target.eval()


def ids(target: PreTrainedModel, inputs: dict[str, Any], draft: SparrowDraftModel | None, **kwargs: Any) -> list[int]:
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW_TOKENS, "assistant_model": draft} | kwargs
    return target.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("do_sample", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("shape", ["chain-5", "14-4-3"])
@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
# The prompt has 51 positions.
@pytest.mark.parametrize(
    "border", [60, *(pytest.param(border, marks=pytest.mark.full) for border in (40, 51, 52, 71))]
)
def test_rounds_end_at_the_border(border: int, rope: dict[str, Any], shape: str, do_sample: bool) -> None:
    target = target_with(rope, border)
    draft = SparrowDraftModel.from_target(target)
    draft.config.set_tree_shape(shape)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    plain = ids(target_with(rope, border), inputs, None, do_sample=do_sample)
    with drafting_around(plain, adversarial=False):
        assert ids(target, inputs, draft, do_sample=do_sample) == plain
    stats = draft.last_generation
    beyond = [accepted for accepted in stats.accepted if accepted]
    if rope is LONGROPE or border > 60:
        assert beyond, "nothing was accepted anywhere: the border is no reason to stop drafting"
    if rope is DYNAMIC and border == 40:
        assert not beyond


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_padding_does_not_move_the_border(rope: dict[str, Any]) -> None:
    from lossless import left_padded

    target = target_with(rope, 60)
    draft = SparrowDraftModel.from_target(target, **TREE)
    inputs = left_padded(FAMILY_BY_NAME["llava_onevision"].build_inputs(target), 0, 7)
    plain = ids(target, inputs, None)
    with drafting_around(plain, adversarial=False):
        assert ids(target, inputs, draft) == plain


def test_one_rope_per_kind_of_layer() -> None:
    """The border of the layers that have one holds for all."""
    family = FAMILY_BY_NAME["gemma4"]
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": DYNAMIC | {"rope_theta": 1e6},
    }
    target = family.build_target(rope_parameters=ropes, max_position_embeddings=340)
    draft = SparrowDraftModel.from_target(target, **TREE)
    inputs = family.build_inputs(target)
    assert inputs["input_ids"].shape[1] == 325
    plain = ids(target, inputs, None)
    with drafting_around(plain, adversarial=False):
        assert ids(target, inputs, draft) == plain
    assert draft.target.rope_borders == [(340, False)]


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_a_border_that_is_forgotten_is_found(rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_with(rope, 60)
    draft = SparrowDraftModel.from_target(target)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    plain = ids(target_with(rope, 60), inputs, None)
    monkeypatch.setattr(verifiers, "max_levels_before_border", lambda *_: 99)
    with drafting_around(plain, adversarial=False):
        assert ids(target, inputs, draft) != plain


def test_text_before_the_border_is_drafted_as_deep_as_ever() -> None:
    target = target_with(DYNAMIC, 4096)
    draft = SparrowDraftModel.from_target(target, num_draft_levels=5)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    plain = ids(target, inputs, None, max_new_tokens=20)
    with drafting_around(plain, adversarial=False):
        assert ids(target, inputs, draft, max_new_tokens=20) == plain
    assert draft.last_generation.accepted == [5, 5, 5, 0]


@pytest.mark.parametrize("name", ["Phi3", "Phi4Multimodal"])
def test_a_text_that_plain_decoding_computes_anew_is_refused(name: str) -> None:
    """From the border on, Phi-3's rows before it are others, and the cache of drafts has those of the prompt."""
    length, border = 13, 24
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.7] * 4}
    target = text_target(name, rope | {"original_max_position_embeddings": border, "factor": 8.0}, border)
    draft = SparrowDraftModel.from_target(target)
    input_ids = torch.randint(3, 200, (1, length), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": input_ids}
    message = rf"passes {border} tokens.* let it end at {border + 1} \(max_new_tokens={border + 1 - length}\)"
    with pytest.raises(UnsupportedGenerationError, match=message):
        ids(target, inputs, draft, max_new_tokens=border + 2 - length)
    for prompt, new_tokens in ((input_ids, border + 1 - length), (input_ids.repeat(1, 2), 20)):
        inputs, options = {"input_ids": prompt}, {"max_new_tokens": new_tokens}
        plain = ids(target, inputs, None, **options)
        with drafting_around(plain, adversarial=False):
            assert ids(target, inputs, draft, **options) == plain
        assert max(draft.last_generation.accepted) > 0
