"""The messages of a row: checks them, cleans them, separates the answer, and computes a fingerprint.

A row is `{"messages": [...]}`: turns with a `role` and a `content` that is text or a list of parts, `{"type": "text",
"text": …}`, `{"type": "image", "image": …}` and `{"type": "video", "video": …}`, by path, URL or bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, SparrowError, TrainingDataError, VideoError
from .files import is_url

#: What [`~sparrow_hf.data.load_rows`] adds to a row: its index, and the folder its relative paths start from.
ROW_INDEX, ROW_FOLDER = "row_index", "row_folder"


def media_source(part: dict[str, Any]) -> Any:
    """What a `{"type": "video" | "image", …}` part shows: a path, a URL, a file's bytes, an array or a PIL image.

    It is the value of the part's type, `"path"` or `"url"`. `{"path": …, "bytes": …}`, as `datasets` writes videos and
    images that it does not decode, works too. `None` if there is nothing.
    """
    source = next((part[name] for name in (part["type"], "path", "url") if part.get(name) is not None), None)
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    return source


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
    """The turns of a row up to its last question, cleaned, and the answer after it, if any.

    Raises:
        TrainingDataError: The row has no well-formed messages, or nothing but answers; it is named by its index.
    """
    with naming_row(row.get(ROW_INDEX)):
        messages = clean_messages(row)
        written: list[str] = []
        while messages and messages[-1]["role"] == "assistant":
            written.insert(0, text_of(messages.pop()))
        if not messages:
            raise TrainingDataError("all its turns are answers: put a user's turn before them")
        return messages, "\n".join(written) or None


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a chat message, whichever way its content is written."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@contextmanager
def naming_row(index: int | None) -> Iterator[None]:
    """Turns any error that a bad row causes in a processor into a [`TrainingDataError`] that names the row."""
    try:
        yield
    # A missing size, a missing video, a wrong type: processors raise many types of errors.
    except (VideoError, ImageError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        prefix = "" if index is None else f"row {index}: "
        if isinstance(error, TrainingDataError) and str(error).startswith(prefix):
            raise
        kind = "" if isinstance(error, SparrowError) else f"{type(error).__name__}: "
        raise TrainingDataError(f"{prefix}{kind}{error}") from error


def media_digest(source: Any) -> str:
    """SHA-256 of a video or image held in memory: of the bytes of a file, or of the pixels of an array or picture."""
    return hashlib.sha256(source if isinstance(source, bytes) else np.asarray(source).tobytes()).hexdigest()


def fingerprint(conversation: Any) -> str:
    """Digest of a conversation; media count by their path or URL, in memory by their bytes or pixels."""
    return hashlib.sha256(json.dumps(conversation, default=media_digest).encode()).hexdigest()
