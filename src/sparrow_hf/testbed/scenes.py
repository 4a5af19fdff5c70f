"""What can be seen in the testbed's video world: attributes, scenes, stories, and how a story is laid out in time.

A *story* is a list of 2–6 scenes. Each scene shows one main glyph in motion in front of a background, often with a
small companion dot that only some caption styles mention. Glyphs may return in later scenes. Nothing here knows about
pixels (see `world.py`) or words (see `captions.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = (
    "circle",
    "ring",
    "square",
    "frame",
    "triangle",
    "diamond",
    "star",
    "cross",
    "heart",
    "crescent",
    "arrow",
    "hourglass",
)
COLOURS = {
    "red": (214, 38, 38),
    "orange": (246, 134, 22),
    "yellow": (250, 226, 50),
    "lime": (150, 226, 40),
    "green": (18, 128, 52),
    "cyan": (50, 214, 222),
    "blue": (36, 72, 224),
    "purple": (128, 40, 186),
    "pink": (250, 136, 196),
    "brown": (128, 76, 36),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
}
SIZES = ("small", "large")
MOTIONS = ("left", "right", "up", "down", "blink", "pulse")
BACKGROUNDS = ("night", "forest", "ocean", "desert", "wall", "snow")
CORNERS = ("upper left", "upper right", "lower left", "lower right")

MIN_SCENES, MAX_SCENES = 2, 6
SCENE_COUNT_ODDS = {2: 0.14, 3: 0.26, 4: 0.28, 5: 0.2, 6: 0.12}
RETURN_ODDS = 0.4
COMPANION_ODDS = 0.7
IDLE_ODDS = 0.5
MAX_IDLE_SHARE = 0.5

BLANK = -1
"""Marks, in a timeline, a temporal step in which nothing at all is shown."""


@dataclass(frozen=True)
class Glyph:
    """An entity of the world; the same glyph may appear in several scenes of one story."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True)
class Companion:
    """A small dot in a corner of the picture: a distractor, or a detail that thorough captions mention."""

    colour: str
    corner: str


@dataclass(frozen=True)
class Scene:
    """What one scene of a story shows."""

    glyph: Glyph
    motion: str
    background: str
    companion: Companion | None


@dataclass(frozen=True)
class Step:
    """One temporal step (two frames): the scene shown (or `BLANK`), its age in steps, and whether it is still."""

    scene: int
    age: int = 0
    frozen: bool = False


Story = tuple[Scene, ...]


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def sample_story(rng: np.random.Generator, min_scenes: int = MIN_SCENES, max_scenes: int = MAX_SCENES) -> Story:
    """Draws a story of `min_scenes` … `max_scenes` scenes.

    Different glyphs of one story have different colours and neighbouring scenes different backgrounds. A glyph returns
    only after another one was seen in between.
    """
    counts = [count for count in range(1, MAX_SCENES + 1) if min_scenes <= count <= max_scenes]
    odds = np.array([SCENE_COUNT_ODDS.get(count, SCENE_COUNT_ODDS[MIN_SCENES]) for count in counts])
    number = counts[int(rng.choice(len(counts), p=odds / odds.sum()))]

    fresh_colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    scenes: list[Scene] = []
    for position in range(number):
        earlier = [scene.glyph for scene in scenes[:-1] if scene.glyph != scenes[-1].glyph]
        if earlier and rng.random() < RETURN_ODDS:
            glyph = earlier[int(rng.integers(len(earlier)))]
        else:
            glyph = Glyph(fresh_colours.pop(), _pick(rng, SHAPES), _pick(rng, SIZES))
        companion = None
        if rng.random() < COMPANION_ODDS:
            companion = Companion(_pick(rng, list(COLOURS)), _pick(rng, CORNERS))
        backgrounds = [name for name in BACKGROUNDS if position == 0 or name != scenes[-1].background]
        scenes.append(Scene(glyph, _pick(rng, MOTIONS), _pick(rng, backgrounds), companion))
    return tuple(scenes)


def _spread(rng: np.random.Generator, total: int, parts: int) -> list[int]:
    """Cuts `total` into `parts` random whole numbers ≥ 0, neither all equal nor wildly uneven."""
    shares = rng.dirichlet(np.full(parts, 3.0))
    edges = np.rint(np.cumsum(shares) * total).astype(int)
    return np.diff(edges, prepend=0).tolist()


def sample_timeline(rng: np.random.Generator, story: Story, num_steps: int) -> list[Step]:
    """Lays a story out over exactly `num_steps` temporal steps.

    Every scene moves for at least one step (two where there is room). Half of the clips also idle: up to half of their
    steps are blank, or repeat the last picture without motion. The same story therefore fits any length, by denser
    sampling, by waiting longer, or both.

    Raises:
        ValueError: `num_steps` is smaller than the number of scenes.
    """
    if num_steps < len(story):
        raise ValueError(f"A story of {len(story)} scenes needs at least as many temporal steps, got {num_steps}.")
    floor = 2 if num_steps >= 2 * len(story) else 1
    spare = num_steps - floor * len(story)
    idle_total = int(spare * rng.uniform(0, MAX_IDLE_SHARE)) if rng.random() < IDLE_ODDS else 0
    moving = [floor + extra for extra in _spread(rng, spare - idle_total, len(story))]
    # One idle stretch before each scene and one at the end; the first can only be blank.
    idle = _spread(rng, idle_total, len(story) + 1)

    timeline: list[Step] = [Step(BLANK)] * idle[0]
    for index, (steps, pause) in enumerate(zip(moving, idle[1:], strict=True)):
        timeline += [Step(index, age) for age in range(steps)]
        still = rng.random() < 0.5
        timeline += [Step(index, steps - 1, frozen=True) if still else Step(BLANK)] * pause
    return timeline
