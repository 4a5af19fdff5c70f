"""Decoding video and image files, with PyAV and Pillow only.

transformers hands a video path inside `apply_chat_template` to torchcodec, which needs a system FFmpeg. PyAV brings
its own, so videos are decoded here first and every processor gets frames with their metadata.
"""

from __future__ import annotations

import math
from http.client import HTTPException
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata, read_video_pyav

from ..errors import ImageError, VideoError
from ..extras import require

DOWNLOAD_TIMEOUT = 60.0
"""Seconds a server may stay silent."""


def is_url(source: Any) -> bool:
    """Whether a video or image is given by a web address."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def read_video(
    source: str | PathLike[str] | bytes,
    fps: float | None = None,
    max_frames: int | None = None,
    *,
    num_frames: int | None = None,
    min_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> tuple[np.ndarray, VideoMetadata]:
    """Decodes a video file with PyAV.

    Frames are chosen evenly over the window from `start` to `end`. Without `fps`, `num_frames` and bounds, every frame
    of the window is kept.

    Args:
        source: The file, its URL, or its bytes.
        fps: Frames per second to keep, at most the file's own rate.
        max_frames: Upper bound on the number of frames.
        num_frames: Number of frames to keep, instead of `fps`. A window of fewer frames shows some of them again.
        min_frames: Lower bound on the number of frames, for windows that `fps` would leave with fewer.
        start: Beginning of the window, in seconds of presentation time, that is as a player counts; by default the
            beginning of the video.
        end: End of the window, in seconds of presentation time; by default the end of the video.

    Returns:
        Frames `(frames, height, width, 3)` uint8 RGB, and metadata with the file's frame rate and the kept indices,
        counted from the beginning of the video; `total_num_frames` and `duration` are the window's.

    Raises:
        VideoError: The file is missing, unreadable, empty, has no frame, has none between `start` and `end`, or breaks
            off before its announced end.
        MissingDependencyError: PyAV or torchvision is not installed.
        ValueError: A number is out of range, or two contradict each other: `fps` and `num_frames`, `min_frames` above
            `max_frames`, `start` behind `end`.
    """
    _check_sampling(fps, max_frames, num_frames, min_frames, start, end)
    require("video", "Reading videos", "av", "torchvision")
    import av

    name, file = _open_video(source)

    def choose_frames(metadata: VideoMetadata, **kwargs: Any) -> np.ndarray:
        rate = metadata.fps or 1.0
        first = min(math.ceil((start or 0) * rate), metadata.total_num_frames)
        last = metadata.total_num_frames if end is None else min(math.ceil(end * rate), metadata.total_num_frames)
        if metadata.total_num_frames < 1:
            raise VideoError(f"{name} announces no frames. Re-encode it, for instance to an mp4 file with h264 video.")
        if last <= first:
            raise VideoError(f"{name} has no frame between {start or 0} s and {end} s. Choose another window.")
        total = metadata.total_num_frames = last - first
        metadata.duration = total / rate
        wanted = num_frames or (total if fps is None else math.ceil(total * min(1.0, fps / rate)))
        wanted = max(1, min_frames or 1, min(wanted, max_frames or wanted))
        return first + np.arange(wanted) * total // wanted

    try:
        frames, metadata = read_video_pyav(file, sample_indices_fn=choose_frames)
    except VideoError:
        raise
    except (av.FFmpegError, OSError, IndexError, ValueError, TypeError) as error:
        raise VideoError(
            f"{name} cannot be read as a video ({type(error).__name__}: {error}). It may be damaged, cut short, or "
            "hold no video stream. Play it in a video player, or re-encode it to an mp4 file with h264 video."
        ) from error
    expected = len(metadata.frames_indices)
    if len(frames) != expected:
        raise VideoError(
            f"{name} is cut short: {expected} frames were expected, {len(frames)} could be decoded. "
            "Download or record it again, or re-encode what is left of it."
        )
    return frames, metadata


def _check_sampling(
    fps: float | None,
    max_frames: int | None,
    num_frames: int | None,
    min_frames: int | None,
    start: float | None,
    end: float | None,
) -> None:
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive, got {fps}.")
    for name, count in (("max_frames", max_frames), ("num_frames", num_frames), ("min_frames", min_frames)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    if fps is not None and num_frames is not None:
        raise ValueError(f"fps ({fps}) and num_frames ({num_frames}) exclude each other: give one of them.")
    if min_frames is not None and max_frames is not None and min_frames > max_frames:
        raise ValueError(f"min_frames ({min_frames}) must not be above max_frames ({max_frames}).")
    for name, time in (("start", start), ("end", end)):
        if time is not None and not 0 <= time < math.inf:
            raise ValueError(f"{name} must be a time in seconds, 0 or later, got {time}.")
    if end is not None and end <= (start or 0):
        raise ValueError(f"end must be behind start ({start or 0} s), got {end} s.")


def read_frames(frames: Any, fps: float) -> tuple[np.ndarray, VideoMetadata]:
    """A video that is given as an array or tensor, as [`read_video`] returns one: every frame, at `fps` per second.

    Args:
        frames: `(frames, height, width, 3)` or `(frames, 3, height, width)`, at least one frame.

    Raises:
        VideoError: The shape is another one.
    """
    array = np.asarray(frames)
    if array.ndim != 4 or len(array) == 0 or 3 not in (array.shape[1], array.shape[3]):
        raise VideoError(
            "A video given as an array must be (frames, height, width, 3) or (frames, 3, height, width) with at least "
            f"one frame, got shape {array.shape}."
        )
    height, width = (array.shape[1:3]) if array.shape[-1] == 3 else array.shape[2:4]
    metadata = VideoMetadata(
        total_num_frames=len(array),
        fps=fps,
        duration=len(array) / fps,
        height=int(height),
        width=int(width),
        frames_indices=list(range(len(array))),
    )
    return array, metadata


def _open_video(source: str | PathLike[str] | bytes) -> tuple[str, str | BytesIO]:
    """What to call a video in an error, and what PyAV opens: a path, or the bytes of a file."""
    if is_url(source):
        name = str(source)
        return name, BytesIO(_download(name, VideoError))
    if isinstance(source, bytes):
        name = f"A video of {len(source)} bytes"
        if not source:
            raise VideoError(f"{name} is an empty file. Record or download the video again.")
        return name, BytesIO(source)
    path = Path(fspath(source))
    if not path.is_file():
        raise VideoError(f"There is no video file at {path}. Check the path.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is an empty file. Record or download the video again.")
    return str(path), str(path)


def _download(url: str, error_class: type[ValueError]) -> bytes:
    try:
        with urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise error_class(
            f"{url} cannot be downloaded ({type(error).__name__}: {error}). Check the address, or fetch it yourself."
        ) from error


def read_image(source: Any) -> Any:
    """An RGB PIL image from a path, a URL, a file's bytes or a PIL image; arrays and tensors are handed on.

    Raises:
        ImageError: The image is missing or cannot be read.
        MissingDependencyError: Pillow is not installed.
    """
    require("video", "Reading images", "PIL")
    from PIL import Image

    if isinstance(source, PathLike):
        source = fspath(source)
    if not isinstance(source, (str, bytes, Image.Image)):
        return source
    name = f"An image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if is_url(source):
        source = _download(str(source), ImageError)
    elif isinstance(source, str) and not Path(source).is_file():
        raise ImageError(f"There is no image file at {source}. Check the path.")
    try:
        return load_image(Image.open(BytesIO(source)) if isinstance(source, bytes) else source)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{name} cannot be read as an image ({type(error).__name__}: {error}). Open it in an image viewer, or "
            "save it again as png."
        ) from error
