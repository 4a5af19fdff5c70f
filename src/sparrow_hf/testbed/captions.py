"""The language of the testbed's world: prompts, caption grammar, vocabulary, and the content of a caption.

Captions have four styles, each with its own prompts. Wording is random but not uniform: every choice has a favourite
that depends on style and content (see `_Writer.say`), so a trained model writes varied greedy captions, and its
distribution keeps entropy.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from .scenes import COLOURS, CORNERS, SHAPES, SIZES, Scene, Story

FAVOURITE_ODDS = 0.7

PROMPTS = {
    "describe": ("describe this video in detail .", "what can be seen in this video ?"),
    "list": ("list the scenes of this video .", "name every scene one by one ."),
    "report": ("write a report about this video .", "report what happens , part by part ."),
    "story": ("tell this video as a story .", "turn what you see into a short story ."),
}
STYLES = tuple(PROMPTS)

NUMBERS = ("one", "two", "three", "four", "five", "six")
MEDIA = ("video", "clip", "recording", "footage")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
MOTION_PHRASES = {
    "left": ("drifts to the left", "slides left", "glides off to the left side"),
    "right": ("runs to the right", "walks right", "strides off to the right side"),
    "up": ("rises slowly", "climbs higher and higher", "floats up into the air"),
    "down": ("sinks slowly", "falls deeper and deeper", "drops down to the ground"),
    "blink": ("blinks on and off", "flickers like a lamp", "flashes without rest"),
    "pulse": ("pulses in place", "swells and shrinks in turn", "throbs at a steady pace"),
}
PLACES = ("in front of the {scenery}", "before the {scenery}", "against the {scenery}", "not far from the {scenery}")
SCENERY = {
    "night": ("night sky", "stars", "moon and the clouds"),
    "forest": ("forest", "woods", "trees of a park"),
    "ocean": ("ocean", "waves of the tide", "sea"),
    "desert": ("desert", "dunes", "sand of the plain"),
    "wall": ("wall", "bricks", "stones of a house"),
    "snow": ("snow", "frost on the fields", "ice"),
}
ASIDES = (
    ("while a {colour} dot waits in the {corner} corner", "while nothing else is around"),
    ("with a {colour} dot in the {corner} corner", "with nothing more to see"),
    ("and a {colour} dot fills the {corner} corner", "and nothing more is there"),
)
"""With a companion, and without one."""
ARRIVALS = ("appears and", "comes into view and", "enters and")
FIRST_WORDS = ("first ,", "at the start ,", "to begin with ,")
MIDDLE_WORDS = ("then", "next ,", "after that ,", "a moment later ,", "soon")
LAST_WORDS = ("finally ,", "at last ,", "in the end ,")
FLOURISHES = {
    "left": ("as if it had lost something", "because it wanted to go home"),
    "right": ("as if it were late for work", "because the road was calling"),
    "up": ("as light as a feather", "as if it could touch the clouds"),
    "down": ("as heavy as lead", "as if it were tired of it all"),
    "blink": ("as if it sent a secret message", "like a sign nobody could read"),
    "pulse": ("as if it took a deep breath", "like something that is alive"),
}
OPENINGS = {
    "describe": ("this {medium} shows {number} scenes and opens {background} .",),
    "list": (
        "here are the {number} scenes of the {medium} , in order .",
        "the {medium} is made of {number} scenes , listed here .",
    ),
    "report": (
        "this is a report on a {medium} of {number} parts .",
        "the {medium} under review has {number} parts .",
    ),
    "story": (
        "our story in {number} parts starts {background} with a {colour} {shape} .",
        "this tale of {number} parts begins {background} , where a {colour} {shape} lives .",
    ),
}
CLOSINGS = {
    "describe": ("over all , the {medium} leads from the {first} to the {last} .",),
    "list": ("so the {medium} starts with the {first} , and the {last} closes it .",),
    "report": ("to sum up , the {first} was seen at the beginning and the {last} in part {number} .",),
    "story": ("and that is how the tale of the {first} ended , {background} , with the {last} .",),
}
SCENE_PATTERNS = {
    "describe": "{connective} a {size} {colour} {shape} {arrival} {motion} {background} , {aside} .",
    "list": "scene {number} : {background} , a {size} {colour} {shape} {motion} , {aside} .",
    "report": "part {number} is about a {size} {colour} {shape} that {motion} {background} , {aside} .",
    "story": "{connective} , {background} , a {size} {colour} {shape} {motion} , {flourish} .",
}
"""A glyph may be in several scenes, but no caption says so, because targets of this size did not learn to."""
STORY_CONNECTIVES = ("some day", "later on", "some time later", "not long after", "before long")


Wording = TypeVar("Wording", str, tuple[str, str])


class _Writer:
    """Draws the wording of one caption."""

    def __init__(self, rng: np.random.Generator, style: str):
        self.rng = rng
        self.style = style

    def say(self, options: tuple[Wording, ...], *context: object) -> Wording:
        """One of `options`; the favourite, drawn with `FAVOURITE_ODDS`, is a fixed function of style and `context`."""
        favourite = zlib.crc32(repr((options[0], self.style, *context)).encode()) % len(options)
        if len(options) == 1 or self.rng.random() < FAVOURITE_ODDS:
            return options[favourite]
        others = [option for position, option in enumerate(options) if position != favourite]
        return others[int(self.rng.integers(len(others)))]

    def place(self, scene: Scene, *context: object) -> str:
        """Where a scene plays."""
        return self.say(PLACES, *context).format(scenery=self.say(SCENERY[scene.background], *context))

    def scene(self, scene: Scene, index: int, number_of_scenes: int) -> str:
        glyph, companion = scene.glyph, scene.companion
        if self.style == "story":
            connectives: tuple[str, ...] = STORY_CONNECTIVES
        elif index == 0:
            connectives = FIRST_WORDS
        else:
            connectives = LAST_WORDS if index == number_of_scenes - 1 else MIDDLE_WORDS
        aside = self.say(ASIDES, scene.background)[companion is None]
        if companion is not None:
            aside = aside.format(colour=companion.colour, corner=companion.corner)
        return SCENE_PATTERNS[self.style].format(
            connective=self.say(connectives, index),
            number=NUMBERS[index],
            size=self.say(SIZE_WORDS[glyph.size], scene.motion),
            colour=glyph.colour,
            shape=glyph.shape,
            arrival=self.say(ARRIVALS, scene.motion),
            motion=self.say(MOTION_PHRASES[scene.motion], scene.background),
            background=self.place(scene, index % 3),
            aside=aside,
            flourish=self.say(FLOURISHES[scene.motion], glyph.size),
        )


def write_caption(rng: np.random.Generator, story: Story, style: str) -> str:
    """A caption of `story` in one of `STYLES`, as lower-case words separated by single spaces."""
    writer = _Writer(rng, style)
    first, last = story[0], story[-1]
    medium = MEDIA[int(rng.choice(len(MEDIA), p=(0.55, 0.2, 0.15, 0.1)))]
    number = NUMBERS[len(story) - 1]
    sentences = [
        writer.say(OPENINGS[style], len(story)).format(
            medium=medium,
            number=number,
            background=writer.place(first, "opening"),
            colour=first.glyph.colour,
            shape=first.glyph.shape,
        )
    ]
    sentences += [writer.scene(scene, index, len(story)) for index, scene in enumerate(story)]
    sentences.append(
        writer.say(CLOSINGS[style]).format(
            medium=medium,
            number=number,
            first=f"{first.glyph.colour} {first.glyph.shape}",
            last=f"{last.glyph.colour} {last.glyph.shape}",
            background=writer.place(last, "closing"),
        )
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(sentences))


def sample_prompt(rng: np.random.Generator, style: str) -> str:
    """One of the prompts that ask for `style`."""
    return PROMPTS[style][int(rng.integers(len(PROMPTS[style])))]


def _phrases() -> Iterator[str]:
    for table in (PROMPTS, SIZE_WORDS, MOTION_PHRASES, SCENERY, FLOURISHES, OPENINGS, CLOSINGS):
        for options in table.values():
            yield from options
    yield from SCENE_PATTERNS.values()
    for aside in ASIDES:
        yield from aside
    for options in (PLACES, ARRIVALS, FIRST_WORDS, MIDDLE_WORDS, LAST_WORDS):
        yield from options
    for options in (STORY_CONNECTIVES, NUMBERS, MEDIA, SHAPES, SIZES, CORNERS, tuple(COLOURS)):
        yield from options


def vocabulary() -> list[str]:
    """Every word and punctuation mark a prompt or caption can hold, sorted; but for "an", which is spelled."""
    words = {word for phrase in _phrases() for word in re.sub(r"\{\w+\}", " ", phrase).split()}
    return sorted(words)


def _meanings() -> dict[str, tuple[str, str]]:
    meanings: dict[str, tuple[str, str]] = {}
    meanings.update({word: ("colour", word) for word in COLOURS})
    meanings.update({word: ("shape", word) for word in SHAPES})
    meanings.update({word: ("number", word) for word in NUMBERS})
    meanings.update({word: ("size", size) for size, words in SIZE_WORDS.items() for word in words})
    meanings["nothing"] = ("alone", "alone")
    # The first word of a motion or of a scenery determines it.
    keywords = {"motion": MOTION_PHRASES, "background": SCENERY}
    for slot, values in keywords.items():
        meanings.update({phrase.split()[0]: (slot, value) for value, phrases in values.items() for phrase in phrases})
    return meanings


_MEANINGS = _meanings()
CLAIM_WORDS = frozenset(_MEANINGS) | {"a", "upper", "lower", "left", "right"}
"""Words that name facts of a clip.

The first word that depends on a fact is always one of these, never a word like the "over" of "over the ocean", which
would reveal the ocean although it claims nothing: a target learns the words that have weight in its loss. (One
exception: the n of "an orange".)
"""


def meaning(word: str) -> tuple[str, str]:
    """The fact that a claim word names, (slot, value): equal for words of the same meaning."""
    return _MEANINGS.get(word, ("word", word))


def content(caption: str) -> dict[tuple[int, str, int], str]:
    """What a caption claims, whatever its wording.

    Returns a mapping from (sentence, slot, occurrence of that slot in the sentence) to a value: colours, shapes,
    sizes, motions, backgrounds, corners, numbers. Two captions of one story in one style have equal content.
    """
    claims: dict[tuple[int, str, int], str] = {}
    words = re.findall(r"\w+|[^\w\s]", caption)
    sentence, counts, corner = 0, Counter[str](), ""
    for word in words:
        if word == ".":
            sentence, counts, corner = sentence + 1, Counter(), ""
            continue
        if word in ("upper", "lower"):
            corner = word
            continue
        slot, value = ("corner", f"{corner} {word}") if corner else _MEANINGS.get(word, ("", ""))
        corner = ""
        if slot:
            claims[sentence, slot, counts[slot]] = value
            counts[slot] += 1
    return claims


def content_score(caption: str, reference: str) -> tuple[int, int]:
    """Number of claims on which both captions agree, and number of claims made by either."""
    made, wanted = content(caption), content(reference)
    return sum(made.get(key) == value for key, value in wanted.items()), len(made.keys() | wanted.keys())
