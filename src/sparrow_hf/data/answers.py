"""The folder of answers that `sparrow regenerate` writes: what its files are called, and how they are read."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checksums import Digests
from ..errors import TrainingDataError
from .messages import ROW_FOLDER

PROVENANCE_FILE = "provenance.json"
SHARDS = "answers-*.jsonl"
#: Folder of the media that rows gave as bytes, each file called by its `media_digest`.
MEDIA_FOLDER = "media"
#: What to do about a file that is missing or damaged.
REMEDY = "delete it and run `sparrow regenerate` again with the same options, which keeps the rest"


def is_answers(folder: Path) -> bool:
    """Whether a folder is one of answers, be they complete or not."""
    return (folder / PROVENANCE_FILE).is_file() and any(folder.glob(SHARDS))


def skipped_list(shard: Path) -> Path:
    """The file that lists the rows left out of a shard."""
    return shard.with_suffix(".skipped.json")


def digests_of(folder: Path) -> Digests:
    """The digests of a folder of answers."""
    return Digests(folder, TrainingDataError, REMEDY)


def read_answers(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of all shards in a folder, in order, each with the folder its relative paths start from; a dataset for
    [`SparrowTrainer`].

    Raises:
        TrainingDataError: A file that was written is missing or damaged.
    """
    digests = digests_of(Path(folder))
    digests.warn_without()
    digests.check_present()
    for shard in sorted(Path(folder).glob(SHARDS)):
        digests.check(shard)
        try:
            with shard.open() as lines:
                for line in lines:
                    yield json.loads(line) | {ROW_FOLDER: str(Path(folder).resolve())}
        except ValueError as error:
            raise TrainingDataError(f"{shard} is damaged ({error}): {REMEDY}") from error


def read_skipped(folder: str | os.PathLike[str]) -> dict[int, str]:
    """Index of each row that was left out → reason.

    Raises:
        TrainingDataError: A list of them is missing or damaged.
    """
    digests = digests_of(Path(folder))
    digests.check_present()
    skipped: dict[int, str] = {}
    for path in sorted(Path(folder).glob("answers-*.skipped.json")):
        digests.check(path)
        try:
            skipped |= {int(index): str(reason) for index, reason in json.loads(path.read_text())}
        except (ValueError, TypeError) as error:
            raise TrainingDataError(f"{path} is damaged ({error}): {REMEDY}") from error
    return skipped
