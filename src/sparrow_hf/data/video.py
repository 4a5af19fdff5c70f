"""Reading videos with PyAV: which frames of a file are kept, and what processors are told about them.

transformers hands a video path inside `apply_chat_template` to torchcodec, which needs a system FFmpeg. PyAV brings
its own, so videos are decoded here first and every processor gets frames with their metadata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from ..errors import VideoError
from ..extras import require
from .files import find_file
from .frame_times import SMALL_ERROR, FrameTimes
from .video_file import VideoFile

#: Seconds by which two times may differ and count as one.
SAME_TIME = 1e-6


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video to keep; see [`read_video`] for the fields.

    Raises:
        ValueError: A number is out of range, or two contradict each other.
    """

    fps: float | None = None
    max_frames: int | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive, got {self.fps}.")
        for name in ("max_frames", "num_frames", "min_frames"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"fps ({self.fps}) and num_frames ({self.num_frames}) exclude each other: give one.")
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must not be above max_frames ({self.max_frames}).")
        for name in ("start", "end"):
            if (time := getattr(self, name)) is not None and not 0 <= time < math.inf:
                raise ValueError(f"{name} must be a time in seconds, 0 or later, got {time}.")
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"end must be behind start ({self.start or 0} s), got {self.end} s.")

    def steps(self, frames: int, duration: float, rate: float) -> tuple[int, float]:
        """How many frames to keep of a window, and the seconds from one to the next.

        Args:
            frames: Frames there are.
            duration: Seconds of the window.
            rate: Most frames that the video shows per second.
        """
        step = duration / frames if self.fps is None else 1 / min(self.fps, rate)
        wanted = math.ceil(duration / step - SAME_TIME)
        bounded = int(max(min(self.num_frames or wanted, self.max_frames or math.inf), self.min_frames or 1))
        return bounded, step if bounded == wanted else duration / bounded


@dataclass(frozen=True)
class Choice:
    """The frames that are kept, on a regular grid of `fps` places per second that begins at 0 s.

    Args:
        picks: `(kept,)`: which of [`FrameTimes.starts`] they are.
        indices: `(kept,)`: the place of each on the grid: `indices / fps` is the second at which it is on screen.
        total: Places that they stand for: `len(picks) * fps / total` frames were kept per second.
        fps: The video's rate. If it has none, a rate at which all its frames lie on the grid.
        duration: Seconds of the window.
    """

    picks: np.ndarray
    indices: np.ndarray
    total: int
    fps: float
    duration: float

    @property
    def is_every_frame(self) -> bool:
        """Whether no frame of the window is left out or repeated."""
        return bool((np.diff(self.picks) == 1).all())


def choose_frames(name: str, times: FrameTimes, sampling: Sampling) -> Choice:
    """Chooses frames evenly by the time they are on screen.

    Args:
        name: What to call the video in an error.

    Raises:
        VideoError: Nothing is on screen in the window.
    """
    seconds, ends = times.seconds, times.end_seconds
    start, end = sampling.start or 0.0, math.inf if sampling.end is None else sampling.end
    if start > ends - SAME_TIME or end < seconds[0] + SAME_TIME:
        window = f"after {start:g} s" if sampling.end is None else f"between {start:g} s and {end:g} s"
        edge = f"ends at {ends:.3f} s" if start > ends - SAME_TIME else f"begins at {seconds[0]:.3f} s"
        raise VideoError(f"{name} shows nothing {window}: it {edge}. Choose another window.")
    # Frames first … last - 1 appear in the window; the one before them is on screen when it begins.
    first, last = (int(place) for place in np.searchsorted(seconds, (start - SAME_TIME, end - SAME_TIME)))
    if constant := times.constant_rate():
        rate, number = constant
        first = min(first, last - 1)
        frames = last - first
        wanted, step = sampling.steps(frames, frames / rate, rate)
        # 10 frames per second, looked at 4 times per second, every 2.5 frames:
        #   frame    0 1 2 3 4 5 6 7 8 9
        #   looked   ^    ^    ^    ^
        #   kept     0   2     5   7
        kept = np.floor(np.arange(wanted) * (step * rate) + SAME_TIME).astype(np.int64)
        total = max(1, round(wanted * step * rate))
        return Choice(first + kept, number + first + kept, total, rate, frames / rate)

    begins, ends = max(start, float(seconds[0])), min(end, ends)
    first = int(np.searchsorted(seconds, begins + SAME_TIME, "right")) - 1
    frames, grid = last - first, times.grid_rate()
    stays = np.diff(seconds)
    wanted, step = sampling.steps(frames, ends - begins, min(grid, 1 / stays.min()) if len(stays) else grid)
    if sampling.fps is None and wanted == frames:
        looked_at = np.maximum(seconds[first:last], begins)
    else:
        # A frame that stays on screen for long is looked at again and again, one that is short perhaps never.
        looked_at = begins + np.arange(wanted) * step
    picks = np.searchsorted(seconds, looked_at + SAME_TIME, "right") - 1
    indices = np.floor(looked_at * grid + 2 * SMALL_ERROR).astype(np.int64)
    return Choice(picks, indices, max(1, round(wanted * step * grid)), grid, ends - begins)


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

    Frames are chosen by the time at which a player shows them, whatever the rate is and however it changes; 0 s is
    where a player's clock begins. Frames are turned, and their pixels made square, as a player does.

    Args:
        source: The file, its URL, or its bytes.
        fps: Frames per second to keep, at most the file's own rate: the frames on screen every `1 / fps` seconds. A
            frame that stays on screen for longer is kept again. By default every frame is kept once.
        max_frames: Upper bound on the number of frames; with more, the window is looked at so many times, evenly.
        num_frames: Number of frames to keep, evenly, instead of `fps`. A window of fewer frames shows some again.
        min_frames: Lower bound on the number of frames, in the same way.
        start: Beginning of the window in seconds, by default that of the video. Little else is decoded.
        end: End of the window in seconds, by default that of the video.

    Returns:
        Frames `(frames, height, width, 3)` uint8 RGB, and metadata that tells processors what was kept:
        `frames_indices / fps` are the seconds at which the frames are on screen, also in a window, and `sampled_fps`
        is the number kept per second. `fps` is the video's rate and `total_num_frames` its number of frames; if it has
        no constant rate, they are those of a regular grid that its frames lie on. `duration` is that of the window.

    Raises:
        VideoError: The file is missing, unreadable, empty, has no frame, has none between `start` and `end`, or breaks
            off before its announced end.
        MissingDependencyError: PyAV or torchvision is not installed.
        ValueError: A number is out of range, or two contradict each other: `fps` and `num_frames`, `min_frames` above
            `max_frames`, `start` behind `end`.
    """
    sampling = Sampling(fps, max_frames, num_frames, min_frames, start, end)
    video, times, choice = plan_video(source, sampling)
    first = times.seconds[choice.picks[0]] if sampling.start else None
    frames, shown = _decode(video, times.starts[choice.picks], first)
    # Some packets hold no frame of their own: half a frame, one that only others refer to, or a damaged one.
    there, places = np.unique(shown, return_index=True)
    if choice.is_every_frame and len(there) < len(shown):
        choice = choose_frames(video.name, replace(times, starts=there), sampling)
        frames = frames[places][choice.picks]
    metadata = VideoMetadata(
        total_num_frames=choice.total,
        fps=choice.fps,
        duration=choice.duration,
        height=frames.shape[1],
        width=frames.shape[2],
        video_backend="pyav",
        frames_indices=choice.indices.tolist(),
    )
    return frames, metadata


def plan_video(source: str | PathLike[str] | bytes, sampling: Sampling) -> tuple[VideoFile, FrameTimes, Choice]:
    """The file, when its frames are on screen, and which of them [`read_video`] keeps. Raises what that raises."""
    require("video", "Reading videos", "av", "torchvision")
    video = VideoFile(*find_file(source, "video", VideoError))
    times = video.frame_times(sampling.start or 0.0, sampling.end)
    return video, times, choose_frames(video.name, times, sampling)


def _decode(video: VideoFile, wanted: np.ndarray, start: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The frames that are on screen at given ticks, and the tick at which each appeared.

    One frame at a time is held beside the result, so that memory does not grow with the length of the file.

    Args:
        wanted: `(kept,)`, ascending.
        start: Second of the first, if what is before it should not be decoded.
    """
    frames, appeared = np.empty((0, 0, 0, 3), np.uint8), np.zeros(len(wanted), np.int64)
    done, shown = 0, None

    def take(until: float) -> None:
        """Takes the frame that is shown for every tick before `until`."""
        nonlocal frames, done
        picture = None
        while shown is not None and done < len(wanted) and wanted[done] < until:
            picture = video.picture(shown[1]) if picture is None else picture
            if not frames.size:
                frames = np.empty((len(wanted), *picture.shape), np.uint8)
            appeared[done], frames[done] = shown[0], picture
            done += 1

    for tick, frame in video.frames(start):
        take(tick)
        if done == len(wanted):
            break
        shown = tick, frame
    take(math.inf)
    if not done:
        raise VideoError(f"No frame of {video.name} can be decoded. Play it in a video player, or re-encode it.")
    return frames, appeared


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
