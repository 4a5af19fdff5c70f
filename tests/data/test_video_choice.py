"""Which frames of a video are read: windows in seconds, rates and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video import reformatter
from numbered_videos import SLOW_THEN_FAST, numbers_of, write

from sparrow_hf.data import video_file
from sparrow_hf.errors import VideoError
from sparrow_hf.video import read_video


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for every frame that is decoded."""
    seen: list[Any] = []
    decode = video_file.VideoFile._decoded

    def counted(self: Any, packets: Any) -> Any:
        for frame in decode(self, packets):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_file.VideoFile, "_decoded", counted)
    return seen


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_a_window_is_decoded_from_the_key_frame_before_it(tmp_path: Path, decoded: list[Any], name: str) -> None:
    path = write(tmp_path / name)
    whole, told = read_video(path)
    times = np.array(told.timestamps)
    decoded.clear()
    frames, metadata = read_video(path, start=times[15], end=times[20])
    assert numbers_of(frames) == [15, 16, 17, 18, 19]
    assert np.array_equal(frames, whole[15:20])
    assert metadata.timestamps == pytest.approx(times[15:20])
    assert (metadata.total_num_frames, metadata.duration) == (5, 0.625)
    # Key frames lie 5 frames apart.
    assert len(decoded) <= 3 + 5 + 6

    frames, metadata = read_video(path, 4, start=times[15] - 0.01)
    assert numbers_of(frames) == [15, 17, 19, 21, 23]
    assert metadata.sampled_fps == pytest.approx(4, rel=0.15)


def test_one_converter_serves_all_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, converted = write(tmp_path / "a.mp4"), []
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    class Counted:
        def __init__(self) -> None:
            self.converter = right()
            converted.append(0)

        def reformat(self, *arguments: Any) -> Any:
            converted[-1] += 1
            return self.converter.reformat(*arguments)

    right = reformatter.VideoReformatter
    monkeypatch.setattr(reformatter, "VideoReformatter", Counted)
    assert np.array_equal(read_video(path)[0], frames)
    assert converted == [len(frames)]


def test_a_window_inside_a_frame_shows_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", seconds=SLOW_THEN_FAST, rate=10)
    frames, metadata = read_video(path, start=2.3, end=2.8)
    assert numbers_of(frames) == [2]
    frames, metadata = read_video(path, fps=4, start=2.3, end=5.3)
    assert numbers_of(frames) == [2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5]
    assert metadata.timestamps == pytest.approx([2.3 + i / 4 for i in range(12)], abs=0.1)


def test_a_window_in_which_nothing_is_shown_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"shows nothing after 3 s: it ends at 3\.000 s"):
        read_video(path, start=3)
    with pytest.raises(VideoError, match=r"shows nothing between 7 s and 9 s: it ends at 3\.000 s"):
        read_video(path, start=7, end=9)


@pytest.mark.parametrize(
    "arguments, kept",
    [
        ({"num_frames": 4}, [0, 6, 12, 18]),
        ({"num_frames": 48}, [i // 2 for i in range(48)]),
        ({"num_frames": 9, "max_frames": 3}, [0, 8, 16]),
        ({"fps": 1, "min_frames": 4}, [0, 6, 12, 18]),
        ({"fps": 3}, [0, 2, 5, 8, 10, 13, 16, 18, 21]),
        ({"fps": 1.9}, [0, 4, 8, 12, 16, 21]),
        ({"min_frames": 30, "start": 2.5}, [20 + i * 4 // 30 for i in range(30)]),
    ],
)
def test_counts_and_rates_choose_evenly(tmp_path: Path, arguments: dict[str, Any], kept: list[int]) -> None:
    frames, metadata = read_video(write(tmp_path / "a.webm", "libvpx"), **arguments)
    assert numbers_of(frames) == kept == metadata.frames_indices


@pytest.mark.parametrize(
    "arguments",
    [
        {"fps": 1, "num_frames": 4},
        {"min_frames": 5, "max_frames": 4},
        {"num_frames": 0},
        {"start": -1},
        {"start": 2, "end": 2},
        {"fps": float("nan")},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|must not|exclude"):
        read_video(tmp_path / "a.mp4", **arguments)
