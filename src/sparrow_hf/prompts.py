"""Rows of conversations: where they are read from, and what a good one looks like. For training, evaluation, analysis.

A row is `{"messages": [...]}`: turns with a `role` and a `content` that is text or a list of parts, `{"type": "text",
"text": …}`, `{"type": "image", "image": …}` and `{"type": "video", "video": …}`, by path, URL or bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from .errors import ImageError, SparrowError, TrainingDataError, VideoError
from .video import is_url, media_source

#: What [`load_rows`] adds to a row: where it stands, and the folder its relative paths start from.
ROW_INDEX, ROW_FOLDER = "row_index", "row_folder"


class Rows(Dataset):
    """The rows of a dataset, each with its index and the folder its relative paths start from."""

    def __init__(self, rows: Any, folder: Path | None = None):
        self.rows = rows
        self.folder = folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no row {index}: the dataset has {len(self)}")
        return _placed(self.rows[index], range(len(self))[index], self.folder)


class StreamedRows(IterableDataset):
    """As [`Rows`], one after the other; the index counts what this process has been handed."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], folder: Path | None = None):
        self.rows = rows
        self.folder = folder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(self.rows):
            yield _placed(row, index, self.folder)


def _placed(row: Mapping[str, Any], index: int, folder: Path | None) -> dict[str, Any]:
    return dict(row) | {ROW_INDEX: index, ROW_FOLDER: None if folder is None else str(folder)}


@overload
def load_rows(source: str | os.PathLike[str], split: str = ..., streaming: Literal[False] = ...) -> Rows: ...


@overload
def load_rows(source: str | os.PathLike[str], split: str = ..., *, streaming: Literal[True]) -> StreamedRows: ...


def load_rows(source: str | os.PathLike[str], split: str = "train", streaming: bool = False) -> Rows | StreamedRows:
    """Rows of conversations from wherever `datasets` reads them.

    Args:
        source: A `.jsonl` or `.parquet` file, a folder of such files, a folder made by `save_to_disk`, or a
            Hub id. Relative paths of videos and images start at the file's folder.
        split: Of a Hub dataset, or of a `DatasetDict` on disk. Plain files have no other than `"train"`.
        streaming: Read row by row, without a copy in the cache; the trainer then needs `max_steps`.

    Returns:
        Rows as they are, videos and images never decoded; [`SparrowDataCollator`] checks them.

    Raises:
        TrainingDataError: There is nothing to read at `source`, or it has no such split or no column `messages`.
    """
    import datasets

    path = Path(source)
    try:
        if path.is_dir() and not _data_files(path):
            found = datasets.load_from_disk(str(path))
            rows, folder = found[split] if isinstance(found, datasets.DatasetDict) else found, path.resolve()
            rows = rows.to_iterable_dataset() if streaming else rows
        elif path.exists():
            files = [str(path)] if path.is_file() else _data_files(path)
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files={"train": files}, split=split, streaming=streaming)
            folder = (path if path.is_dir() else path.parent).resolve()
        else:
            rows, folder = datasets.load_dataset(str(source), split=split, streaming=streaming), None
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise TrainingDataError(
            f"no rows can be read from {source}, split {split!r} ({type(error).__name__}: {error}): name a .jsonl or "
            ".parquet file, a folder of them, a folder of save_to_disk, or a dataset of the Hub"
        ) from error
    columns = rows.column_names
    if columns is not None and "messages" not in columns:
        raise TrainingDataError(f"{source} needs a column 'messages'; it has {', '.join(columns) or 'none'}")
    if rows.features is not None and (undecoded := _without_decoding(rows.features)) != rows.features:
        rows = rows.cast(undecoded)
    return StreamedRows(rows, folder) if streaming else Rows(rows, folder)


def _data_files(folder: Path) -> list[str]:
    """The data files of a folder, all of the kind that comes first; none in a folder of `save_to_disk`."""
    for pattern in ("*.jsonl", "*.parquet"):
        files = sorted(map(str, folder.glob(pattern)))
        if files:
            return files
    return []


def _without_decoding(feature: Any) -> Any:
    """The same features with videos and images left as path and bytes, at any depth: PyAV decodes them later."""
    import datasets

    if isinstance(feature, dict):
        undecoded = {name: _without_decoding(value) for name, value in feature.items()}
        return datasets.Features(undecoded) if isinstance(feature, datasets.Features) else undecoded
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_without_decoding(feature.feature))
    if isinstance(feature, (datasets.Video, datasets.Image)):
        return type(feature)(decode=False)
    return feature


def clean_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row with nothing in them but what a chat template and [`prepare_inputs`] read.

    Arrow tables fill every part with the keys of all others, as `None`; chat templates take a key for its presence.
    Relative paths become absolute.

    Raises:
        TrainingDataError: No messages, a turn without role or content, or a part of an unknown type.
    """
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TrainingDataError(f"'messages' must be a list of turns, found {messages!r}")
    cleaned = []
    for turn in messages:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
            raise TrainingDataError(f"a turn needs a 'role' and a 'content' of text or parts, found {turn!r}")
        if not isinstance(content, str):
            content = [_clean_part(part, row.get(ROW_FOLDER)) for part in content]
        cleaned.append({"role": role, "content": content})
    return cleaned


def _clean_part(part: Any, folder: str | None) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": kind, "text": part["text"]}
    if kind not in ("image", "video"):
        raise TrainingDataError(
            "a part must be {'type': 'text', 'text': …}, {'type': 'image', 'image': …} or {'type': 'video', 'video': "
            f"…}}, found {part!r}"
        )
    source = media_source(dict(part))
    if source is None:
        raise TrainingDataError(f"the row has a placeholder for {kind} but no {kind}: name a path, a URL or bytes")
    if isinstance(source, (str, os.PathLike)) and not is_url(source):
        source = str(Path(folder or "") / os.fspath(source))
    rate = {"fps": part["fps"]} if part.get("fps") is not None else {}
    return {"type": kind, kind: source} | rate


def split_answer(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The turns of a row up to its last question, cleaned, and the answer that is written behind it, if any.

    Raises:
        TrainingDataError: The row has no well-formed messages, or nothing but answers; it is named by its index.
    """
    with naming_row(row.get(ROW_INDEX)):
        messages = clean_messages(row)
        written: list[str] = []
        while messages and messages[-1]["role"] == "assistant":
            written.insert(0, text_of(messages.pop()))
        if not messages:
            raise TrainingDataError("it asks nothing, its turns are all answers: put the question before them")
        return messages, "\n".join(written) or None


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a chat message, whichever way its content is written."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@contextmanager
def naming_row(index: int | None) -> Iterator[None]:
    """Turns whatever a bad row makes processors stumble over into a [`TrainingDataError`] that names the row."""
    try:
        yield
    # A missing size, a video too few, a wrong type: processors raise what their code happens to run into.
    except (VideoError, ImageError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        prefix = "" if index is None else f"row {index}: "
        if isinstance(error, TrainingDataError) and str(error).startswith(prefix):
            raise
        kind = "" if isinstance(error, SparrowError) else f"{type(error).__name__}: "
        raise TrainingDataError(f"{prefix}{kind}{error}") from error


def fingerprint(conversation: Any) -> str:
    """Tells one conversation from another; media are told by their path or URL, in memory by their bytes or pixels."""

    def told(value: Any) -> str:
        return hashlib.sha256(value if isinstance(value, bytes) else np.asarray(value).tobytes()).hexdigest()

    return hashlib.sha256(json.dumps(conversation, default=told).encode()).hexdigest()
