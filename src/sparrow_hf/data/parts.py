"""The parts of a message: which keys they take, what each value must be, and their one plain form.

    {"type": "text", "text": …}    {"type": "image", "image": source, …}    {"type": "video", "video": source, …}

The source is an absolute path, a URL, the bytes of a file, an array, a PIL image or a list of frames; behind it stand
the settings that are set, under one name each.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ImageError, MessagesError, VideoError
from .sources import is_missing, plain_source, shown

MediaKind = Literal["image", "video"]

#: Type of a part → what it shows.
MEDIA_TYPES: dict[str, MediaKind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True)
class Setting:
    """A setting of a part: what its value must be, and whether frames that were given one by one take it too."""

    expected: str
    accepts: Callable[[float], bool]
    whole: bool = False
    for_frames: bool = False


_COUNT = Setting("a positive number, and a whole one", lambda value: value >= 1, whole=True)
_TIME = Setting("a time in seconds, 0 or later", lambda value: value >= 0)
_PIXELS = Setting("a number of pixels of at least 1", lambda value: value >= 1, for_frames=True)
_SIDE = Setting("a whole number of pixels of at least 1", lambda value: value >= 1, whole=True, for_frames=True)

IMAGE_SETTINGS = {"min_pixels": _PIXELS, "max_pixels": _PIXELS, "resized_height": _SIDE, "resized_width": _SIDE}
VIDEO_SETTINGS = {
    "fps": Setting("a positive number", lambda value: value > 0, for_frames=True),
    "num_frames": _COUNT,
    "min_frames": _COUNT,
    "max_frames": _COUNT,
    "video_start": _TIME,
    "video_end": _TIME,
    "total_pixels": _PIXELS,
    **IMAGE_SETTINGS,
}
SETTINGS: dict[MediaKind, dict[str, Setting]] = {"image": IMAGE_SETTINGS, "video": VIDEO_SETTINGS}
#: Other names of settings: ms-swift's and Qwen's helper for files, and Qwen's for frames.
ALIASES = {"nframes": "num_frames", "sample_fps": "fps"}
#: Settings that cannot stand together: the first would leave the others without effect.
EXCLUSIVE = {
    "num_frames": ("fps", "min_frames", "max_frames"),
    "resized_height": ("min_pixels", "max_pixels", "total_pixels"),
}
#: Settings of which the first must not be above the second.
ORDERED = (("min_frames", "max_frames"), ("min_pixels", "max_pixels"))


def source_keys(kind: MediaKind) -> tuple[str, ...]:
    """Keys that hold what a part shows."""
    return (kind, f"{kind}_url", "path", "url", "bytes", "base64")


def named_sources(part: Mapping[str, Any], kind: MediaKind) -> dict[str, Any]:
    """What a part shows, by key; empty for a placeholder, whose media stand elsewhere in the row."""
    return {key: part[key] for key in source_keys(kind) if not is_missing(part.get(key))}


def plain_part(part: Any, folder: str | None = None) -> dict[str, Any]:
    """A part in its plain form; that of a plain part is the same.

    Args:
        part: A part as any of the dialects writes it. Keys without a value count as absent: Arrow tables fill every
            part with the keys of all others.
        folder: Where relative paths start.

    Raises:
        MessagesError: The part is of an unknown type, has an unknown key, or a value that is none.
        VideoError, ImageError: The part shows nothing.
    """
    if not isinstance(part, Mapping):
        raise MessagesError(f"a part must be a dictionary with a 'type', found {shown(part)}")
    given = {str(key): value for key, value in part.items() if not is_missing(value)}
    found = given.pop("type", None)
    if found == "text":
        text = given.pop("text", None)
        if not isinstance(text, str):
            raise MessagesError(f"a part of type 'text' needs a 'text', found {shown(text)}")
        _refuse_unknown(given, ("text",), "a part of type 'text'")
        return {"type": "text", "text": text}
    if not isinstance(found, str) or found not in MEDIA_TYPES:
        raise MessagesError(
            f"a part must be of type 'text', {', '.join(map(repr, MEDIA_TYPES))}, found "
            + (f"type {shown(found)}" if found is not None else f"no type and the keys {shown(part)}")
        )
    return _plain_media(given, MEDIA_TYPES[found], folder)


def _plain_media(given: dict[str, Any], kind: MediaKind, folder: str | None) -> dict[str, Any]:
    sources = named_sources(given, kind)
    if not sources:
        error_class = VideoError if kind == "video" else ImageError
        raise error_class(f"the row has a placeholder for {kind} but no {kind}: name a path, a URL or bytes")
    if len(sources) > 1:
        raise MessagesError(f"a part shows one {kind}, but {' and '.join(map(repr, sources))} name several: leave one")
    ((key, value),) = sources.items()
    source = plain_source(value, kind, folder, base64=key == "base64")
    written = {name: value for name, value in given.items() if name not in sources}
    _refuse_unknown(written, (*source_keys(kind), *SETTINGS[kind], *ALIASES), f"a part that shows {kind}s")
    settings = plain_settings(written, SETTINGS[kind], f"a {kind}'s")
    if kind == "video" and not isinstance(source, (str, bytes)):
        for name in settings:
            if not VIDEO_SETTINGS[name].for_frames:
                raise MessagesError(
                    f"frames that are given one by one are all shown, so {name!r} has no meaning for them: give a "
                    "video file, or choose the frames yourself"
                )
    return {"type": kind, kind: source} | settings


def plain_settings(written: Mapping[str, Any], settings: Mapping[str, Setting], whose: str) -> dict[str, int | float]:
    """Settings under one name each, as numbers.

    Args:
        written: Names and values, all of known names.
        settings: Those there are.
        whose: Said in errors.

    Raises:
        MessagesError: A value is none of the setting's, two names mean the same, or two settings contradict each
            other.
    """
    found: dict[str, int | float] = {}
    for written_name, value in written.items():
        name = ALIASES.get(written_name, written_name)
        if name not in settings:
            raise MessagesError(f"{whose} {written_name!r} is unknown: there are {', '.join(settings)}")
        if name in found:
            raise MessagesError(f"{whose} {name!r} is set twice: leave out {written_name!r}")
        found[name] = _number(value, settings[name], f"{whose} {written_name!r}")
    for name, others in EXCLUSIVE.items():
        for other in others:
            if name in found and other in found:
                raise MessagesError(f"{whose} {name!r} leaves {other!r} without effect: set one of them")
    for low, high in ORDERED:
        if low in found and high in found and found[low] > found[high]:
            raise MessagesError(f"{whose} {low!r} ({found[low]}) is above {high!r} ({found[high]})")
    if "video_end" in found and found["video_end"] <= found.get("video_start", 0):
        raise MessagesError(
            f"{whose} 'video_end' ({found['video_end']} s) must be behind 'video_start' "
            f"({found.get('video_start', 0)} s)"
        )
    if ("resized_height" in found) != ("resized_width" in found):
        raise MessagesError(f"{whose} 'resized_height' and 'resized_width' work together: set both or none")
    return found


def _number(value: Any, setting: Setting, whose: str) -> int | float:
    """The number; counts as `int`, which a table may have stored as floats."""
    # NaN, the infinities and what no float holds are no numbers here.
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    is_number = is_number and -(2**63) < value < 2**63
    if not is_number or not setting.accepts(value) or (setting.whole and value != int(value)):
        raise MessagesError(f"{whose} must be {setting.expected}, found {shown(value)}")
    return int(value) if setting.whole or isinstance(value, (int, np.integer)) else float(value)


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise MessagesError(f"{what} has no {shown(name)}: {hint}")
