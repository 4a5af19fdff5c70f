"""Reading videos and chat messages into model inputs, with PyAV only.

transformers hands a video path inside `apply_chat_template` to torchcodec, which needs a system FFmpeg. PyAV brings
its own, so videos are decoded here first and every processor gets frames with their metadata.
"""

from __future__ import annotations

import math
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import BatchFeature
from transformers.utils import is_av_available, is_torchvision_available
from transformers.video_utils import VideoMetadata, load_video

from .errors import MissingDependencyError, VideoError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

DEFAULT_FRAMES_PER_SECOND = 2.0
"""Assumed for videos given as arrays that do not say how densely they were sampled (Qwen-VL's sampling rate)."""


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


def read_video(
    path: str | PathLike[str], fps: float | None = None, max_frames: int | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """Decodes a video file with PyAV.

    Args:
        path: The file.
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

    path = Path(fspath(path))
    if not path.is_file():
        raise VideoError(f"There is no video file at {path}. Check the path.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is an empty file. Record or download the video again.")

    def choose_frames(metadata: VideoMetadata, **kwargs: Any) -> np.ndarray:
        total = metadata.total_num_frames
        if total < 1:
            raise VideoError(f"{path} announces no frames. Re-encode it, for instance to an mp4 file with h264 video.")
        wanted = total if fps is None or not metadata.fps else math.ceil(total * min(1.0, fps / metadata.fps))
        wanted = max(1, min(wanted, total, max_frames or total))
        return np.arange(wanted) * total // wanted

    try:
        frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=choose_frames)
    except VideoError:
        raise
    except (av.FFmpegError, OSError, IndexError, ValueError, TypeError) as error:
        raise VideoError(
            f"{path} cannot be read as a video ({type(error).__name__}: {error}). It may be damaged, cut short, or "
            "hold no video stream. Play it in a video player, or re-encode it to an mp4 file with h264 video."
        ) from error
    expected = len(metadata.frames_indices)
    if len(frames) != expected:
        raise VideoError(
            f"{path} is cut short: {expected} frames were expected, {len(frames)} could be decoded. "
            "Download or record it again, or re-encode what is left of it."
        )
    return frames, metadata


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
    source = part.get("video", part.get("path"))
    if source is None:
        raise VideoError(f"A video part needs a file or an array under 'video' or 'path'; it has {sorted(part)}.")
    if isinstance(source, (str, PathLike)):
        return read_video(source, fps, max_frames)
    frames = np.asarray(source)
    if frames.ndim != 4 or len(frames) == 0 or 3 not in (frames.shape[1], frames.shape[3]):
        raise VideoError(
            "A video given as an array must be (frames, height, width, 3) or (frames, 3, height, width) with at least "
            f"one frame, got shape {frames.shape}."
        )
    return frames, _array_metadata(frames, float(part.get("fps", DEFAULT_FRAMES_PER_SECOND)))


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
            `{"type": "image", "image": …}` (a PIL image, array, path or URL) and `{"type": "video", "video": …}` (a
            path, or frames as an array, with their rate in `"fps"`). Any number of videos works, none too.
        fps: Frames per second to keep of video files, see `read_video`. Arrays are passed on as they are.
        max_frames: Most frames to keep of each video file.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.

    Returns:
        The processor's output for a batch of one, as tensors.

    Raises:
        VideoError: A video cannot be read or has the wrong shape.
        MissingDependencyError: PyAV or torchvision is not installed and the messages hold a video.
    """
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    videos = [_load_part(part, fps, max_frames) for part in parts if part["type"] == "video"]
    images = [part.get("image", part.get("path", part.get("url"))) for part in parts if part["type"] == "image"]

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media["videos"] = [frames for frames, _ in videos]
        media["video_metadata"] = [metadata for _, metadata in videos]
        # The frames are the ones to look at: no processor may sample them again.
        media["do_sample_frames"] = False
    return processor(text=[text], **media, return_tensors="pt")
