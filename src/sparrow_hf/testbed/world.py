"""The testbed's video world: renders stories as mp4 files, with messages that ask for a caption and its reference.

Everything is a function of an integer seed; training, validation and evaluation clips come from disjoint ranges.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..artifacts import atomic_path
from ..data.messages import messages_for
from ..extras import require
from .captions import STYLES, sample_prompt, write_caption
from .scenes import BLANK, COLOURS, Scene, Step, Story, sample_story, sample_timeline

FRAME_SIZE = 64
"""Height and width of a frame, in pixels."""
FRAMES_PER_SECOND = 8
FRAMES_PER_STEP = 2
"""Frames of one temporal step: what Qwen2.5-VL's processor joins, and the shortest motion there is."""
TOKENS_PER_STEP = 4
"""Visual tokens of one temporal step for Qwen2.5-VL: 2 × 2 merged patches of 32 × 32 pixels."""

TRAIN_SEEDS = range(0, 1_000_000_000)
VALIDATION_SEEDS = range(1_000_000_000, 1_100_000_000)
EVALUATION_SEEDS = range(1_100_000_000, 1_200_000_000)

GLYPH_PIXELS = {"small": 20, "large": 30}
MOTION_CYCLE = 4
"""Temporal steps after which a motion starts over."""
SPEED = 3
"""Pixels per frame of the four directions."""
SHRUNK = 0.6
"""Size of a pulsing glyph in every second frame."""
COMPANION_PIXELS = 10
GLYPH_CENTRE = (32, 28)
CORNER_CENTRES = {"upper left": (8, 8), "upper right": (56, 8), "lower left": (8, 48), "lower right": (56, 48)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


class Clip(NamedTuple):
    """A clip on disk: chat messages that show it and ask for a caption, and the reference caption."""

    messages: list[dict[str, Any]]
    caption: str


class Script(NamedTuple):
    """All that is needed to render one clip and to caption it."""

    story: Story
    timeline: list[Step]
    prompt: str
    caption: str


class Pose(NamedTuple):
    """A scene's glyph in one frame: `x` and `y` pixels away from its place, `pixels` large (0: hidden)."""

    x: int
    y: int
    pixels: int


def write_script(seed: int, visual_tokens: int, tokens_per_step: int = TOKENS_PER_STEP) -> Script:
    """Draws story, layout in time, prompt and reference caption of the clip `seed`.

    The clip has `visual_tokens` rounded to whole temporal steps of `tokens_per_step`, at least one step per scene.
    """
    rng = np.random.default_rng(seed)
    story = sample_story(rng)
    style = STYLES[int(rng.integers(len(STYLES)))]
    prompt, caption = sample_prompt(rng, style), write_caption(rng, story, style)
    num_steps = max(len(story), round(visual_tokens / tokens_per_step))
    return Script(story, sample_timeline(rng, story, num_steps), prompt, caption)


@cache
def _coverage(shape: str, pixels: int) -> np.ndarray:
    """Share of each pixel that a glyph covers, `(pixels, pixels)` in 0 … 1, from 4 × 4 samples per pixel."""
    axis = (np.arange(4 * pixels) + 0.5) / (2 * pixels) - 1
    x, y = np.meshgrid(axis, axis)
    radius, box, manhattan = np.hypot(x, y), np.maximum(abs(x), abs(y)), abs(x) + abs(y)
    angle = np.arctan2(x, -y)
    inside = {
        "circle": radius < 0.9,
        "ring": (radius < 0.98) & (radius > 0.52),
        "square": box < 0.8,
        "frame": (box < 0.92) & (box > 0.5),
        "triangle": (y < 0.8) & (y > 2 * abs(x) - 1),
        "diamond": manhattan < 1,
        "star": radius < 0.62 + 0.36 * np.cos(5 * angle),
        "cross": (np.minimum(abs(x), abs(y)) < 0.28) & (box < 0.95),
        "heart": (x**2 + (1.15 * -y + 0.15 - 0.75 * np.sqrt(abs(x))) ** 2) < 0.72,
        "crescent": (radius < 0.95) & (np.hypot(x - 0.45, y) > 0.75),
        "arrow": ((x > 0) & (abs(y) < 1 - x)) | ((x > -0.95) & (x <= 0) & (abs(y) < 0.3)),
        "hourglass": (abs(x) < abs(y) + 0.08) & (abs(y) < 0.9),
    }[shape]
    return inside.reshape(pixels, 4, pixels, 4).mean(axis=(1, 3))


@cache
def _background(name: str) -> np.ndarray:
    """A muted texture, `(FRAME_SIZE, FRAME_SIZE, 3)` float."""
    y, x = np.mgrid[:FRAME_SIZE, :FRAME_SIZE]
    base, mark, marked = {
        "night": ((10, 10, 34), (190, 190, 210), (x % 16 == 5) & (y % 16 == 5) | (x % 16 == 13) & (y % 16 == 12)),
        "forest": ((14, 52, 26), (8, 30, 16), x % 8 < 4),
        "ocean": ((16, 56, 104), (28, 82, 140), (y + np.rint(2 * np.sin(x / 5))).astype(int) % 10 < 4),
        "desert": ((186, 152, 98), (164, 128, 80), (x + y) % 16 < 8),
        "wall": ((112, 48, 40), (78, 34, 30), (y % 8 == 0) | ((x + 8 * (y // 8 % 2)) % 16 == 0)),
        "snow": ((214, 222, 232), (190, 200, 216), (x - y) % 12 < 5),
    }[name]
    return np.where(marked[..., None], np.array(mark, float), np.array(base, float))


@cache
def _sprite(shape: str, pixels: int, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """A glyph with a dark edge, so that it stands out from a background of its own colour.

    Returns what is left of the picture behind it, `(pixels + 2, pixels + 2, 1)` in 0 … 1, and what is added to it.
    """
    body = np.pad(_coverage(shape, pixels), 1)
    edge = np.max([np.roll(body, shift, axis) for shift in (-1, 1) for axis in (0, 1)], axis=0)
    behind = (1 - body) * (1 - edge)
    return behind[..., None], body[..., None] * np.array(COLOURS[colour], float)


def _paste(frame: np.ndarray, shape: str, pixels: int, colour: str, centre: tuple[int, int]) -> None:
    """Draws a glyph into `frame` in place; whatever leaves the picture is cut off."""
    behind, added = _sprite(shape, pixels, colour)
    size = len(behind)
    left, top = centre[0] - size // 2, centre[1] - size // 2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, FRAME_SIZE), min(top + size, FRAME_SIZE)
    if x0 < x1 and y0 < y1:
        part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        frame[y0:y1, x0:x1] = frame[y0:y1, x0:x1] * behind[part] + added[part]


def _base_frame(scene: Scene, index: int, jitter: np.ndarray) -> np.ndarray:
    """Everything of a scene that does not move: background, companion, and one tick per scene so far at the bottom."""
    frame = _background(scene.background).copy()
    if scene.companion is not None:
        x, y = CORNER_CENTRES[scene.companion.corner]
        centre = (x + int(jitter[2]) // 2, y + int(jitter[3]) // 2)
        _paste(frame, "circle", COMPANION_PIXELS, scene.companion.colour, centre)
    frame[-6:] = 0
    for tick in range(index + 1):
        frame[-5:-1, 2 + 10 * tick : 8 + 10 * tick] = 255
    return frame


def pose_of(scene: Scene, step: Step, part: int) -> Pose:
    """The pose of a scene's glyph in frame `part` (0 or 1) of a temporal step."""
    pixels = GLYPH_PIXELS[scene.glyph.size]
    moment = FRAMES_PER_STEP * (step.age % MOTION_CYCLE) + (0 if step.frozen else part)
    if scene.motion in DIRECTIONS:
        # Two frames of one step always lie on the same side of the jump back to the start.
        travelled = SPEED * moment - SPEED * (FRAMES_PER_STEP * MOTION_CYCLE - 1) // 2
        x, y = DIRECTIONS[scene.motion]
        return Pose(x * travelled, y * travelled, pixels)
    if moment % 2 and scene.motion == "blink":
        return Pose(0, 0, 0)
    if moment % 2 and scene.motion == "pulse":
        return Pose(0, 0, int(SHRUNK * pixels))
    return Pose(0, 0, pixels)


def _draw_glyph(frame: np.ndarray, scene: Scene, jitter: np.ndarray, pose: Pose) -> None:
    """Draws the main glyph in a pose."""
    if pose.pixels:
        centre = (GLYPH_CENTRE[0] + int(jitter[0]) + pose.x, GLYPH_CENTRE[1] + int(jitter[1]) + pose.y)
        _paste(frame, scene.glyph.shape, pose.pixels, scene.glyph.colour, centre)


def render(story: Story, timeline: list[Step], rng: np.random.Generator) -> np.ndarray:
    """Draws the frames of a clip, `(2 · steps, FRAME_SIZE, FRAME_SIZE, 3)` uint8; `rng` places the objects."""
    jitters = rng.integers(-2, 3, size=(len(story), 4))
    bases = [_base_frame(scene, index, jitters[index]) for index, scene in enumerate(story)]
    frames = np.zeros((FRAMES_PER_STEP * len(timeline), FRAME_SIZE, FRAME_SIZE, 3), dtype=np.uint8)
    for number, step in enumerate(timeline):
        if step.scene == BLANK:
            continue
        for part in range(FRAMES_PER_STEP):
            frame = bases[step.scene].copy()
            scene = story[step.scene]
            _draw_glyph(frame, scene, jitters[step.scene], pose_of(scene, step, part))
            frames[FRAMES_PER_STEP * number + part] = frame.round()
    return frames


def write_mp4(
    file: str | PathLike[str] | BinaryIO, frames: np.ndarray, frames_per_second: int = FRAMES_PER_SECOND
) -> None:
    """Encodes RGB frames `(frames, height, width, 3)` uint8 as h264 (yuv420p) into a path or a binary stream."""
    require("video", "Writing a video", "av")
    import av

    target = file if hasattr(file, "write") else str(file)
    with av.open(target, mode="w", format="mp4") as container:
        # One thread: the same frames give the same file on every machine.
        stream = container.add_stream(
            "libx264", rate=frames_per_second, options={"preset": "ultrafast", "crf": "16", "threads": "1"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, frames_per_second)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_clip(
    path: str | PathLike[str], seed: int, visual_tokens: int = 400, tokens_per_step: int = TOKENS_PER_STEP
) -> Clip:
    """Writes the clip `seed` as an mp4 file and returns its messages and its reference caption.

    Args:
        path: Where to write; parent folders are made.
        seed: Draws everything. Use `EVALUATION_SEEDS` for clips the testbed's target has not seen.
        visual_tokens: How long the clip is, in visual tokens.
        tokens_per_step: Visual tokens that the target's processor makes of 2 frames: 4 for the testbed's Qwen2.5-VL,
            8 for its LLaVA-OneVision (`Family.tokens_per_step`), which adds one at the end of every video. More
            tokens per step make a shorter clip of the same story.

    Raises:
        MissingDependencyError: PyAV is not installed.
    """
    script = write_script(seed, visual_tokens, tokens_per_step)
    path = Path(path)
    with atomic_path(path) as partial:
        write_mp4(partial, render(script.story, script.timeline, np.random.default_rng([seed, 1])))
    return Clip(messages_for(str(path), script.prompt), script.caption)
