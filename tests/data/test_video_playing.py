"""Videos are read as a player shows them: every frame at its time, turned, with square pixels, in any container.

The files are written by PyAV. `test_video_files.py` compares many more with what ffmpeg says.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_videos import HEIGHT, SLOW_THEN_FAST, WIDTH, numbers_of, pictures, write
from PIL import Image
from typer.testing import CliRunner

from sparrow_hf.cli import app
from sparrow_hf.data import files
from sparrow_hf.errors import VideoError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.video import prepare_inputs, read_video

from families import FAMILIES


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mp4", "libx264", {}),
        ("fragmented.mp4", "libx264", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.ts", "libx264", {}),
        ("a.flv", "libx264", {}),
        ("a.avi", "mpeg4", {}),
        ("b-frames.avi", "libx264", {}),
        ("a.mov", "mjpeg", {"pixels": "yuvj420p"}),
        ("ten-bits.mkv", "libx265", {"pixels": "yuv420p10le"}),
        ("a.gif", "gif", {"pixels": "rgb8"}),
        ("a.h264", "libx264", {"format": "h264"}),
        ("one.webm", "libvpx", {"seconds": (0.0,)}),
    ],
)
def test_every_frame_of_every_container_is_read_at_its_time(
    tmp_path: Path, name: str, codec: str, options: dict[str, Any]
) -> None:
    frames, metadata = read_video(write(tmp_path / name, codec, **options))
    count = len(options.get("seconds", range(24)))
    assert frames.shape == (count, HEIGHT, WIDTH, 3)
    assert numbers_of(frames) == list(range(count))
    if name != "a.h264":  # It holds no times; FFmpeg assumes a rate.
        begins = metadata.timestamps[0]
        assert np.abs(np.array(metadata.timestamps) - begins - np.arange(count) / 8).max() < 0.5 / 8


def test_an_animated_webp_is_read(tmp_path: Path) -> None:
    first, *others = [Image.fromarray(picture) for picture in pictures(6)]
    path = tmp_path / "a.webp"
    first.save(path, save_all=True, append_images=others, duration=[100, 100, 300, 100, 100, 100], lossless=True)
    frames, metadata = read_video(path)
    assert numbers_of(frames) == list(range(6))
    assert metadata.timestamps == [0.0, 0.1, 0.2, 0.5, 0.6, 0.7]
    assert numbers_of(read_video(path.read_bytes(), fps=5)[0]) == [0, 2, 2, 4]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_frames_are_chosen_by_the_time_at_which_they_are_shown(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, seconds=SLOW_THEN_FAST, rate=10)
    frames, metadata = read_video(path, fps=2)
    assert numbers_of(frames) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 10]
    assert metadata.timestamps == pytest.approx([i / 2 for i in range(12)], abs=0.002)
    assert metadata.sampled_fps == pytest.approx(2, rel=1e-3)

    frames, metadata = read_video(path)
    assert numbers_of(frames) == list(range(15))
    assert metadata.timestamps == pytest.approx(SLOW_THEN_FAST, abs=0.002)

    frames, metadata = read_video(path, num_frames=5)
    assert numbers_of(frames) == [0, 1, 2, 3, 4]
    assert metadata.timestamps == pytest.approx([0, 1.2, 2.4, 3.6, 4.8], abs=0.11)


def test_a_last_frame_that_stays_is_seen_as_often_as_any_other(tmp_path: Path) -> None:
    first, *others = [Image.fromarray(picture) for picture in pictures(4)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=[100, 100, 100, 1700])
    frames, metadata = read_video(tmp_path / "a.gif", fps=2)
    assert numbers_of(frames) == [0, 3, 3, 3]
    assert metadata.timestamps == [0, 0.5, 1, 1.5]


#: Name → the matrix of a container, and where the white and the black mark are then: row and column, 0 or -1.
TURNS = {
    "upright": ((1, 0, 0, 1), (0, 0), (0, -1)),
    "quarter": ((0, 1, -1, 0), (0, -1), (-1, -1)),
    "half": ((-1, 0, 0, -1), (-1, -1), (-1, 0)),
    "three quarters": ((0, -1, 1, 0), (-1, 0), (0, 0)),
    "mirrored": ((-1, 0, 0, 1), (0, -1), (0, 0)),
    "upside down": ((1, 0, 0, -1), (-1, 0), (-1, -1)),
    "transposed": ((0, 1, 1, 0), (0, 0), (-1, 0)),
    "transverse": ((0, -1, -1, 0), (-1, -1), (0, -1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_video_is_turned_as_its_matrix_says(tmp_path: Path, turn: str) -> None:
    (a, b, c, d), white, black = TURNS[turn]
    unit = 1 << 16
    path = write(tmp_path / "a.mp4", matrix=(a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30))
    frames, metadata = read_video(path, num_frames=2)
    size = (WIDTH, HEIGHT) if b else (HEIGHT, WIDTH)
    assert frames.shape[1:3] == (metadata.height, metadata.width) == size
    corners = {
        (row, column): frames[0, 4 if row == 0 else -5, 4 if column == 0 else -5].mean()
        for row in (0, -1)
        for column in (0, -1)
    }
    assert max(corners, key=corners.get) == white
    assert frames[1, 4 if black[0] == 0 else -5, 4 if black[1] == 0 else -5].mean() < 30


@pytest.mark.parametrize("aspect, size", [("2", (48, 128)), ("4/3", (48, 85)), ("1/2", (96, 64)), ("300", (48, 64))])
def test_pixels_are_made_square(tmp_path: Path, aspect: str, size: tuple[int, int]) -> None:
    frames, metadata = read_video(write(tmp_path / "a.mkv", aspect=Fraction(aspect)), num_frames=3)
    assert frames.shape[1:3] == (metadata.height, metadata.width) == size
    assert numbers_of(frames) == [0, 8, 16]


def test_frames_that_an_edit_list_hides_are_not_read(tmp_path: Path) -> None:
    frames, metadata = read_video(write(tmp_path / "a.mp4", first=13))
    assert numbers_of(frames) == list(range(13, 24))
    assert (metadata.total_num_frames, metadata.duration) == (11, 1.375)
    assert metadata.timestamps == [i / 8 for i in range(11)]


def test_a_part_of_a_longer_file_is_refused(tmp_path: Path) -> None:
    for name, codec, part in (("a.mkv", "libx264", 0.5), ("a.flv", "libx264", 0.5), ("a.avi", "mpeg4", 0.7)):
        whole = write(tmp_path / name, codec).read_bytes()
        with pytest.raises(VideoError, match=r"is cut short: 3\.. s were expected|is damaged"):
            read_video(whole[: int(len(whole) * part)])
    # An mp4 file whose index comes first tells of every byte. A part of a broadcast is a whole file.
    whole = write(tmp_path / "a.mp4", container_options={"movflags": "faststart"}).read_bytes()
    with pytest.raises(VideoError, match="is cut short"):
        read_video(whole[:-1])
    assert numbers_of(read_video(whole)[0]) == list(range(24))
    broadcast = write(tmp_path / "a.ts").read_bytes()
    frames, metadata = read_video(broadcast[len(broadcast) // 3 // 188 * 188 : -1000])
    first = numbers_of(frames)[0]
    assert first % 5 == 0 and numbers_of(frames) == list(range(first, first + len(frames)))


def test_few_damaged_frames_are_left_out_and_many_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.avi", "png", pixels="rgb24").read_bytes()
    starts = [place for place in range(len(whole)) if whole.startswith(b"\x89PNG", place)]
    assert len(starts) == 24

    def damaged(*places: int) -> bytes:
        copy = bytearray(whole)
        for place in places:
            copy[starts[place] + 12 : starts[place] + 16] = b"nope"  # The header's name.
        return bytes(copy)

    frames, _ = read_video(damaged(7))
    assert numbers_of(frames) == [number for number in range(24) if number != 7]
    with pytest.raises(VideoError, match="5 of 24 frames could not be decoded"):
        read_video(damaged(3, 7, 8, 9, 20))


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "folder", "missing.mp4", "file:with:colons.mp4"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.mp4").rename(tmp_path / "file:with:colons.mp4")
    if name == "file:with:colons.mp4":
        assert len(read_video(tmp_path / name)[0]) == 24
    else:
        with pytest.raises(VideoError, match=r"is a folder|no video file|File name too long"):
            read_video(tmp_path / name)


def test_tags_may_be_in_any_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv")
    whole = path.read_bytes()
    assert b"Lavf" in whole
    assert len(read_video(whole.replace(b"Lavf", b"L\xe4vf"))[0]) == 24


@pytest.mark.parametrize("name", ["ü n+i.mp4", "%C3%BC%20n+i.mp4"])
def test_addresses_are_asked_for_as_servers_expect_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def refuse(url: str, timeout: float) -> None:
        asked.append(url)
        raise OSError("not there")

    monkeypatch.setattr(files, "urlopen", refuse)
    with pytest.raises(VideoError, match="cannot be downloaded"):
        read_video(f"https://example.org:8/a/{name}?x=1&y=[2]")
    assert asked == ["https://example.org:8/a/%C3%BC%20n+i.mp4?x=1&y=[2]"]
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["doctor", "--video", f"https://example.org:8/a/{name}"])
    assert result.exit_code == 2 and f"https://example.org:8/a/{name} cannot be downloaded" in result.output


@pytest.mark.parametrize("missing", [0, 1])
def test_a_download_is_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    whole = write(tmp_path / "a.ts").read_bytes()

    class Answer(io.BytesIO):
        headers = {"Content-Length": str(len(whole))}

    monkeypatch.setattr(files, "urlopen", lambda url, timeout: Answer(whole[: len(whole) - missing]))
    if missing:
        with pytest.raises(VideoError, match=r"clip\.ts cannot be downloaded .* bytes arrived"):
            read_video("https://example.org/clip.ts")
    else:
        assert len(read_video("https://example.org/clip.ts", fps=4)[0]) == 12


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


#: Family → what its processor writes into a prompt for frames at some seconds.
TOLD = {
    # Two frames are one step, told by its middle.
    "qwen3_vl": lambda times: [f"<{sum(times[i : i + 2]) / 2:.1f} seconds>" for i in range(0, len(times), 2)],
    "smolvlm": lambda times: [f"Frame from {clock(time)}:" for time in times],
    "video_llama_3": lambda times: [f"Time {time:.1f}s:" for time in times],
}


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("screen") / "a.mkv", seconds=SLOW_THEN_FAST, rate=10)


@pytest.mark.parametrize(
    "arguments, times",
    [
        ({"fps": 2}, [i / 2 for i in range(12)]),
        ({"fps": 2, "start": 3, "end": 6}, [3, 3.5, 4, 4.5, 5, 5.5]),
        ({"max_frames": 6}, [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("name", [*TOLD, "qwen2_5_vl"])
def test_processors_are_told_when_the_frames_are_on_screen(
    screen: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], times: list[float]
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    processor = family._processor
    frames, metadata = read_video(screen, **arguments)
    text = f"User: {family.video_prompt}Go\nAssistant:"
    inputs = processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    if name == "qwen2_5_vl":
        step = times[1] - times[0]
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * step], rel=1e-3)
        return
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    places = [prompt.find(said) for said in TOLD[name](times)]
    assert -1 not in places and places == sorted(places), prompt
    if name == "smolvlm":
        assert "0:00:03 [H:MM:SS]" in prompt if "start" in arguments else "0:00:06 [H:MM:SS]" in prompt


def test_a_shape_that_the_processor_refuses_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 1600, 4, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((4, 1600, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    messages = [{"role": "user", "content": [{"type": "video", "video": path}, {"type": "text", "text": "what ?"}]}]
    with pytest.raises(VideoError, match=r"cannot take the video \(found \(1, 4, 1600, 3\)\): absolute aspect ratio"):
        prepare_inputs(build_processor(), messages)


def test_the_doctor_says_what_would_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", seconds=SLOW_THEN_FAST, rate=10, aspect=Fraction(2))

    def told(*options: str) -> dict[str, str]:
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["doctor", "--video", str(path), *options])
        assert result.exit_code == 0, result.output
        return {line[:12].strip(): line[12:].strip() for line in result.output.splitlines()}

    facts = told("--fps", "2")
    assert facts["container"].startswith("Matroska") and facts["video"].startswith("H.264")
    assert facts["pixels"] == "64 × 48, yuv420p, shown as 128 × 48, each 2 times as wide as high"
    assert facts["frames"].startswith("15, on screen from 0.000 s to 6.0")
    assert "at no constant rate, each for 0.100 s to 1.000 s" in facts["frames"]
    assert facts["read"] == "12 frames (7 different)"
    assert facts["at seconds"] == "0.000 0.500 1.000 1.500 2.000 2.500 3.000 3.500 4.000 4.500 5.000 5.500"
    assert told("--start", "5", "--num-frames", "2")["at seconds"] == "5.000 5.500"

    path.write_bytes(b"no video")
    result = CliRunner().invoke(app, ["doctor", "--video", str(path)])
    assert result.exit_code == 2 and "cannot be read as a video" in result.output
    assert CliRunner().invoke(app, ["doctor", "--video", str(path), "--start", "2", "--end", "1"]).exit_code == 2
