"""First stage of the target's training: the vision tower learns to name what each temporal step shows.

A tower trained through the language model from nothing learns next to nothing in the time a laptop has. Told the
attributes of every step by linear probes on each merged token, it sees nearly perfectly within minutes; the probes are
thrown away and the tower stays frozen from then on.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from .muon import Muon
from .scenes import (
    BACKGROUNDS,
    BLANK,
    COLOURS,
    CORNERS,
    MAX_SCENES,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Step,
    Story,
    sample_story,
    sample_timeline,
)
from .world import FRAMES_PER_STEP, MOTION_CYCLE, TOKENS_PER_STEP, render, write_mp4

ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": SIZES,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
    "scene": tuple(range(MAX_SCENES)),
    "companion colour": tuple(COLOURS),
    "companion corner": CORNERS,
}
"""What a step shows; each attribute has one more class, the last: there is none to see."""

LOSS_WEIGHTS = (1, 3, 1, 1, 1, 1, 1, 1)
"""Shapes are by far the hardest to tell apart."""
FROZEN_SHARE = 0.15
BLANK_SHARE = 0.04
MATRIX_LEARNING_RATE = 0.02
LEARNING_RATE = 3e-3
FEATURE_RMS = 0.5
"""Scale of the merger's output after this stage, the scale of the word embeddings it stands among."""


def through_codec(frames: np.ndarray) -> np.ndarray:
    """The frames as a reader of their mp4 file gets them."""
    stream = io.BytesIO()
    write_mp4(stream, frames)
    stream.seek(0)
    # One converter for all frames: `frame.to_ndarray(format=...)` sets up one each, which takes longer than decoding.
    converter = VideoReformatter()
    with av.open(stream, "r") as container:
        container.streams.video[0].thread_count = 1
        return np.stack(
            [converter.reformat(frame, format="rgb24").to_ndarray() for frame in container.decode(video=0)]
        )


def attributes_of(step: Step, story: Story) -> list[int]:
    """Class of every one of `ATTRIBUTES` in a temporal step."""
    if step.scene == BLANK:
        return [len(classes) for classes in ATTRIBUTES.values()]
    scene: Scene = story[step.scene]
    shown: dict[str, Any] = {
        "colour": scene.glyph.colour,
        "shape": scene.glyph.shape,
        "size": scene.glyph.size,
        "motion": None if step.frozen else scene.motion,
        "background": scene.background,
        "scene": step.scene,
        "companion colour": scene.companion.colour if scene.companion else None,
        "companion corner": scene.companion.corner if scene.companion else None,
    }
    return [
        len(classes) if shown[name] is None else classes.index(shown[name]) for name, classes in ATTRIBUTES.items()
    ]


def labelled_clip(seed: int, num_steps: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Decoded frames of a short clip, `(2 · steps, height, width, 3)`, and the `(steps, attributes)` they show."""
    rng = np.random.default_rng([seed, 2])
    story = sample_story(rng)
    timeline = sample_timeline(rng, story, num_steps)
    return through_codec(render(story, timeline, rng)), np.array([attributes_of(step, story) for step in timeline])


def labelled_steps(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `labelled_clip`, but a montage of `number` temporal steps that have nothing to do with each other.

    A tower that sees each scene for several steps learns the scenes by heart before it learns what a star looks like.
    """
    rng = np.random.default_rng([seed, 3])
    frames: list[np.ndarray] = []
    labels: list[list[int]] = []
    while len(labels) < number:
        story = sample_story(rng, min_scenes=MAX_SCENES)
        timeline = [
            Step(scene, int(rng.integers(MOTION_CYCLE)), frozen=rng.random() < FROZEN_SHARE)
            if rng.random() > BLANK_SHARE
            else Step(BLANK)
            for scene in range(MAX_SCENES)
        ]
        frames.append(render(story, timeline, rng))
        labels += [attributes_of(step, story) for step in timeline]
    montage = through_codec(np.concatenate(frames)[: FRAMES_PER_STEP * number])
    return montage, np.array(labels[:number])


@contextmanager
def patches_as_product(target: Qwen2_5_VLForConditionalGeneration) -> Iterator[None]:
    """Lets the tower embed its patches by a matrix product: its convolution's sum in an eighth of the time."""
    embedding = target.model.visual.patch_embed

    def forward(patches: torch.Tensor) -> torch.Tensor:
        weight = embedding.proj.weight
        return patches @ weight.view(len(weight), -1).T

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


def visual_features(
    target: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, frames: np.ndarray
) -> torch.Tensor:
    """The rows `(visual tokens, hidden)` that the target's language model gets for decoded `frames`."""
    pixels = processor.video_processor(videos=[frames], return_tensors="pt")
    with patches_as_product(target):
        features = target.model.get_video_features(pixels["pixel_values_videos"], pixels["video_grid_thw"])
    return torch.cat(features.pooler_output)


class VisionPretraining:
    """Trains the vision tower of `target` on temporal steps drawn from `seeds`; `step()` is one optimizer step."""

    batch_size = 224

    def __init__(
        self,
        target: Qwen2_5_VLForConditionalGeneration,
        processor: Qwen2_5_VLProcessor,
        seeds: range,
        num_steps: int,
        seed: int = 0,
    ):
        self.target, self.processor, self.seeds = target, processor, seeds
        num_classes = sum(len(classes) + 1 for classes in ATTRIBUTES.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.probes = nn.Linear(target.config.vision_config.out_hidden_size, num_classes)
        matrices = [parameter for parameter in target.model.visual.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in target.model.visual.parameters() if parameter.ndim != 2]
        self.optimizers = [
            Muon(matrices),
            torch.optim.AdamW([*others, *self.probes.parameters()], weight_decay=0.0),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, rate, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
            )
            for optimizer, rate in zip(self.optimizers, (MATRIX_LEARNING_RATE, LEARNING_RATE), strict=True)
        ]
        self.steps_done = 0

    def _forward(self, frames: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        features = visual_features(self.target, self.processor, frames)
        logits = self.probes(features).split([len(classes) + 1 for classes in ATTRIBUTES.values()], dim=-1)
        wanted = torch.from_numpy(labels).repeat_interleave(TOKENS_PER_STEP, dim=0)
        losses = [functional.cross_entropy(part, wanted[:, index]) for index, part in enumerate(logits)]
        loss = torch.stack([weight * part for weight, part in zip(LOSS_WEIGHTS, losses, strict=True)]).sum()
        right = torch.stack([part.argmax(-1) == wanted[:, index] for index, part in enumerate(logits)], dim=-1)
        return loss, right.float().mean(0)

    def step(self) -> tuple[float, list[float]]:
        """One optimizer step; returns the loss and the accuracy of every attribute, over merged tokens."""
        loss, accuracy = self._forward(*labelled_steps(self.seeds[self.steps_done], self.batch_size))
        self.steps_done += 1
        loss.backward()
        nn.utils.clip_grad_norm_(self.target.model.visual.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss.item(), accuracy.tolist()

    @torch.no_grad()
    def evaluate(self, seeds: range) -> list[float]:
        """Accuracy of every attribute on the clips of `seeds`."""
        frames, labels = (np.concatenate(parts) for parts in zip(*map(labelled_clip, seeds), strict=True))
        return self._forward(frames, labels)[1].tolist()


@torch.no_grad()
def rescale_merger(target: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seeds: range) -> None:
    """Scales the merger's last layer in place so that its rows have `FEATURE_RMS`."""
    frames = np.concatenate([labelled_clip(seed)[0] for seed in seeds])
    rms = visual_features(target, processor, frames).pow(2).mean().sqrt()
    last = target.model.visual.merger.mlp[-1]
    last.weight.mul_(FEATURE_RMS / rms)
    last.bias.mul_(FEATURE_RMS / rms)
