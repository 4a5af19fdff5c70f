"""What a video or image can be given as, and its plain form: path, URL, bytes, array, PIL image, list of frames."""

import base64 as base64_codec
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import torch

from ..errors import MessagesError

#: Longest text that an error repeats: a path, but never a file.
LONGEST_SHOWN = 200
#: Longer values without a dot are rather base64 than a path if no slash comes first, and not repeated either.
LONGEST_WORD = 64
#: A kind with its article.
A = {"image": "an image", "video": "a video"}


def shown(value: Any) -> str:
    """A value as an error names it, without the payload of a file that it may hold."""
    if isinstance(value, str):
        is_payload = value[:5].lower() == "data:" or (
            len(value) > LONGEST_WORD and re.fullmatch(r"[\w+=\s-][\w+/=\s-]*", value) is not None
        )
        if not is_payload and len(value) <= LONGEST_SHOWN:
            return repr(value)
        return f"{value[:12]!r}… ({len(value)} characters)"
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, (int, float)):
        # Integers may be of any length, and beyond 4,300 digits cannot be printed.
        return "a huge number" if isinstance(value, int) and abs(value) > 1e100 else repr(value)
    if isinstance(value, Mapping):
        return ", ".join(shown(key) for key in list(value)[:12]) or "none"
    size = f" of {len(value)}" if isinstance(value, (bytes, bytearray, list, tuple)) else ""
    return f"a {type(value).__name__}{size}"


def is_missing(value: Any) -> bool:
    """Whether a key counts as absent: it has no value, or, as Arrow fills structures, only such values within."""
    return value is None or (isinstance(value, Mapping) and all(inner is None for inner in value.values()))


def plain_source(value: Any, kind: str, folder: str | None = None, *, base64: bool = False) -> Any:
    """The plain form of what a part shows; that of a plain form is the same.

    Args:
        value: A path, `file://` address, URL, data URL, the bytes of a file, raw base64, an array or tensor, a PIL
            image, frames as a list of any of these, nested lists of numbers, or `{"path": …, "bytes": …}` and
            `{"url": …}`, as `datasets` and OpenAI write media.
        kind: `"video"` or `"image"`.
        folder: Where relative paths start.
        base64: Whether text is raw base64.

    Returns:
        `str` (URL or path), `bytes`, `np.ndarray`, a PIL image, or a list of these: the frames of a video.

    Raises:
        MessagesError: It is none of these.
    """
    if isinstance(value, Mapping):
        value = _within(value, kind)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if base64:
        if not isinstance(value, str):
            raise MessagesError(f"'base64' must be text, found {shown(value)}")
        return _decoded(value, kind)
    if isinstance(value, (str, os.PathLike)):
        return _plain_address(os.fspath(value), kind, folder)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        return _pixels(value, kind)
    if isinstance(value, (list, tuple)):
        return _plain_list(value, kind, folder)
    if _is_picture(value) and kind == "image":
        return value
    raise MessagesError(
        f"{A[kind]} must be a path, a URL, the bytes of a file{' or' if kind == 'image' else ','} an array"
        f"{' or a PIL image' if kind == 'image' else ' or a list of frames'}, found {shown(value)}"
    )


def _within(value: Mapping[str, Any], kind: str) -> Any:
    """The source in a dictionary. `datasets` keeps a file's name beside its bytes, which are then what counts."""
    given = {key: inner for key, inner in value.items() if inner is not None}
    if kind == "image" and "url" in given:
        # How closely OpenAI's own models look; others have sizes for it.
        given.pop("detail", None)
    if "bytes" in given and given.keys() <= {"bytes", "path"}:
        return given["bytes"]
    if len(given) == 1 and given.keys() <= {"path", "url"}:
        return next(iter(given.values()))
    raise MessagesError(
        f"{A[kind]} in a dictionary must be {{'url': …}}, or {{'path': …, 'bytes': …}}, found the keys {shown(value)}"
    )


def _plain_address(address: Any, kind: str, folder: str | None) -> str | bytes:
    """A URL as it is, a path as an absolute one, the bytes of a data URL."""
    if isinstance(address, bytes):
        address = os.fsdecode(address)
    if not address.strip():
        raise MessagesError(f"{A[kind]} is named by an empty text: name a path, a URL or bytes")
    scheme = re.match(r"([a-z][a-z0-9+.-]+):", address[:20].lower())
    if scheme is not None and scheme[1] == "data":
        return _from_data_url(address, kind)
    if scheme is not None and scheme[1] in ("http", "https"):
        return scheme[0] + address[len(scheme[0]) :]
    if scheme is not None and scheme[1] == "file":
        # file:///a/b.mp4, file://localhost/a/b.mp4 and file:/a/b.mp4 name the same file.
        named = re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", address, re.IGNORECASE | re.DOTALL)
        if named is None:
            raise MessagesError(f"{shown(address)} names no file of this machine: write file:///absolute/path")
        # Names with a per cent sign are often written as they are.
        address = named[1] if os.path.lexists(_short(named[1])) else unquote(named[1])
    elif re.match(r"[a-z][a-z0-9+.-]+://", address[:20].lower()):
        raise MessagesError(f"{shown(address)} cannot be opened: name a path, or a file://, http:// or data: address")
    if "\0" in address or len(address) > 4096:
        raise MessagesError(
            f"{A[kind]} is named by {shown(address)}, which is no path: give base64 as 'base64' or as a data URL"
        )
    path = os.path.expanduser(address)
    return path if folder is None else str(Path(folder) / path)


def _short(path: str) -> str:
    """A path that the system can be asked about: none is longer, or holds a null character."""
    return "" if len(path) > 4096 or "\0" in path else path


def _from_data_url(address: str, kind: str) -> bytes:
    """data:[type][;base64],payload, the payload percent-encoded or not."""
    head, comma, payload = address.partition(",")
    if not comma:
        raise MessagesError(f"a data URL needs a comma before its data, found {shown(address)}")
    if head.lower().rstrip().endswith(";base64"):
        return _decoded(unquote(payload) if "%" in payload else payload, kind)
    return unquote_to_bytes(payload)


def _decoded(text: str, kind: str) -> bytes:
    """Raw base64, in lines or not, of the standard alphabet or of that for URLs, with its padding or without."""
    packed = "".join(text.split()).rstrip("=")
    packed += "=" * (-len(packed) % 4)
    try:
        return base64_codec.b64decode(packed.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        raise MessagesError(f"the base64 of {A[kind]} cannot be decoded ({len(text)} characters)") from None


def _plain_list(value: list[Any] | tuple[Any, ...], kind: str, folder: str | None) -> Any:
    """Frames of a video, or an array as nested lists, which is what Arrow and JSON make of one."""
    if not value:
        raise MessagesError(f"{A[kind]} is an empty list: give at least one frame")
    if isinstance(value[0], (list, tuple)):
        try:
            array = np.asarray(value)
        except ValueError:
            raise MessagesError(f"{A[kind]} is nested lists of different lengths, not an array") from None
        if array.dtype.kind not in "iuf":
            raise MessagesError(f"{A[kind]} is nested lists of something else than numbers")
        is_pixels = array.dtype.kind == "i" and array.size and array.min() >= 0 and array.max() <= 255
        return array.astype(np.uint8) if is_pixels else _pixels(array, kind)
    if kind == "image":
        raise MessagesError(f"a part shows one image, found a list of {len(value)}: write one part for each")
    return [plain_source(frame, "image", folder) for frame in value]


def _pixels(array: np.ndarray, kind: str) -> np.ndarray:
    """An array as it is, unless it is scaled to [0, 1]: processors divide by 255 themselves, and would see black."""
    if array.dtype.kind == "f" and array.size and 0 < (largest := array.max()) <= 1:
        raise MessagesError(
            f"{A[kind]} given as floats must have values from 0 to 255, found none above {largest:.3g}: multiply "
            "it by 255, or give uint8"
        )
    return array


def _is_picture(value: Any) -> bool:
    """Whether it is a PIL image, if Pillow is there."""
    try:
        from PIL import Image
    except ImportError:
        return False
    return isinstance(value, Image.Image)
