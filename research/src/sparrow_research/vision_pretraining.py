"""First stage of the target's training: the vision tower learns to name what it sees at a time.

A tower trained through the language model from nothing learns next to nothing in the time a laptop has. Told the
attributes of every step (or frame) by linear probes on each visual token, it sees nearly perfectly within minutes; the
probes are thrown away and the tower stays frozen from then on.
"""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import nn
from torch.nn import functional

from sparrow_hf.testbed.scenes import BLANK, MAX_SCENES, Step, Story, sample_story, sample_timeline
from sparrow_hf.testbed.world import FRAMES_PER_STEP, MOTION_CYCLE, render, write_mp4

from .attributes import Attributes
from .family_training import training_of
from .muon import Muon

FROZEN_SHARE = 0.15
BLANK_SHARE = 0.04
MATRIX_LEARNING_RATE = 0.02
LEARNING_RATE = 3e-3
FEATURE_RMS = 0.5
"""Scale of the visual rows after this stage, the scale of the word embeddings it stands among."""


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


def labelled_clip(attributes: Attributes, seed: int, num_steps: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Decoded frames of a short clip, `(2 · steps, height, width, 3)`, and the `(looks, attributes)` they show.

    A tower looks once at every temporal step, or once at every frame.
    """
    rng = np.random.default_rng([seed, 2])
    story = sample_story(rng)
    timeline = sample_timeline(rng, story, num_steps)
    labels = [attributes.labels(step, story) for step in timeline]
    return through_codec(render(story, timeline, rng)), np.concatenate(labels)


def unrelated_steps(rng: np.random.Generator) -> tuple[Story, list[Step]]:
    """A story, and one temporal step of each of its scenes, some still and some blank."""
    story = sample_story(rng, min_scenes=MAX_SCENES)
    return story, [
        Step(scene, int(rng.integers(MOTION_CYCLE)), frozen=rng.random() < FROZEN_SHARE)
        if rng.random() > BLANK_SHARE
        else Step(BLANK)
        for scene in range(MAX_SCENES)
    ]


def labelled_steps(attributes: Attributes, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `labelled_clip`, but a montage of `number` temporal steps that have nothing to do with each other.

    A tower that sees each scene for several steps learns the scenes by heart before it learns what a star looks like.
    """
    rng = np.random.default_rng([seed, 3])
    frames: list[np.ndarray] = []
    labels: list[list[list[int]]] = []
    while len(labels) < number:
        story, timeline = unrelated_steps(rng)
        frames.append(render(story, timeline, rng))
        labels += [attributes.labels(step, story) for step in timeline]
    montage = through_codec(np.concatenate(frames)[: FRAMES_PER_STEP * number])
    return montage, np.concatenate(labels[:number])


class VisionPretraining:
    """Trains the vision tower of `target` on temporal steps drawn from `seeds`; `step()` is one optimizer step."""

    batch_size = 224

    def __init__(self, target: Any, processor: Any, seeds: range, num_steps: int, seed: int = 0):
        self.target, self.processor, self.seeds = target, processor, seeds
        self.family = training_of(target)
        self.attributes = self.family.attributes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.probes = nn.Linear(target.config.text_config.hidden_size, sum(self.attributes.sizes))
        self.tower = self.family.vision(target)
        matrices = [parameter for parameter in self.tower.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in self.tower.parameters() if parameter.ndim != 2]
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
        features = self.family.visual_features(self.target, self.processor, frames)
        logits = self.probes(features).split(self.attributes.sizes, dim=-1)
        wanted = torch.from_numpy(labels).repeat_interleave(len(features) // len(labels), dim=0)
        losses = [functional.cross_entropy(part, wanted[:, index]) for index, part in enumerate(logits)]
        weights = self.attributes.loss_weights
        loss = torch.stack([weight * part for weight, part in zip(weights, losses, strict=True)]).sum()
        right = torch.stack([part.argmax(-1) == wanted[:, index] for index, part in enumerate(logits)], dim=-1)
        return loss, right.float().mean(0)

    def step(self) -> tuple[float, list[float]]:
        """One optimizer step; returns the loss and the accuracy of every attribute, over visual tokens."""
        loss, accuracy = self._forward(*labelled_steps(self.attributes, self.seeds[self.steps_done], self.batch_size))
        self.steps_done += 1
        loss.backward()
        nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss.item(), accuracy.tolist()

    @torch.no_grad()
    def evaluate(self, seeds: range) -> list[float]:
        """Accuracy of every attribute on the clips of `seeds`."""
        clips = [labelled_clip(self.attributes, seed) for seed in seeds]
        frames, labels = (np.concatenate(parts) for parts in zip(*clips, strict=True))
        return self._forward(frames, labels)[1].tolist()


@torch.no_grad()
def rescale_features(target: Any, processor: Any, seeds: range) -> None:
    """Scales the last layer of the tower in place so that the visual rows have `FEATURE_RMS`."""
    family = training_of(target)
    frames = np.concatenate([labelled_clip(family.attributes, seed)[0] for seed in seeds])
    rms = family.visual_features(target, processor, frames).pow(2).mean().sqrt()
    last = family.vision_head(target)
    last.weight.mul_(FEATURE_RMS / rms)
    last.bias.mul_(FEATURE_RMS / rms)
