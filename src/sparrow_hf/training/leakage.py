"""Checks that training and held-out rows share no video, image or prompt."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.answers import MEDIA_FOLDER
from ..data.files import is_url
from ..data.messages import clean_messages, fingerprint, media_digest, media_parts, split_answer
from ..errors import SparrowError, TrainingDataError
from .data import as_row
from .recording import RecordedDataset

#: Pairs of rows that [`refuse_shared_media`] names.
MAX_NAMED_PAIRS = 10


def media_keys(row: Mapping[str, Any]) -> set[str]:
    """Keys of the videos and images of a row: resolved path, URL, or digest of the bytes or pixels; of each frame, if
    a video is given as a list of them.

    A file that [`~regenerate.regenerate`] wrote of bytes has the key of these bytes, in whatever folder of answers it
    is. Otherwise the same video once by path and once by bytes has two keys.

    Raises:
        MessagesError: The row has no well-formed messages.
        VideoError, ImageError: A part shows nothing.
    """
    sources = [part[part["type"]] for part in media_parts(clean_messages(row))]
    return {_media_key(each) for source in sources for each in (source if isinstance(source, list) else [source])}


def _media_key(source: Any) -> str:
    if isinstance(source, str):
        if is_url(source):
            return source
        path = Path(source)
        is_stored = path.parent.name == MEDIA_FOLDER and re.fullmatch("[0-9a-f]{64}", path.name)
        return f"sha256:{path.name}" if is_stored else str(path.resolve())
    return f"sha256:{media_digest(source)}"


def refuse_shared_media(train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> None:
    """Raises [`TrainingDataError`] if training and held-out rows share a video, image or prompt.

    Rows that show something are compared by what they show, others by their prompts, and recorded rows by their files.
    A recording and rows of another kind cannot be compared.

    Rows that cannot be read for another reason are ignored here; the collator reports them.
    """
    if isinstance(train, RecordedDataset) != isinstance(held_out, RecordedDataset):
        return
    first_row = {key: index for index, keys in reversed(list(_all_keys(train))) for key in keys}
    shared = [
        f"held-out row {index} and training row {first_row[key]}: {key}"
        for index, keys in _all_keys(held_out)
        for key in sorted(keys & first_row.keys())
    ]
    if shared:
        rest = f"; and {len(shared) - MAX_NAMED_PAIRS} more" if len(shared) > MAX_NAMED_PAIRS else ""
        raise TrainingDataError(
            f"{len(shared)} held-out videos, images or prompts are trained on: {'; '.join(shared[:MAX_NAMED_PAIRS])}"
            f"{rest}. Split by video, not by row: figures on what was trained on mean nothing."
        )


def _all_keys(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, set[str]]]:
    if isinstance(rows, RecordedDataset):
        yield from ((index, {key}) for index, key in enumerate(rows.row_keys()))
        return
    for index, row in enumerate(rows):
        try:
            yield index, _keys(as_row(row))
        except SparrowError:
            continue


def _keys(row: Mapping[str, Any]) -> set[str]:
    return media_keys(row) or {f"prompt sha256:{fingerprint(split_answer(row)[0])}"}
