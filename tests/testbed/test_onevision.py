"""The second family: what its tower is taught about single frames, that it learns it, and that nothing is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from sparrow_hf import SparrowDraftModel, TreeShape, testbed
from sparrow_hf.errors import TargetLoadError, UnsupportedTargetError
from sparrow_hf.testbed.attributes import OF_A_FRAME, OF_A_STEP
from sparrow_hf.testbed.benchmark_prompts import knows_the_world, says_what_it_shows
from sparrow_hf.testbed.families import FAMILIES, LLAVA_ONEVISION, QWEN2_5_VL, family_of
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.scenes import BLANK, COLOURS, MOTIONS, Companion, Glyph, Scene, Step
from sparrow_hf.testbed.vision_pretraining import VisionPretraining, rescale_features
from sparrow_hf.testbed.world import MOTION_CYCLE, SPEED, make_clip, render
from sparrow_hf.video import prepare_inputs

from families import FAMILY_BY_NAME
from oracles import drafting_around


def shown(motion: str, step: Step) -> list[dict[str, Any]]:
    """What the labels say about both frames of a large red square; attributes that cannot be seen are left out."""
    attributes = OF_A_FRAME.classes
    rows = OF_A_FRAME.labels(step, (square(motion),))
    return [
        {
            name: values[label]
            for (name, values), label in zip(attributes.items(), row, strict=True)
            if label < len(values)
        }
        for row in rows
    ]


def square(motion: str) -> Scene:
    return Scene(Glyph("red", "square", "large"), motion, "night", None)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("age", range(MOTION_CYCLE))
@pytest.mark.parametrize("motion", MOTIONS)
def test_labels_of_a_frame_say_what_its_pixels_show(motion: str, age: int, frozen: bool) -> None:
    step = Step(0, age, frozen)
    # The place without motion, by the same jitter.
    still = render((square("pulse"),), [Step(0, frozen=True)], np.random.default_rng(0))[0]
    frames = render((square(motion),), [step], np.random.default_rng(0))
    for frame, labels in zip(frames, shown(motion, step), strict=True):
        assert labels["background"] == "night" and labels["scene"] == 0 and "companion colour" not in labels
        top, left, side = red_square(frame)
        if not side:
            assert labels.keys() == {"background", "scene"}
            continue
        assert (labels["colour"], labels["shape"]) == ("red", "square")
        # A square covers 0.8 of its box.
        assert side == pytest.approx(0.8 * labels["pixels"], abs=1.5)
        still_top, still_left, still_side = red_square(still)
        right = (left - still_left + (side - still_side) / 2) / SPEED
        down = (top - still_top + (side - still_side) / 2) / SPEED
        assert (labels["column"], labels["row"]) == pytest.approx((right, down), abs=0.5)


def red_square(frame: np.ndarray) -> tuple[int, int, int]:
    """Upper edge, left edge and side of what is purely red; zeros if nothing is."""
    rows, columns = np.nonzero((frame == COLOURS["red"]).all(-1))
    return (rows.min(), columns.min(), int(np.ptp(columns)) + 1) if len(rows) else (0, 0, 0)


def test_a_tower_of_two_frames_is_asked_once_per_step_and_one_of_single_frames_twice() -> None:
    companion = Companion("blue", "upper left")
    story = (Scene(Glyph("lime", "star", "small"), "blink", "snow", companion),)
    for step in (Step(0), Step(BLANK)):
        assert len(OF_A_STEP.labels(step, story)) == 1 and len(OF_A_FRAME.labels(step, story)) == 2
    (nothing,) = OF_A_STEP.labels(Step(BLANK), story)
    assert nothing == [len(values) for values in OF_A_STEP.classes.values()]
    first, second = OF_A_FRAME.labels(Step(0), story)
    # The glyph is gone in the second frame, everything else is still there.
    assert first[5:] == second[5:] and first[:5] != second[:5] == [len(v) for v in OF_A_FRAME.classes.values()][:5]
    assert "motion" in OF_A_STEP.classes and "motion" not in OF_A_FRAME.classes


def test_both_families_share_text_and_differ_in_vision() -> None:
    processor = build_processor(LLAVA_ONEVISION)
    qwen, llava = (family.config(processor.tokenizer, 24) for family in FAMILIES)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"):
        assert getattr(qwen.text_config, name) == getattr(llava.text_config, name)
    assert (llava.text_config.model_type, llava.vision_config.model_type) == ("qwen2", "siglip_vision_model")
    assert processor.tokenizer.get_vocab() == build_processor(QWEN2_5_VL).tokenizer.get_vocab()


def test_a_frame_is_seen_by_itself() -> None:
    processor = build_processor(LLAVA_ONEVISION)
    target = build_target(processor.tokenizer, 1, family=LLAVA_ONEVISION)
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        together = LLAVA_ONEVISION.visual_features(target, processor, frames)
        alone = [LLAVA_ONEVISION.visual_features(target, processor, frame[None]) for frame in frames]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_tower_learns_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VisionPretraining, "batch_size", 32)
    processor = build_processor(LLAVA_ONEVISION)
    target = build_target(processor.tokenizer, 1, family=LLAVA_ONEVISION)
    vision = VisionPretraining(target, processor, testbed.TRAIN_SEEDS, 16)
    names = list(OF_A_FRAME.classes)
    before = dict(zip(names, vision.evaluate(testbed.VALIDATION_SEEDS[:2]), strict=True))
    losses = [vision.step()[0] for _ in range(16)]
    after = dict(zip(names, vision.evaluate(testbed.VALIDATION_SEEDS[:2]), strict=True))
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert after["background"] > 0.75 and after["column"] > before["column"] + 0.2
    rescale_features(target, processor, testbed.VALIDATION_SEEDS[:2])
    clip = np.concatenate([render((square("left"),), [Step(0)], np.random.default_rng(0))])
    with torch.no_grad():
        rms = LLAVA_ONEVISION.visual_features(target, processor, clip).pow(2).mean().sqrt()
    assert 0.3 < rms < 0.8


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
    with pytest.raises(TargetLoadError, match=r"pretrain --family llava-onevision"):
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
