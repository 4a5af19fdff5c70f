"""Prompts of a benchmark, from rows of chat messages or a copy of a public data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from ..data.datasets import load_rows
from ..data.dialects import without_turns
from ..data.messages import ROW_INDEX, naming_row, row_name, split_answer
from ..data.prepare import own_sampling, prepare_prompt
from ..errors import BenchmarkError
from .benchmark import Prompt
from .video_datasets import DATASETS, Conversations, read_dataset


def read_conversations(source: str, split: str | None = None, limit: int | None = None) -> Conversations:
    """The first conversations of a source, their final answers, if any, taken off.

    Args:
        source: `NAME:FOLDER` for a copy of a public data set (see [`DATASETS`]), else whatever
            [`~sparrow_hf.data.load_rows`] reads.
        split: Of a source that `load_rows` reads, `"train"` by default. A copy of a public data set has none.
        limit: Most conversations; of a data set they are spread evenly over all of it, since it is sorted by task.

    Raises:
        BenchmarkError: The data set cannot be read or has no splits, or no row is left.
        TrainingDataError: The rows cannot be read, or one has no well-formed messages or no question.
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
    rows = [without_turns(row) | {"messages": split_answer(row)[0]} for row in rows]
    if not rows:
        raise BenchmarkError(f"{source} has no rows: give a data set with at least one question")
    return Conversations(rows, missing)


def conversation_prompts(
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    max_frames: Sequence[int] = (),
    fps: float | None = None,
) -> list[Prompt]:
    """Conversations as prompts, each once per number of frames, shortest first; named by index and fingerprint.

    A row with its own `max_frames` is used once, with that number; a row with its own `fps` is read with it. A row's
    `task`, if it has one, is the prompt's.

    Args:
        max_frames: Maximum numbers of frames to read of a video; each makes a table. None: all frames.
        fps: Maximum number of frames per second to read.

    Raises:
        TrainingDataError: A row's own `fps` or `max_frames` is no positive number.
    """
    prompts = []
    for row in rows:
        with naming_row(row.get(ROW_INDEX)):
            messages, own = split_answer(row)[0], own_sampling(row)
        task = None if row.get("task") is None else str(row["task"])
        name = row_name(row[ROW_INDEX], [messages, own] if own else messages)
        lengths: list[int | None] = [*sorted(set(max_frames))] or [None]
        if "max_frames" in own:
            lengths = [own["max_frames"]]
        prompts += [
            Prompt(name, frames, partial(prepare_prompt, processor, row, fps=fps, max_frames=frames), task)
            for frames in lengths
        ]
    return sorted(prompts, key=lambda prompt: (prompt.length is None, prompt.length or 0))
