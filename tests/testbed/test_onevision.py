"""The second family: what it shares with the first, that decoding loses nothing, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from sparrow_hf import SparrowDraftModel, TreeShape, testbed
from sparrow_hf.errors import TargetLoadError, UnsupportedTargetError
from sparrow_hf.testbed.benchmark_prompts import knows_the_world, says_what_it_shows
from sparrow_hf.testbed.families import FAMILIES, LLAVA_ONEVISION, QWEN2_5_VL, family_of
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.video import prepare_inputs

from families import FAMILY_BY_NAME
from oracles import drafting_around


def test_both_families_share_text_and_differ_in_vision() -> None:
    processor = build_processor(LLAVA_ONEVISION)
    qwen, llava = (family.config(processor.tokenizer, 24) for family in FAMILIES)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"):
        assert getattr(qwen.text_config, name) == getattr(llava.text_config, name)
    assert (llava.text_config.model_type, llava.vision_config.model_type) == ("qwen2", "siglip_vision_model")
    assert processor.tokenizer.get_vocab() == build_processor(QWEN2_5_VL).tokenizer.get_vocab()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SparrowDraftModel, dict[str, Any]]:
    """An untrained target as it loads from disk, a fresh draft, and the prompt of a real clip."""
    folder = tmp_path_factory.mktemp("target")
    processor = build_processor(LLAVA_ONEVISION)
    build_target(processor.tokenizer, 3, family=LLAVA_ONEVISION).save_pretrained(folder)
    target = AutoModelForImageTextToText.from_pretrained(folder).eval()
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    clip = make_clip(folder / "clip.mp4", testbed.EVALUATION_SEEDS[0], 100, family_of(target).tokens_per_step)
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_glimpse_tokens=16)
    return target, draft, dict(prepare_inputs(processor, clip.messages))


@pytest.mark.parametrize("shape", [TreeShape(6, 5, 1), TreeShape(30, 4, 8)])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}])
def test_decoding_with_a_fresh_draft_loses_nothing(models, shape: TreeShape, sampling: dict[str, Any]) -> None:
    target, draft, inputs = models
    draft.config.set_tree_shape(shape)
    settings = {**sampling, "max_new_tokens": 40, "min_new_tokens": 40}

    def generate(**kwargs: Any) -> list[int]:
        torch.manual_seed(0)
        return target.generate(**inputs, **settings, **kwargs)[0, inputs["input_ids"].shape[1] :].tolist()

    plain = generate()
    assert len(set(plain)) > 3
    assert generate(assistant_model=draft) == plain
    with drafting_around(plain, adversarial=True):
        assert generate(assistant_model=draft) == plain
    assert draft.last_generation.rounds < 30


def test_models_that_do_not_ship_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetLoadError, match="'qwen2.5-vl' and 'llava-onevision', none called 'llava'"):
        testbed.load("llava")
    monkeypatch.setitem(testbed.SHIPPED, "llava-onevision", tmp_path)
    with pytest.raises(TargetLoadError, match="target and the draft of 'llava-onevision' do not ship.*make testbed"):
        testbed.load("llava-onevision")
    stranger = FAMILY_BY_NAME["qwen2_vl"].build_target()
    with pytest.raises(UnsupportedTargetError, match="Qwen2VLForConditionalGeneration"):
        family_of(stranger)


def test_content_words_are_those_of_a_tokenizer_that_knows_them() -> None:
    _, processor, _ = testbed.load("llava-onevision")
    assert knows_the_world(processor)
    ocean, of = processor.tokenizer.convert_tokens_to_ids(["ocean", "of"])
    assert says_what_it_shows(processor)(ocean) and not says_what_it_shows(processor)(of)
    stranger = FAMILY_BY_NAME["qwen2_vl"]
    assert not knows_the_world(stranger.processor(stranger.tokenizer))
