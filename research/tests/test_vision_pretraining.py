"""What the towers are taught to name: labels say what pixels show, and a tower of single frames learns them."""

from typing import Any

import numpy as np
import pytest
import torch

from sparrow_hf.testbed.families import LLAVA_ONEVISION
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.scenes import BLANK, COLOURS, MOTIONS, Companion, Glyph, Scene, Step
from sparrow_hf.testbed.world import MOTION_CYCLE, SPEED, TRAIN_SEEDS, VALIDATION_SEEDS, render
from sparrow_research.attributes import OF_A_FRAME, OF_A_STEP
from sparrow_research.family_training import training_of
from sparrow_research.vision_pretraining import VisionPretraining, rescale_features


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


def test_a_frame_is_seen_by_itself() -> None:
    processor = build_processor(LLAVA_ONEVISION)
    target = build_target(processor.tokenizer, 1, family=LLAVA_ONEVISION)
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        together = training_of(target).visual_features(target, processor, frames)
        alone = [training_of(target).visual_features(target, processor, frame[None]) for frame in frames]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_tower_learns_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VisionPretraining, "batch_size", 32)
    processor = build_processor(LLAVA_ONEVISION)
    target = build_target(processor.tokenizer, 1, family=LLAVA_ONEVISION)
    vision = VisionPretraining(target, processor, TRAIN_SEEDS, 16)
    names = list(OF_A_FRAME.classes)
    before = dict(zip(names, vision.evaluate(VALIDATION_SEEDS[:2]), strict=True))
    losses = [vision.step()[0] for _ in range(16)]
    after = dict(zip(names, vision.evaluate(VALIDATION_SEEDS[:2]), strict=True))
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert after["background"] > 0.75 and after["column"] > before["column"] + 0.2
    rescale_features(target, processor, VALIDATION_SEEDS[:2])
    clip = np.concatenate([render((square("left"),), [Step(0)], np.random.default_rng(0))])
    with torch.no_grad():
        rms = training_of(target).visual_features(target, processor, clip).pow(2).mean().sqrt()
    assert 0.3 < rms < 0.8
