"""The messages of a row in their one plain form, which everything that reads conversations starts from.

row               messages of any dialect, and what `load_rows` adds to them
 │ plain_turns      turns of `role` and `content`, media in parts of it: see `dialects.py`
 │ plain_part       parts of one kind each, their sources and settings checked: see `parts.py`
clean_messages    what a chat template and `prepare_inputs` read
 │ split_answer     without the answer at the end
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import ImageError, MessagesError, SparrowError, TrainingDataError, VideoError
from ..signals import raise_stop_in
from .dialects import plain_turns, without_turns
from .parts import MEDIA_TYPES, named_sources, plain_part
from .sources import plain_source

#: What [`~sparrow_hf.data.load_rows`] adds to a row: its index, and the folder its relative paths start from.
ROW_INDEX, ROW_FOLDER = "row_index", "row_folder"
#: Instead of a row that could not be read: why.
ROW_ERROR = "row_error"
#: Longest text that an error repeats of another library's.
LONGEST_REASON = 500


def media_source(part: Mapping[str, Any]) -> Any:
    """What a `{"type": "video" | "image", …}` part shows: a path, a URL, a file's bytes, an array or a PIL image.

    `None` if there is nothing; see [`~sparrow_hf.data.parts.plain_part`] for what a part may hold.
    """
    kind = MEDIA_TYPES[part["type"]]
    named = named_sources(part, kind)
    key, value = next(iter(named.items()), ("", None))
    return None if value is None else plain_source(value, kind, base64=key == "base64")


def clean_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row with nothing in them but what a chat template and [`prepare_inputs`] read.

    The same conversation in another dialect gives the same turns, and clean turns stay as they are. Relative paths
    become absolute where the row names their folder.

    Raises:
        MessagesError: Something in the messages is not understood.
        VideoError, ImageError: A part shows nothing.
    """
    if row.get(ROW_ERROR) is not None:
        raise MessagesError(row[ROW_ERROR])
    cleaned = []
    for number, turn in enumerate(plain_turns(row)):
        content = turn["content"]
        if not isinstance(content, str):
            content = [_clean_part(part, row.get(ROW_FOLDER), number, place) for place, part in enumerate(content)]
        cleaned.append({"role": turn["role"], "content": content})
    return cleaned


def _clean_part(part: Any, folder: str | None, turn: int, place: int) -> dict[str, Any]:
    try:
        return plain_part(part, folder)
    except (MessagesError, VideoError, ImageError) as error:
        raise type(error)(f"turn {turn}, part {place}: {error}") from None


def media_parts(messages: Sequence[Mapping[str, Any]], kind: str | None = None) -> list[dict[str, Any]]:
    """The parts of clean messages that show something, or that show videos or images, in order."""
    parts = [part for turn in messages if not isinstance(turn["content"], str) for part in turn["content"]]
    return [part for part in parts if part["type"] == kind or (kind is None and part["type"] in ("video", "image"))]


def split_answer(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The turns of a row up to its last question, cleaned, and the answer after it, if any.

    Raises:
        TrainingDataError: The row has no well-formed messages, or nothing but answers; it is named by its index.
    """
    with naming_row(row.get(ROW_INDEX)):
        messages = clean_messages(row)
        written: list[str] = []
        while messages and messages[-1]["role"] == "assistant":
            if media_parts(messages[-1:]):
                raise MessagesError("the answer shows a video or an image: only prompts may")
            written.insert(0, text_of(messages.pop()))
        if not messages:
            raise TrainingDataError("all its turns are answers: put a user's turn before them")
        return messages, "\n".join(written) or None


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says beside its conversation and its place."""
    return {name: value for name, value in without_turns(row).items() if name not in (ROW_INDEX, ROW_FOLDER)}


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a chat message, whichever way its content is written."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def messages_for(video: str, question: str) -> list[dict[str, Any]]:
    """One user's turn that shows a video, named by its path or URL, and then asks a question."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@contextmanager
def naming_row(index: int | None) -> Iterator[None]:
    """Turns any error that a bad row causes into a [`TrainingDataError`] that names the row.

    What is missing on the machine is not the row's fault and raises as it is.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    # A missing size, a missing video, a wrong type, a template that refuses: libraries raise many types of errors.
    except Exception as error:
        raise_stop_in(error)
        prefix = "" if index is None else f"row {index}: "
        if isinstance(error, TrainingDataError) and str(error).startswith(prefix):
            raise
        reason = str(error) if isinstance(error, SparrowError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, SparrowError) and len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}…"
        raise TrainingDataError(f"{prefix}{reason}") from error


def media_digest(source: Any) -> str:
    """SHA-256 of a video or image held in memory: of the bytes of a file, or of the pixels of an array or picture."""
    return hashlib.sha256(source if isinstance(source, bytes) else np.asarray(source).tobytes()).hexdigest()


def fingerprint(conversation: Any) -> str:
    """Digest of a conversation; media count by their path or URL, in memory by their bytes or pixels.

    Clean messages of the same conversation have the same digest, whichever dialect they were written in.
    """
    return hashlib.sha256(json.dumps(_alike(conversation), default=media_digest).encode()).hexdigest()


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over what rows ask and their other columns, in their order; the answers at their ends do not count.

    Media count as in [`fingerprint`]. Rows that cannot be read are all alike.
    """
    digest = hashlib.sha256()
    for row in rows:
        try:
            messages, _ = split_answer(row)
            with naming_row(row.get(ROW_INDEX)):
                read = fingerprint([messages, json.dumps(columns_of(row))])
        except TrainingDataError:
            read = "unreadable"
        digest.update(f"{read}\n".encode())
    return digest.hexdigest()


def row_name(index: int, asked: Any) -> str:
    """What a row is called in files of results: its number, and the start of the fingerprint of what it asks."""
    return f"row {index}, {fingerprint(asked)[:8]}"


def _alike(value: Any) -> Any:
    """The same conversation with every turn that holds nothing but text written as text."""
    if isinstance(value, (list, tuple)):
        return [_alike(inner) for inner in value]
    if isinstance(value, Mapping) and value.keys() == {"role", "content"} and not media_parts([value]):
        return {"role": value["role"], "content": text_of(value)}
    return value
