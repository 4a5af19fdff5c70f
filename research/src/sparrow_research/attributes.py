"""What the vision towers are taught to name: the attributes of what they see at a time, one frame or two.

A tower that joins the two frames of a temporal step (Qwen2.5-VL) can be asked for the motion. One that looks at every
frame by itself (SigLIP) can't: it is asked where the glyph stands and how large it is, from which the language model
reads the motion off across frames. A glyph that a frame does not show has no colour there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparrow_hf.testbed.scenes import (
    BACKGROUNDS,
    BLANK,
    COLOURS,
    CORNERS,
    MAX_SCENES,
    MOTIONS,
    SHAPES,
    SIZES,
    Step,
    Story,
)
from sparrow_hf.testbed.world import FRAMES_PER_STEP, GLYPH_PIXELS, MOTION_CYCLE, SHRUNK, SPEED, pose_of

_SCENERY: dict[str, tuple[Any, ...]] = {
    "background": BACKGROUNDS,
    "scene": tuple(range(MAX_SCENES)),
    "companion colour": tuple(COLOURS),
    "companion corner": CORNERS,
}
_REACH = MOTION_CYCLE * FRAMES_PER_STEP // 2
"""The farthest a glyph gets from its place, in frames."""


def _scenery(step: Step, story: Story) -> dict[str, Any]:
    scene = story[step.scene]
    shown: dict[str, Any] = {"background": scene.background, "scene": step.scene}
    if scene.companion:
        shown |= {"companion colour": scene.companion.colour, "companion corner": scene.companion.corner}
    return shown


def _shown_in_step(step: Step, story: Story) -> list[dict[str, Any]]:
    if step.scene == BLANK:
        return [{}]
    scene = story[step.scene]
    glyph = {"colour": scene.glyph.colour, "shape": scene.glyph.shape, "size": scene.glyph.size}
    motion = {} if step.frozen else {"motion": scene.motion}
    return [glyph | motion | _scenery(step, story)]


def _shown_in_frames(step: Step, story: Story) -> list[dict[str, Any]]:
    if step.scene == BLANK:
        return [{}] * FRAMES_PER_STEP
    scene = story[step.scene]
    frames = []
    for part in range(FRAMES_PER_STEP):
        pose = pose_of(scene, step, part)
        glyph: dict[str, Any] = {}
        if pose.pixels:
            glyph = {"colour": scene.glyph.colour, "shape": scene.glyph.shape, "pixels": pose.pixels}
            glyph |= {"column": round(pose.x / SPEED), "row": round(pose.y / SPEED)}
        frames.append(glyph | _scenery(step, story))
    return frames


@dataclass(frozen=True)
class Attributes:
    """What a tower learns to name in what it sees at a time.

    Attributes:
        classes: Values of every attribute; each has one more class, the last: there is none to see.
        loss_weights: One per attribute.
        shown: The values in a temporal step, once for all its frames or once for each.
    """

    classes: dict[str, tuple[Any, ...]]
    loss_weights: tuple[int, ...]
    shown: Callable[[Step, Story], list[dict[str, Any]]]

    @property
    def sizes(self) -> list[int]:
        """How many classes every attribute has."""
        return [len(values) + 1 for values in self.classes.values()]

    def labels(self, step: Step, story: Story) -> list[list[int]]:
        """Class of every attribute, for each time that the tower looks at a temporal step."""
        return [
            [values.index(shown[name]) if name in shown else len(values) for name, values in self.classes.items()]
            for shown in self.shown(step, story)
        ]


OF_A_STEP = Attributes(
    classes={"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "motion": MOTIONS, **_SCENERY},
    # Shapes are by far the hardest to tell apart.
    loss_weights=(1, 3, 1, 1, 1, 1, 1, 1),
    shown=_shown_in_step,
)
OF_A_FRAME = Attributes(
    classes={
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "pixels": tuple(int(scale * pixels) for pixels in GLYPH_PIXELS.values() for scale in (1, SHRUNK)),
        "column": tuple(range(-_REACH, _REACH + 1)),
        "row": tuple(range(-_REACH, _REACH + 1)),
        **_SCENERY,
    },
    loss_weights=(1, 3, 1, 1, 1, 1, 1, 1, 1),
    shown=_shown_in_frames,
)
