"""What a rendered clip shows, in words: for the vision tower, for a language model that reads text, and as questions.

The tower turns every frame into `SLOTS` visual tokens. What it is taught to give for each is the input embedding of a
word, so that a frame reads like a short text to a language model: a *soft caption*. All words of a frame can be seen
in that frame; motion cannot, it is the change of the two digits (column and row) or of the size from frame to frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparrow_hf.testbed.scenes import BACKGROUNDS, BLANK, COLOURS, CORNERS, SHAPES, SIZES, Scene, Step, Story
from sparrow_hf.testbed.world import FRAMES_PER_STEP, GLYPH_PIXELS, MOTION_CYCLE, SHRUNK, SPEED, pose_of

SLOTS = 16
"""Visual tokens of a frame."""
NUMBERS = ("one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
EXTENTS = {
    GLYPH_PIXELS["small"]: " small",
    GLYPH_PIXELS["large"]: " large",
    int(SHRUNK * GLYPH_PIXELS["small"]): " tiny",
    int(SHRUNK * GLYPH_PIXELS["large"]): " medium",
}
"""Words of a glyph's pixels: a glyph that pulses is smaller in every second frame."""
SPLIT = {"hourglass": (" hour", "glass")}
"""Shapes of two tokens; the others are followed by " shape"."""
REACH = MOTION_CYCLE * FRAMES_PER_STEP // 2
PLACES = {
    "night": "under a night sky",
    "forest": "in a forest",
    "ocean": "on the ocean",
    "desert": "in a desert",
    "wall": "in front of a brick wall",
    "snow": "in the snow",
}
MOVES = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves upward",
    "down": "moves downward",
    "blink": "blinks on and off",
    "pulse": "grows and shrinks",
}
BLACK = (" black",) * SLOTS


def frame_words(story: Story, step: Step, part: int) -> tuple[str, ...]:
    """The `SLOTS` words that frame `part` of a temporal step stands for; each is one token."""
    if step.scene == BLANK:
        return BLACK
    scene = story[step.scene]
    pose = pose_of(scene, step, part)
    glyph: tuple[str, ...] = (" no", " hidden", " shape", " shape", "0", "0")
    if pose.pixels:
        shape = SPLIT.get(scene.glyph.shape, (f" {scene.glyph.shape}", " shape"))
        column, row = (str(1 + REACH + round(offset / SPEED)) for offset in (pose.x, pose.y))
        glyph = (EXTENTS[pose.pixels], f" {scene.glyph.colour}", *shape, column, row)
    dot: tuple[str, ...] = (" no", " dot", " at", " all")
    if scene.companion is not None:
        dot = (f" {scene.companion.colour}", " dot", *(f" {word}" for word in scene.companion.corner.split()))
    return (" Scene", f" {NUMBERS[step.scene]}", ":", *glyph, " in", f" {scene.background}", ",", *dot)


def clip_words(story: Story, timeline: list[Step]) -> list[tuple[str, ...]]:
    """`frame_words` of every frame of a clip."""
    return [frame_words(story, step, part) for step in timeline for part in range(FRAMES_PER_STEP)]


def candidate_words() -> list[tuple[str, ...]]:
    """For every slot the words that it can stand for."""
    digits = tuple("123456789")
    shapes = tuple(SPLIT.get(shape, (f" {shape}", " shape")) for shape in SHAPES)
    colours = tuple(f" {colour}" for colour in COLOURS)
    upper, side = (sorted({f" {corner.split()[part]}" for corner in CORNERS}) for part in (0, 1))
    slots: list[tuple[str, ...]] = [
        (" Scene",),
        tuple(f" {number}" for number in NUMBERS),
        (":",),
        (*EXTENTS.values(), " no"),
        (*colours, " hidden"),
        tuple(dict.fromkeys((*(first for first, _ in shapes), " shape"))),
        tuple(dict.fromkeys(second for _, second in shapes)),
        (*digits, "0"),
        (*digits, "0"),
        (" in",),
        tuple(f" {name}" for name in BACKGROUNDS),
        (",",),
        (*colours, " no"),
        (" dot",),
        (*upper, " at"),
        (*side, " all"),
    ]
    return [(*words, BLACK[0]) for words in slots]


def glyph_phrase(scene: Scene) -> str:
    """A scene's glyph with its article."""
    article = "an" if scene.glyph.size[0] in "aeiou" else "a"
    return f"{article} {scene.glyph.size} {scene.glyph.colour} {scene.glyph.shape}"


def scene_sentence(scene: Scene, index: int) -> str:
    """All facts of one scene."""
    dot = ""
    if scene.companion is not None:
        article = "an" if scene.companion.colour[0] in "aeiou" else "a"
        dot = f", with {article} {scene.companion.colour} dot in the {scene.companion.corner} corner"
    return f"Scene {NUMBERS[index]}: {glyph_phrase(scene)} {MOVES[scene.motion]} {PLACES[scene.background]}{dot}."


def plain_facts(story: Story) -> str:
    """The whole clip as text."""
    scenes = " ".join(scene_sentence(scene, index) for index, scene in enumerate(story))
    return f"The video has {NUMBERS[len(story) - 1]} scenes. {scenes}"


@dataclass(frozen=True)
class Question:
    """A question with the one answer that counts as right, and the kind of fact it asks for."""

    kind: str
    text: str
    answer: str


KINDS: dict[str, tuple[str, ...]] = {
    "number": tuple(f"{number.capitalize()}." for number in NUMBERS[1:]),
    "colour": tuple(f"{colour.capitalize()}." for colour in COLOURS),
    "shape": tuple(f"{shape.capitalize()}." for shape in SHAPES),
    "size": tuple(f"{size.capitalize()}." for size in SIZES),
    "background": tuple(f"{name.capitalize()}." for name in BACKGROUNDS),
    "motion": tuple(f"It {move}." for move in MOVES.values()),
    "dot": (*(f"{colour.capitalize()}." for colour in COLOURS), "There is no dot."),
    "corner": (*(f"{corner.capitalize()}." for corner in CORNERS), "There is no dot."),
}
"""Kinds of questions with all answers of each."""
DENSE = ("What exactly happens, scene by scene?", "State the facts of every scene.")
ORDER = ("Name what is shown, in order.", "Which shapes appear, one after the other?")


def questions(story: Story) -> Iterator[Question]:
    """Every question that has a short, exact answer."""
    yield Question("number", "How many scenes does the video have?", f"{NUMBERS[len(story) - 1].capitalize()}.")
    for index, scene in enumerate(story):
        where = f"in the {ORDINALS[index]} scene"
        glyph, dot = scene.glyph, scene.companion
        yield Question("colour", f"What colour is the shape {where}?", f"{glyph.colour.capitalize()}.")
        yield Question("shape", f"What shape is shown {where}?", f"{glyph.shape.capitalize()}.")
        yield Question("size", f"Is the shape {where} small or large?", f"{glyph.size.capitalize()}.")
        yield Question("background", f"What is the background {where}?", f"{scene.background.capitalize()}.")
        yield Question("motion", f"What does the shape do {where}?", f"It {MOVES[scene.motion]}.")
        nothing = "There is no dot."
        yield Question("dot", f"What colour is the dot {where}?", f"{dot.colour.capitalize()}." if dot else nothing)
        yield Question(
            "corner", f"In which corner is the dot {where}?", f"{dot.corner.capitalize()}." if dot else nothing
        )


def long_exact(story: Story, rng: np.random.Generator) -> Question:
    """A question whose exact answer names every scene: all its facts, or its glyph alone."""
    if rng.random() < 0.6:
        scenes = " ".join(scene_sentence(scene, index) for index, scene in enumerate(story))
        return Question("dense", DENSE[int(rng.integers(len(DENSE)))], scenes)
    glyphs = ", then ".join(glyph_phrase(scene) for scene in story)
    return Question("order", ORDER[int(rng.integers(len(ORDER)))], f"{glyphs[0].upper()}{glyphs[1:]}.")


PROMPTS = {
    "describe": (
        "Describe this video in detail.",
        "What can be seen in this video?",
        "Explain this video to someone who cannot see it.",
        "Write a caption of a few sentences for this video.",
    ),
    "list": (
        "List the scenes of this video, with one sentence on each.",
        "Make a numbered list of everything that is shown.",
        "List the colours and the shapes that you see, and say where they are.",
    ),
    "compare": (
        "Compare the first scene with the last one.",
        "What is different between the scenes of this video?",
        "What do the scenes of this video have in common?",
    ),
    "next": (
        "What happens first, and what happens next?",
        "What could happen after the end of this video?",
        "Summarize what happens from the beginning to the end.",
    ),
    "story": (
        "Write a story about the shape in the first scene.",
        "Tell this video as a fairy tale for children.",
        "Write a short story that has the places of this video in it.",
        "Write a poem about this video.",
    ),
    "opinion": (
        "What mood does this video have, and why?",
        "Give this video a title and explain your choice.",
        "Write three questions about this video, with their answers.",
        "Write a message to a friend about this video.",
    ),
}
"""Prompts that are answered at length, by kind."""


def as_text(story: Story, prompt: str) -> str:
    """What a language model without eyes is asked in place of the clip and `prompt`."""
    return f"Here is what a video shows. {plain_facts(story)}\n\n{prompt}"
