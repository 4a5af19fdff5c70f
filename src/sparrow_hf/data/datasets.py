"""Rows of conversations from files, folders and the Hub.

JSON is read here line by line, without Arrow: a line that is no row then spoils nothing but itself, rows may differ in
their keys and types, and no input can end the process. Everything else is read by `datasets`.
"""

import codecs
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, overload

from torch.utils.data import Dataset, IterableDataset

from ..checksums import check_written
from ..errors import TrainingDataError
from ..extras import require
from .dialects import TURN_COLUMNS, has_turns
from .messages import ROW_ERROR, ROW_FOLDER, ROW_INDEX
from .sources import shown

#: Endings of files that hold rows. Of a folder, the files of the first one that is there are read.
ROW_FILES = (".jsonl", ".parquet", ".json", ".jsonl.gz", ".json.gz")
#: One of them is in every folder that `save_to_disk` writes.
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")
#: Rows at the start of JSON files of which one at least must be a conversation.
ROWS_LOOKED_AT = 100


class Rows(Dataset):
    """The rows of a dataset, each with its index and the folder its relative paths start from.

    `rows[3]` is a row and `rows[:8]` a list of rows, whose indices are those in the dataset. A row that is not there
    raises `IndexError`.
    """

    def __init__(self, rows: Any, folder: Path | None = None):
        self.rows = rows
        self.folder = folder

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
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
        source: A `.jsonl`, `.json` (both as `.gz` too) or `.parquet` file, a folder of such files, a folder made by
            `save_to_disk`, or a Hub id. Of a folder with files of several kinds, the `.jsonl` files are read, or else
            the `.parquet` files: `.json` files often describe those beside them. Relative paths of videos and images
            start at the file's folder.
        split: Split of a Hub dataset, or of a `DatasetDict` on disk. Plain files have only `"train"`.
        streaming: Read row by row, without a copy in the cache; the trainer then needs `max_steps`.

    Returns:
        Rows as they are, videos and images never decoded; [`SparrowDataCollator`] checks them. A line of JSON that
        is no row is one that says so when it is read.

    Raises:
        TrainingDataError: There is nothing to read at `source`, it has no such split or no conversations, or answers
            that `sparrow regenerate` wrote are damaged or missing.
        MissingDependencyError: datasets is not installed.
    """
    require("train", "Reading rows", "datasets")
    import datasets

    path = Path(source)
    try:
        files = data_files(path)
        if path.is_dir() and not files:
            found = datasets.load_from_disk(str(path))
            rows, folder = found[split] if isinstance(found, datasets.DatasetDict) else found, path.resolve()
            rows = rows.to_iterable_dataset() if streaming else rows
        elif files:
            check_written(files, TrainingDataError, "run `sparrow regenerate` again, with the same options")
            folder = (path if path.is_dir() else path.parent).resolve()
            if row_kind(files[0]) != ".parquet":
                return _read_json(source, files, folder, split, streaming)
            rows = datasets.load_dataset("parquet", data_files={"train": files}, split=split, streaming=streaming)
        else:
            rows, folder = datasets.load_dataset(str(source), split=split, streaming=streaming), None
    except (TrainingDataError, ImportError, MemoryError):
        raise
    # Readers raise many types of errors.
    except Exception as error:
        raise TrainingDataError(
            f"no rows can be read from {source}, split {split!r} ({type(error).__name__}: {error}): name a .jsonl, "
            ".json or .parquet file, a folder of them, a folder of save_to_disk, or a dataset of the Hub"
        ) from error
    columns = rows.column_names
    if columns is not None and not set(TURN_COLUMNS) & set(columns):
        raise TrainingDataError(_without_conversations(source, ", ".join(columns) or "none"))
    if rows.features is not None and (undecoded := _without_decoding(rows.features)) != rows.features:
        rows = rows.cast(undecoded) if streaming else StoredRows(rows)
    return StreamedRows(rows, folder) if streaming else Rows(rows, folder)


def _without_conversations(source: Any, found: str) -> str:
    return f"{source} needs a column 'messages'; it has {found} ('conversations' and 'prompt' are read too)"


def _read_json(source: Any, files: list[str], folder: Path, split: str, streaming: bool) -> Rows | StreamedRows:
    import datasets

    if streaming:
        if split != "train":
            raise ValueError("a stream of files has no splits but 'train'")
        # `datasets` shares the files among the workers of a data loader.
        rows = datasets.IterableDataset.from_generator(read_json, gen_kwargs={"files": files})
        first = list(islice(read_json(files), ROWS_LOOKED_AT))
    else:
        rows = JsonRows(files)
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
        rows.places = [place for part in parts for place in rows.places[part.from_ : part.to]]
        first = [rows[index] for index in range(min(len(rows), ROWS_LOOKED_AT))]
    if not first:
        raise TrainingDataError(f"{source} has no rows: give a file with one JSON object per line")
    if not any(map(has_turns, first)):
        if all(ROW_ERROR in row for row in first) and (told := _over_several_lines(files[0])) is not None:
            raise TrainingDataError(told)
        found = first[0].get(ROW_ERROR) or _without_conversations(source, ", ".join(list(first[0])[:20]) or "none")
        raise TrainingDataError(found)
    return StreamedRows(rows, folder) if streaming else Rows(rows, folder)


class StoredRows:
    """The rows of a `datasets.Dataset` as Arrow stores them, undecoded. To cast them would write a copy of all.

    Args:
        rows: The data set.
    """

    def __init__(self, rows: Any):
        self.rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index].to_pylist()[0]


class JsonRows:
    """The rows of JSON files: of one object per line, or one list of objects. Lines are read when they are asked for.

    Args:
        files: Their names; those that end in `.gz` are compressed.

    Attributes:
        places: Of each row: the row itself, from a list or a compressed file; else its file, where its line starts and
            the line's number.
    """

    def __init__(self, files: Sequence[str]):
        self.places: list[Any] = []
        for file in files:
            if file.lower().endswith(".gz"):
                # To go to a line of a compressed file is to decompress all before it.
                self.places += read_json([file])
            else:
                listed = _listed(file)
                self.places += _lines(file) if listed is None else listed

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        if isinstance(place, dict):
            return place
        file, start, number = place
        with _open(file) as lines:
            lines.seek(start)
            return _parsed(lines.readline(), f"line {number} of {file}")


def read_json(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of JSON files, one after the other. One that cannot be read says so under [`ROW_ERROR`]."""
    for file in files:
        listed = _listed(file)
        if listed is not None:
            yield from listed
        else:
            with _open(file) as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.isspace():
                        yield _parsed(line, f"line {number} of {file}")


def _open(file: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb"))


def _lines(file: str) -> Iterator[tuple[str, int, int]]:
    """The file, the start and the number of each of its lines that is not blank."""
    start = 0
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield file, start, number
            start += len(line)


def _listed(file: str) -> list[dict[str, Any]] | None:
    """The rows of a file that is one list of them; `None` if it is none."""
    with _open(file) as content:
        if not content.read(4096).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
            return None
        content.seek(0)
        try:
            rows = json.loads(content.read())
        except (ValueError, RecursionError):
            return None
    # A single line that holds a list is no list of rows.
    is_list = any(isinstance(row, dict) for row in rows)
    return [_checked(row, f"entry {index} of {file}") for index, row in enumerate(rows)] if is_list else None


def _over_several_lines(file: str) -> str | None:
    """What is wrong with a file that is one JSON value over several lines; `None` if it is not."""
    with _open(file) as content:
        text = content.read().decode("utf-8-sig", errors="replace")
    start = len(text) - len(text.lstrip())
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        is_beyond_its_line = "\n" in text[start : error.pos]
        return f"{file} is no JSON ({error}): mend it, or write one object per line" if is_beyond_its_line else None
    except (ValueError, RecursionError):
        return None
    is_one = "\n" in text[start:end]
    return (
        f"{file} is one JSON value over several lines: write one object per line, or a list of them"
        if is_one
        else None
    )


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        return _checked(json.loads(line), where)
    # Bytes that are no text, too many digits and too many brackets are of these types too.
    except (ValueError, RecursionError) as error:
        return {ROW_ERROR: f"{where} is no JSON object ({type(error).__name__}: {error})"}


def _checked(row: Any, where: str) -> dict[str, Any]:
    return row if isinstance(row, dict) else {ROW_ERROR: f"{where} is no JSON object, found {shown(row)}"}


def row_kind(name: str | os.PathLike[str]) -> str | None:
    """Which of [`ROW_FILES`] a file is by its name, in upper case too; `None` if it is none of them."""
    return next((ending for ending in ROW_FILES if os.fspath(name).lower().endswith(ending)), None)


def data_files(source: Path) -> list[str]:
    """The files that [`load_rows`] reads itself: the one that is named, or the data files of a folder, all of the kind
    that comes first; none in a folder of `save_to_disk`.
    """
    if source.is_file():
        return [str(source)]
    named = sorted(map(str, source.iterdir())) if source.is_dir() else []
    for ending in ROW_FILES:
        files = [file for file in named if row_kind(file) == ending]
        if ending == ".json" and any((source / name).exists() for name in SAVED_DATASETS):
            return []
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
