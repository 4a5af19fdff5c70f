"""Checks that training and held-out rows share no video or image."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.files import is_url
from ..data.messages import clean_messages, media_digest
from ..errors import TrainingDataError

#: Pairs of rows that [`refuse_shared_media`] names.
MAX_NAMED_PAIRS = 10


def media_keys(row: Mapping[str, Any]) -> set[str]:
    """Keys of the videos and images of a row: resolved path, URL, or digest of the bytes or pixels.

    The same video once by path and once by bytes has two keys.

    Raises:
        TrainingDataError: The row has no well-formed messages.
    """
    parts = [part for turn in clean_messages(row) if not isinstance(turn["content"], str) for part in turn["content"]]
    return {_media_key(part[part["type"]]) for part in parts if part["type"] != "text"}


def _media_key(source: Any) -> str:
    if isinstance(source, str):
        return source if is_url(source) else str(Path(source).resolve())
    return f"sha256:{media_digest(source)}"


def refuse_shared_media(train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> None:
    """Raises [`TrainingDataError`] if a held-out row shows a video or image that a training row shows.

    Rows that cannot be read for another reason are ignored here; the collator reports them.
    """
    first_row = {key: index for index, keys in reversed(list(_all_media_keys(train))) for key in keys}
    shared = [
        f"held-out row {index} and training row {first_row[key]}: {key}"
        for index, keys in _all_media_keys(held_out)
        for key in sorted(keys & first_row.keys())
    ]
    if shared:
        rest = f"; and {len(shared) - MAX_NAMED_PAIRS} more" if len(shared) > MAX_NAMED_PAIRS else ""
        raise TrainingDataError(
            f"{len(shared)} held-out videos or images are trained on: {'; '.join(shared[:MAX_NAMED_PAIRS])}{rest}. "
            "Split by video, not by row: figures on seen videos mean nothing."
        )


def _all_media_keys(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, set[str]]]:
    for index, row in enumerate(rows):
        try:
            yield index, media_keys(row)
        except TrainingDataError:
            continue
