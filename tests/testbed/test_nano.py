"""The testbed's targets of both families: processor, architecture, and the weights that ship."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from sparrow_hf.data.messages import messages_for
from sparrow_hf.evaluation.benchmark import count_visual_tokens
from sparrow_hf.testbed import EVALUATION_SEEDS, SHIPPED, content_accuracy, load_target
from sparrow_hf.testbed.captions import vocabulary
from sparrow_hf.testbed.families import FAMILIES, LLAVA_ONEVISION, QWEN2_5_VL, Family
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.video import prepare_inputs


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of the testbed's families in turn."""
    return request.param


@pytest.fixture(scope="module")
def processor(family: Family) -> Any:
    return build_processor(family)


@pytest.fixture(scope="module")
def target(processor: Any, family: Family) -> Any:
    return build_target(processor.tokenizer, num_hidden_layers=2, family=family)


def test_every_word_is_one_token_and_other_words_are_spelled(processor: Any) -> None:
    tokenizer = processor.tokenizer
    words = vocabulary()
    assert [len(tokenizer(word)["input_ids"]) for word in words] == [1] * len(words)
    assert tokenizer.decode(tokenizer("a red heart slides left , then a zebra .")["input_ids"]) == (
        "a red heart slides left, then a zebra."
    )
    assert tokenizer("Describe THIS video.")["input_ids"] == tokenizer("describe this video .")["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer("qwertz123 " + " ".join(words))["input_ids"]


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((16, 64, 64), 32), ((15, 64, 64), 32), ((2, 64, 64), 4), ((8, 480, 480), 16), ((4, 1080, 1920), 4)],
)
def test_visual_tokens_of_a_video_for_qwen(size: tuple[int, int, int], tokens: int) -> None:
    check_visual_tokens(QWEN2_5_VL, size, tokens, (4 * tokens, 3 * 2 * 16 * 16))


@pytest.mark.parametrize("size", [(16, 64, 64), (15, 64, 64), (2, 64, 64), (8, 480, 480), (4, 1080, 1920)])
def test_visual_tokens_of_a_video_for_llava(size: tuple[int, int, int]) -> None:
    check_visual_tokens(LLAVA_ONEVISION, size, 4 * size[0] + 1, (1, size[0], 3, 64, 64))


def check_visual_tokens(family: Family, size: tuple[int, int, int], tokens: int, pixels: tuple[int, ...]) -> None:
    processor = build_processor(family)
    target = build_target(processor.tokenizer, num_hidden_layers=1, family=family)
    video = np.zeros((*size, 3), dtype=np.uint8)
    inputs = prepare_inputs(processor, messages_for(video, "describe this video in detail ."))
    assert count_visual_tokens(target, inputs["input_ids"]) == tokens
    assert inputs["pixel_values_videos"].shape == pixels
    with torch.no_grad():
        assert target(**inputs).logits.shape == (1, inputs["input_ids"].shape[1], 384)


@pytest.mark.parametrize("visual_tokens", [64, 402])
def test_a_clip_has_the_requested_visual_tokens(
    family: Family, processor: Any, target: Any, tmp_path: Path, visual_tokens: int
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", EVALUATION_SEEDS[0], visual_tokens, family.tokens_per_step)
    inputs = prepare_inputs(processor, clip.messages)
    newline = 1 if family is LLAVA_ONEVISION else 0
    per_step = family.tokens_per_step
    assert count_visual_tokens(target, inputs["input_ids"]) == per_step * round(visual_tokens / per_step) + newline
    same_story = make_clip(tmp_path / "other.mp4", EVALUATION_SEEDS[0], visual_tokens)
    assert clip.caption == same_story.caption


def test_the_processor_survives_saving(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    clip = make_clip(tmp_path / "clip.mp4", 3, 40)
    for name, value in prepare_inputs(processor, clip.messages).items():
        assert torch.equal(prepare_inputs(loaded, clip.messages)[name], value), name


def test_initial_weights_depend_on_the_seed_alone(processor: Any, family: Family) -> None:
    state = torch.get_rng_state()
    first, again, other = (build_target(processor.tokenizer, 1, seed, family).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_the_shipped_targets_describe_unseen_clips(family: Family) -> None:
    folder = SHIPPED[family.name] / "target"
    target, processor = load_target(folder)
    assert type(target) is family.model_class and target.dtype == torch.float32
    assert target.config.text_config.num_hidden_layers == 24
    assert sum(file.stat().st_size for file in folder.iterdir()) < 15e6
    assert content_accuracy(target, processor, EVALUATION_SEEDS[1000:1004], visual_tokens=64) > 0.75
