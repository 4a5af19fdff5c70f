"""Rows of one clip with several questions, packed into one sequence: the clip is read once.

Every question with its answer sees the clip and itself, not the other questions, and counts its positions from the end
of the clip, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
from num2words import num2words
from torch import Tensor

from sparrow_hf.testbed.world import FRAMES_PER_SECOND

from .video_facts import SLOTS

IGNORED = -100
FRAME = "<fake_token_around_image><global-img>" + "<image>" * SLOTS + "<fake_token_around_image>"


def clip_prompt(frames: int, question: str) -> str:
    """What SmolVLM's processor makes of a clip of the testbed and a question; the answer follows."""
    length = timedelta(seconds=frames // FRAMES_PER_SECOND)
    text = (
        f"<|im_start|>User: You are provided the following series of {num2words(frames)} frames from a {length} "
        "[H:MM:SS] video.\n"
    )
    for number in range(frames):
        second = number // FRAMES_PER_SECOND
        text += f"\nFrame from {second // 60:02d}:{second % 60:02d}:{FRAME}"
    return f"{text}\n\n{question}<end_of_utterance>\nAssistant:"


@dataclass(frozen=True)
class Asked:
    """A question and the ids of its answer, which weigh `weight` each in the loss."""

    question: str
    answer_ids: Sequence[int]
    weight: float = 1.0


@dataclass(frozen=True)
class Packed:
    """One sequence of `prefix` shared tokens and segments behind it.

    Attributes:
        input_ids: `(L,)`.
        segments: `(L,)`: 0 for the prefix, then 1, 2, … for each question with its answer.
        positions: `(L,)`.
        labels: `(L,)`, moved to the position that predicts them; others are `IGNORED`.
        weights: `(L,)` of the labels.
    """

    input_ids: Tensor
    segments: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor

    @property
    def prefix(self) -> int:
        return int((self.segments == 0).sum())

    def to(self, device: Any) -> Packed:
        """The same on another device."""
        return Packed(*(getattr(self, part.name).to(device) for part in fields(self)))

    def mask(self) -> Tensor:
        """`(1, 1, L, L)`: what each row sees."""
        rows = torch.arange(len(self.segments), device=self.segments.device)
        seen = (self.segments == 0)[None] | (self.segments[:, None] == self.segments[None])
        return (seen & (rows[:, None] >= rows[None]))[None, None]


def pack(prefix: list[int], segments: Sequence[tuple[list[int], Sequence[int], float]]) -> Packed:
    """Packs a prefix, and for every segment what is asked, what is answered, and its weight."""
    ids, owners, positions = list(prefix), [0] * len(prefix), list(range(len(prefix)))
    labels, weights = [IGNORED] * len(prefix), [0.0] * len(prefix)
    for owner, (asked, answer, weight) in enumerate(segments, start=1):
        rows = [*asked, *answer]
        ids += rows
        owners += [owner] * len(rows)
        positions += range(len(prefix), len(prefix) + len(rows))
        labels += [*[IGNORED] * (len(asked) - 1), *answer, IGNORED]
        weights += [*[0.0] * (len(asked) - 1), *[weight] * len(answer), 0.0]
    return Packed(*map(torch.tensor, (ids, owners, positions, labels, weights)))


def pack_clip(tokenizer: Any, frames: int, asked: Sequence[Asked]) -> Packed:
    """Packs a clip of so many frames with questions."""
    start, _, _ = clip_prompt(frames, "").partition("\n\n<end_of_utterance>")
    prefix = tokenizer(start)["input_ids"]
    # What follows a special token is tokenized by itself.
    segments = [
        (tokenizer(f"\n\n{each.question}<end_of_utterance>\nAssistant:")["input_ids"], each.answer_ids, each.weight)
        for each in asked
    ]
    return pack(prefix, segments)


def pack_text(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Packed:
    """Packs plain conversations of the language model, `messages` and `answer_ids`, without anything shared."""
    segments = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        segments.append((tokenizer(text)["input_ids"], row["answer_ids"], 1.0))
    return pack([], segments)
