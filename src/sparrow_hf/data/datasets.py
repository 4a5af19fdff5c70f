"""Rows of conversations from wherever `datasets` reads them: files, folders and the Hub."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from torch.utils.data import Dataset, IterableDataset

from ..checksums import check_written
from ..errors import TrainingDataError
from ..extras import require
from .messages import ROW_FOLDER, ROW_INDEX


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
        split: Split of a Hub dataset, or of a `DatasetDict` on disk. Plain files have only `"train"`.
        streaming: Read row by row, without a copy in the cache; the trainer then needs `max_steps`.

    Returns:
        Rows as they are, videos and images never decoded; [`SparrowDataCollator`] checks them.

    Raises:
        TrainingDataError: There is nothing to read at `source`, it has no such split or no column `messages`, or
            answers that `sparrow regenerate` wrote are damaged or missing.
        MissingDependencyError: datasets is not installed.
    """
    require("train", "Reading rows", "datasets")
    import datasets

    path = Path(source)
    try:
        if path.is_dir() and not _data_files(path):
            found = datasets.load_from_disk(str(path))
            rows, folder = found[split] if isinstance(found, datasets.DatasetDict) else found, path.resolve()
            rows = rows.to_iterable_dataset() if streaming else rows
        elif path.exists():
            files = [str(path)] if path.is_file() else _data_files(path)
            check_written(files, TrainingDataError, "run `sparrow regenerate` again, with the same options")
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
