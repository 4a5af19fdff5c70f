"""The video world: stories, their layout in time, their captions, their pixels before and after the codec."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparrow_hf.testbed import captions, world
from sparrow_hf.testbed.captions import CLAIM_WORDS, PROMPTS, STYLES, content, content_score, vocabulary, write_caption
from sparrow_hf.testbed.scenes import (
    BACKGROUNDS,
    BLANK,
    COLOURS,
    CORNERS,
    MOTIONS,
    SHAPES,
    Companion,
    Glyph,
    Scene,
    Step,
    Story,
    sample_story,
    sample_timeline,
)
from sparrow_hf.testbed.world import make_clip, render, write_script
from sparrow_hf.video import read_video

RED_HEART = Glyph("red", "heart", "large")
LEFT_AT_NIGHT = Scene(RED_HEART, "left", "night", None)


def stories(number: int = 200) -> list[tuple[Scene, ...]]:
    return [sample_story(np.random.default_rng(seed)) for seed in range(number)]


def test_a_colour_names_one_glyph_and_glyphs_return() -> None:
    returned = 0
    for story in stories():
        assert 2 <= len(story) <= 6
        glyphs = {scene.glyph for scene in story}
        assert len({glyph.colour for glyph in glyphs}) == len(glyphs)
        for index, scene in enumerate(story):
            earlier = [other.glyph for other in story[:index]]
            assert index == 0 or (scene.glyph != earlier[-1] and scene.background != story[index - 1].background)
            returned += scene.glyph in earlier
    assert returned > 50


def test_every_attribute_of_the_world_occurs() -> None:
    seen: Counter[str] = Counter()
    for story in stories():
        for scene in story:
            seen.update([scene.glyph.colour, scene.glyph.shape, scene.motion])
    assert set(seen) == {*COLOURS, *SHAPES, *MOTIONS}


@pytest.mark.parametrize("num_steps", [6, 7, 16, 100, 500])
def test_a_story_fills_any_length_exactly_in_order_and_moves_in_every_scene(num_steps: int) -> None:
    idle = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        story = sample_story(rng)
        timeline = sample_timeline(rng, story, num_steps)
        assert len(timeline) == num_steps
        shown = [step.scene for step in timeline if step.scene != BLANK]
        assert shown == sorted(shown) and set(shown) == set(range(len(story)))
        assert {step.scene for step in timeline if not step.frozen} - {BLANK} == set(range(len(story)))
        idle += sum(step.scene == BLANK or step.frozen for step in timeline)
    assert num_steps < 16 or 0.02 < idle / (60 * num_steps) < 0.3


def test_a_story_refuses_fewer_steps_than_scenes() -> None:
    with pytest.raises(ValueError, match="needs at least"):
        sample_timeline(np.random.default_rng(0), (LEFT_AT_NIGHT,) * 3, 2)


@pytest.mark.parametrize("style", STYLES)
def test_captions_of_a_story_differ_in_wording_and_agree_in_content(style: str) -> None:
    words = {*vocabulary(), "an"}
    lengths, wordings = [], 0
    for seed, story in enumerate(stories(100)):
        rng = np.random.default_rng(seed)
        first, second = write_caption(rng, story, style), write_caption(rng, story, style)
        assert content(first) == content(second)
        assert set(first.split()) <= words
        lengths.append(len(first.split()))
        wordings += first != second
    assert wordings > 95
    assert 60 <= min(lengths) and max(lengths) <= 220 and 100 <= np.median(lengths) <= 160


def test_a_caption_reads_as_written() -> None:
    story = (
        LEFT_AT_NIGHT,
        Scene(Glyph("blue", "ring", "small"), "up", "snow", Companion("lime", "upper left")),
    )
    caption = write_caption(np.random.default_rng(1), story, "list")
    assert content(caption) == {
        (0, "number", 0): "two",
        (1, "number", 0): "one",
        (1, "background", 0): "night",
        (1, "size", 0): "large",
        (1, "colour", 0): "red",
        (1, "shape", 0): "heart",
        (1, "motion", 0): "left",
        (1, "alone", 0): "alone",
        (2, "number", 0): "two",
        (2, "background", 0): "snow",
        (2, "size", 0): "small",
        (2, "colour", 0): "blue",
        (2, "shape", 0): "ring",
        (2, "motion", 0): "up",
        (2, "colour", 1): "lime",
        (2, "corner", 0): "upper left",
        (3, "colour", 0): "red",
        (3, "shape", 0): "heart",
        (3, "colour", 1): "blue",
        (3, "shape", 1): "ring",
    }


@pytest.mark.parametrize("style", STYLES)
def test_the_first_word_that_depends_on_a_fact_is_a_claim_word(style: str) -> None:
    """Two stories that differ in one thing, worded alike, first part at a word that claims something."""
    scene = Scene(RED_HEART, "left", "night", Companion("lime", "upper left"))
    others = [
        replace(scene, glyph=Glyph("blue", "heart", "large")),
        replace(scene, glyph=Glyph("red", "ring", "large")),
        *(replace(scene, motion=motion) for motion in MOTIONS[1:]),
        *(replace(scene, background=background) for background in BACKGROUNDS[1:]),
        replace(scene, companion=None),
        replace(scene, companion=Companion("blue", "upper left")),
        *(replace(scene, companion=Companion("lime", corner)) for corner in CORNERS[1:]),
    ]
    for other in others:
        first, second = (first_wording((scene, each), style).split() for each in (scene, other))
        parted = next(((a, b) for a, b in zip(first, second, strict=False) if a != b), None)
        assert parted is None or set(parted) <= CLAIM_WORDS, (parted, other)


def first_wording(story: Story, style: str) -> str:
    """The caption of which every phrase is the first of its options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions._Writer, "say", lambda self, options, *context: options[0])
        return write_caption(np.random.default_rng(0), story, style)


def test_content_score_counts_wrong_missing_and_invented_claims() -> None:
    reference = "a red heart slides left ."
    assert content_score(reference, reference) == (3, 3)
    assert content_score("a blue heart slides left .", reference) == (2, 3)
    assert content_score("a red heart .", reference) == (2, 3)
    assert content_score("a red heart slides left before the night sky .", reference) == (3, 4)
    assert content_score("a heart . a red thing slides left .", reference) == (1, 5)


def copied_per_round(prompt: str, caption: str, drafted: int = 5) -> float:
    """Tokens per round of prompt lookup with 2-grams, then 1-grams, on the known answer `caption`."""
    context, answer = prompt.split(), caption.split()
    position = rounds = 0
    while position < len(answer):
        draft: list[str] = []
        for size in (2, 1):
            starts = [s for s in range(len(context) - size) if context[s : s + size] == context[-size:]]
            if starts:
                draft = context[starts[0] + size : starts[0] + size + drafted]
                break
        accepted = 0
        for word, wanted in zip(draft, answer[position:], strict=False):
            if word != wanted:
                break
            accepted += 1
        context += answer[position : position + accepted + 1]
        position += accepted + 1
        rounds += 1
    return len(answer) / rounds


@pytest.mark.parametrize("favourite_odds", [captions.FAVOURITE_ODDS, 1.0])
def test_captions_cannot_be_guessed_by_copying(favourite_odds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "FAVOURITE_ODDS", favourite_odds)
    for style in STYLES:
        rates = [
            copied_per_round(PROMPTS[style][0], write_caption(np.random.default_rng(seed), story, style))
            for seed, story in enumerate(stories(40))
        ]
        assert np.mean(rates) < 1.6
    assert copied_per_round("a", "x y z " * 40) > 4


def test_blank_steps_are_black_and_frozen_ones_repeat_the_last_picture() -> None:
    timeline = [Step(BLANK), Step(0, 0), Step(0, 0, frozen=True)]
    frames = render((LEFT_AT_NIGHT,), timeline, np.random.default_rng(0))
    assert frames.shape == (6, 64, 64, 3) and not frames[:2].any()
    assert not np.array_equal(frames[2], frames[3])
    assert np.array_equal(frames[4], frames[2]) and np.array_equal(frames[5], frames[2])


@pytest.mark.parametrize(
    ("motion", "shift"), [("left", (-3, 0)), ("right", (3, 0)), ("up", (0, -3)), ("down", (0, 3))]
)
def test_directions_move_three_pixels_per_frame_within_every_step(motion: str, shift: tuple[int, int]) -> None:
    scene = Scene(RED_HEART, motion, "night", None)
    frames = render((scene,), [Step(0, age) for age in range(6)], np.random.default_rng(0)).astype(int)
    red = (frames[..., 0] > 150) & (frames[..., 1] < 90)
    for first, second in zip(red[0::2], red[1::2], strict=True):
        assert np.array_equal(np.roll(first, shift[::-1], axis=(0, 1)), second)


def test_every_colour_keeps_its_name_through_the_codec(tmp_path: Path) -> None:
    palette = np.array(list(COLOURS.values()))
    for index, colour in enumerate(COLOURS):
        scene = Scene(Glyph(colour, "square", "small"), "pulse", "forest", None)
        world.write_mp4(tmp_path / "clip.mp4", render((scene,), [Step(0)] * 4, np.random.default_rng(index)))
        frames, _ = read_video(tmp_path / "clip.mp4")
        seen = frames[0, 25:31, 29:35].mean(axis=(0, 1))
        assert np.abs(palette - seen).sum(axis=1).argmin() == index


def test_a_clip_is_a_function_of_its_seed(tmp_path: Path) -> None:
    first, again, other = (
        make_clip(tmp_path / name / "clip.mp4", seed, visual_tokens=100)
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert (tmp_path / "a/clip.mp4").read_bytes() == (tmp_path / "b/clip.mp4").read_bytes()
    assert first.caption == again.caption != other.caption
    frames, metadata = read_video(tmp_path / "a/clip.mp4")
    assert frames.shape == (50, 64, 64, 3) and metadata.fps == 8
    script = write_script(7, 100)
    drawn = render(script.story, script.timeline, np.random.default_rng([7, 1]))
    assert np.abs(drawn.astype(int) - frames).mean() < 5
    question = first.messages[0]["content"]
    assert question[0] == {"type": "video", "video": str(tmp_path / "a" / "clip.mp4")}
    assert any(question[1]["text"] in prompts for prompts in PROMPTS.values())


def test_seeds_of_training_validation_and_evaluation_are_disjoint() -> None:
    ranges = sorted((world.TRAIN_SEEDS, world.VALIDATION_SEEDS, world.EVALUATION_SEEDS), key=lambda seeds: seeds.start)
    assert all(first.stop <= second.start for first, second in zip(ranges, ranges[1:], strict=False))
