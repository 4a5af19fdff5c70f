"""What the trainings have to know of each family beyond [`sparrow_hf.testbed.Family`]: how its targets see.

What becomes of a temporal step of the world in each: `sparrow_hf/testbed/families.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from sparrow_hf.testbed.families import GRID, LLAVA_ONEVISION, QWEN2_5_VL, family_of
from sparrow_hf.testbed.world import FRAMES_PER_SECOND, FRAMES_PER_STEP

from .attributes import OF_A_FRAME, OF_A_STEP, Attributes


class FamilyTraining(ABC):
    """One family as the trainings see it.

    Attributes:
        attributes: What the vision tower is taught to name.
    """

    attributes: Attributes

    @abstractmethod
    def vision(self, target: Any) -> nn.Module:
        """All that makes rows of pixels: trained first, then frozen."""

    def seeing(self, target: Any) -> list[nn.Parameter]:
        """All parameters on the way from pixels to the rows that the language model gets for a video."""
        return list(self.vision(target).parameters())

    @abstractmethod
    def vision_head(self, target: Any) -> nn.Linear:
        """The last layer of `vision`, in which the scale of the rows can be set."""

    @abstractmethod
    def visual_features(self, target: Any, processor: Any, frames: np.ndarray) -> torch.Tensor:
        """The rows `(steps · tokens_per_step, hidden)` of decoded `frames`, every step seen by itself."""

    @abstractmethod
    def video_rows(self, target: Any, features: torch.Tensor) -> torch.Tensor:
        """All rows that the language model gets for videos of such features `(videos, rows, hidden)`."""

    @abstractmethod
    def positions(self, target: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Positions `(…, 1, length)` that `generate()` gives a sequence `(1, length)` with one video."""


class QwenTraining(FamilyTraining):
    """Qwen2.5-VL: a tower over two frames at a time, three-dimensional positions."""

    attributes = OF_A_STEP

    def vision(self, target: Any) -> nn.Module:
        return target.model.visual

    def vision_head(self, target: Any) -> nn.Linear:
        return target.model.visual.merger.mlp[-1]

    def visual_features(self, target: Any, processor: Any, frames: np.ndarray) -> torch.Tensor:
        pixels = processor.video_processor(videos=[frames], return_tensors="pt")
        with _patches_as_product(target):
            features = target.model.get_video_features(pixels["pixel_values_videos"], pixels["video_grid_thw"])
        return torch.cat(features.pooler_output)

    def video_rows(self, target: Any, features: torch.Tensor) -> torch.Tensor:
        return features

    def positions(self, target: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Text goes on counting after the video as if the video had the width of one picture."""
        visual = input_ids == target.config.video_token_id
        positions, _ = target.model.get_rope_index(
            input_ids,
            visual.int() * 2,
            video_grid_thw=torch.tensor([[int(visual.sum()) // QWEN2_5_VL.tokens_per_step, GRID, GRID]]),
            second_per_grid_ts=[FRAMES_PER_STEP / FRAMES_PER_SECOND],
        )
        return positions


@contextmanager
def _patches_as_product(target: Any) -> Iterator[None]:
    """Lets Qwen's tower embed its patches by a matrix product: its convolution's sum in an eighth of the time."""
    embedding = target.model.visual.patch_embed

    def forward(patches: torch.Tensor) -> torch.Tensor:
        weight = embedding.proj.weight
        return patches @ weight.view(len(weight), -1).T

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


class LlavaTraining(FamilyTraining):
    """LLaVA-OneVision: a tower over single frames, one-dimensional positions, a newline row after each video."""

    attributes = OF_A_FRAME

    def vision(self, target: Any) -> nn.Module:
        return nn.ModuleList([target.model.vision_tower, target.model.multi_modal_projector])

    def seeing(self, target: Any) -> list[nn.Parameter]:
        return [*super().seeing(target), target.model.image_newline]

    def vision_head(self, target: Any) -> nn.Linear:
        return target.model.multi_modal_projector.linear_2

    def visual_features(self, target: Any, processor: Any, frames: np.ndarray) -> torch.Tensor:
        pixels = processor.video_processor(videos=[frames], return_tensors="pt")["pixel_values_videos"]
        # The last row is the newline.
        return target.model.get_video_features(pixels).pooler_output[0, :-1]

    def video_rows(self, target: Any, features: torch.Tensor) -> torch.Tensor:
        newline = target.model.image_newline.expand(len(features), 1, -1)
        return torch.cat([features, newline], dim=1)

    def positions(self, target: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(input_ids.shape[1])[None]


_TRAININGS = {QWEN2_5_VL.name: QwenTraining(), LLAVA_ONEVISION.name: LlavaTraining()}


def training_of(target: PreTrainedModel) -> FamilyTraining:
    """How targets of this one's family are trained.

    Raises:
        UnsupportedTargetError: The testbed has no targets of this class.
    """
    return _TRAININGS[family_of(target).name]
