"""Prompts of a benchmark from what a user names: rows of chat messages, or a copy of a public data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from ..errors import BenchmarkError
from ..prompts import ROW_INDEX, fingerprint, load_rows, split_answer
from ..video import prepare_inputs
from .benchmark import Prompt
from .video_datasets import DATASETS, Conversations, read_dataset


def read_conversations(source: str, split: str | None = None, limit: int | None = None) -> Conversations:
    """The first conversations of a source, their final answers, if any, taken off.

    Args:
        source: `NAME:FOLDER` for a copy of a public data set (see [`DATASETS`]), else whatever
            [`~sparrow_hf.prompts.load_rows`] reads.
        split: Of a source that `load_rows` reads, `"train"` by default. A copy of a public data set has none.
        limit: Most conversations; of a data set they are spread evenly over all of it, since it is sorted by task.

    Raises:
        BenchmarkError: The data set cannot be read or was asked for a split, or no row is left.
        TrainingDataError: The rows cannot be read, or one has no well-formed messages, or asks nothing.
    """
    name, colon, folder = source.partition(":")
    if colon and name in DATASETS:
        if split is not None:
            raise BenchmarkError(f"{source} has no splits to choose from, found {split!r}: leave out --split")
        rows, missing = read_dataset(name, Path(folder))
        # Numbered before some are chosen: in the same copy a number always means the same question.
        rows = [row | {ROW_INDEX: index} for index, row in enumerate(rows)]
        if limit is not None and limit < len(rows):
            rows = [rows[index * len(rows) // limit] for index in range(limit)]
    else:
        found = load_rows(source, split or "train")
        rows, missing = [found[index] for index in range(len(found))[:limit]], []
    rows = [row | {"messages": split_answer(row)[0]} for row in rows]
    if not rows:
        raise BenchmarkError(f"{source} has no rows to ask")
    return Conversations(rows, missing)


def conversation_prompts(
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    max_frames: Sequence[int] = (),
    fps: float | None = None,
) -> list[Prompt]:
    """Conversations as prompts, each once per number of frames, shortest first; named by number and what they ask.

    Args:
        max_frames: Most frames to see of a video; several make one table each. None: all frames.
        fps: Frames per second to see, at most.
    """
    return [
        Prompt(
            f"row {row[ROW_INDEX]}, {fingerprint(row['messages'])[:8]}",
            frames,
            partial(prepare_inputs, processor, row["messages"], fps=fps, max_frames=frames),
        )
        for frames in (sorted(set(max_frames)) if max_frames else [None])
        for row in rows
    ]
