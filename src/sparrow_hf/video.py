"""Reading videos, images and chat messages into model inputs, with PyAV and Pillow only.

transformers hands a video path inside `apply_chat_template` to torchcodec, which needs a system FFmpeg. PyAV brings
its own, so videos are decoded here first and every processor gets frames with their metadata.
"""

from __future__ import annotations

import math
from http.client import HTTPException
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.utils import is_av_available, is_torchvision_available
from transformers.video_utils import VideoMetadata, read_video_pyav

from .errors import ImageError, MissingDependencyError, VideoError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

DEFAULT_FRAMES_PER_SECOND = 2.0
"""Assumed for videos given as arrays that do not say how densely they were sampled (Qwen-VL's sampling rate)."""

DOWNLOAD_TIMEOUT = 60.0
"""Seconds a server may stay silent."""


def _require_video_dependencies() -> None:
    missing = [
        name
        for name, available in (("av", is_av_available()), ("torchvision", is_torchvision_available()))
        if not available
    ]
    if missing:
        raise MissingDependencyError(
            f"Reading videos needs {' and '.join(missing)}, not installed here. "
            'Install what is missing with: pip install "sparrow-hf[video]"'
        )


def is_url(source: Any) -> bool:
    """Whether a video or image is given by a web address."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def media_source(part: dict[str, Any]) -> Any:
    """What a `{"type": "video" | "image", …}` part shows: a path, a URL, a file's bytes, an array or a PIL image.

    It may stand under the part's type, `"path"` or `"url"`; `{"path": …, "bytes": …}`, as `datasets` writes videos and
    images that it does not decode, is taken apart. `None` if there is nothing.
    """
    source = next((part[name] for name in (part["type"], "path", "url") if part.get(name) is not None), None)
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    return source


def read_video(
    source: str | PathLike[str] | bytes, fps: float | None = None, max_frames: int | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """Decodes a video file with PyAV.

    Args:
        source: The file, its URL, or its bytes.
        fps: Frames per second to keep, at most the file's own rate; by default every frame is kept.
        max_frames: Upper bound on the number of frames; a longer video is sampled evenly.

    Returns:
        Frames `(frames, height, width, 3)` uint8 RGB, and metadata with the file's frame rate and the kept indices.

    Raises:
        VideoError: The file is missing, unreadable, empty, has no frame, or breaks off before its announced end.
        MissingDependencyError: PyAV or torchvision is not installed.
        ValueError: `fps` or `max_frames` is not positive.
    """
    if fps is not None and fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}.")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}.")
    _require_video_dependencies()
    import av

    name, file = _open_video(source)

    def choose_frames(metadata: VideoMetadata, **kwargs: Any) -> np.ndarray:
        total = metadata.total_num_frames
        if total < 1:
            raise VideoError(f"{name} announces no frames. Re-encode it, for instance to an mp4 file with h264 video.")
        wanted = total if fps is None or not metadata.fps else math.ceil(total * min(1.0, fps / metadata.fps))
        wanted = max(1, min(wanted, total, max_frames or total))
        return np.arange(wanted) * total // wanted

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
    """
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


def _array_metadata(frames: np.ndarray, fps: float) -> VideoMetadata:
    height, width = (frames.shape[1:3]) if frames.shape[-1] == 3 else frames.shape[2:4]
    return VideoMetadata(
        total_num_frames=len(frames),
        fps=fps,
        duration=len(frames) / fps,
        height=int(height),
        width=int(width),
        frames_indices=list(range(len(frames))),
    )


def _load_part(part: dict[str, Any], fps: float | None, max_frames: int | None) -> tuple[np.ndarray, VideoMetadata]:
    source = media_source(part)
    if source is None:
        raise VideoError(
            "A video part needs a file, its bytes, a URL or an array under 'video', 'path' or 'url'; it has "
            f"{sorted(part)}."
        )
    if isinstance(source, (str, PathLike, bytes)):
        return read_video(source, fps, max_frames)
    frames = np.asarray(source)
    if frames.ndim != 4 or len(frames) == 0 or 3 not in (frames.shape[1], frames.shape[3]):
        raise VideoError(
            "A video given as an array must be (frames, height, width, 3) or (frames, 3, height, width) with at least "
            f"one frame, got shape {frames.shape}."
        )
    return frames, _array_metadata(frames, float(part.get("fps", DEFAULT_FRAMES_PER_SECOND)))


def _load_image_part(part: dict[str, Any]) -> Any:
    source = media_source(part)
    if source is None:
        raise ImageError(f"An image part needs an image under 'image', 'path' or 'url'; it has {sorted(part)}.")
    return read_image(source)


def prepare_inputs(
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    add_generation_prompt: bool = True,
) -> BatchFeature:
    """Turns one conversation into the tensors a model of any family expects.

    Args:
        processor: The model's processor.
        messages: Chat messages. Content is a string or a list of parts: `{"type": "text", "text": …}`,
            `{"type": "image", "image": …}` (a PIL image, array, path, URL or a file's bytes) and
            `{"type": "video", "video": …}` (a path, URL or a file's bytes, or frames as an array, with their rate in
            `"fps"`). Any number of videos works, none too.
        fps: Frames per second to keep of video files, see `read_video`. Arrays are passed on as they are.
        max_frames: Most frames to keep of each video file.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.

    Returns:
        The processor's output for a batch of one, as tensors.

    Raises:
        VideoError: A video cannot be read or has the wrong shape, or the processor cannot take videos of different
            lengths or sizes together.
        ImageError: An image cannot be read.
        MissingDependencyError: PyAV or torchvision is not installed and the messages hold a video.
    """
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    videos = [_load_part(part, fps, max_frames) for part in parts if part["type"] == "video"]
    images = [_load_image_part(part) for part in parts if part["type"] == "image"]

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media["videos"] = [frames for frames, _ in videos]
        media["video_metadata"] = [metadata for _, metadata in videos]
        # The frames are the ones to look at: no processor may sample them again.
        media["do_sample_frames"] = False
    try:
        return processor(text=[text], **media, return_tensors="pt")
    except ValueError as error:
        shapes = {frames.shape for frames in media.get("videos", [])}
        if len(shapes) < 2:
            raise
        raise VideoError(
            f"{type(processor).__name__} cannot take videos of different shapes in one prompt (found "
            f"{', '.join(map(str, sorted(shapes)))}): sample them alike with max_frames, or ask about one at a time."
        ) from error
