"""A folder as people have them: 40 odd files through `sparrow generate`, stopped twice, and every bad one told."""

import json
import os
import random
import signal
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from stopping import command_in, needs_posix, sparrow
from untrained import save_models

from sparrow_hf.captioning import read_questions
from sparrow_hf.data import read_video
from sparrow_hf.errors import VideoError

TURNED = [0, 65536, 0, -65536, 0, 0, 0, 0, 1073741824]
EVEN = tuple(i / 8 for i in range(16))


def write(
    path: Path,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (128, 96),
    seconds: tuple[float, ...] = EVEN,
    matrix: list[int] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    sound: bool = False,
    **arguments: Any,
) -> None:
    """A video of a bar that walks to the right, its frames at these times."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", options=options or {}, **arguments) as container:
        stream = container.add_stream(codec, rate=8, options={"g": "8"})
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], pixels
        stream.codec_context.time_base = Fraction(1, 8 if path.suffix in (".avi", ".mpg") else 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for number, second in enumerate(seconds):
            picture = np.full((size[1], size[0], 3), 40, np.uint8)
            left = size[0] * number // (len(seconds) + 2)
            picture[:, left : left + size[0] // 8] = (250, 200, 20)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(second / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16_000, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode())


def write_pictures(path: Path, count: int) -> None:
    first, *others = (Image.new("RGB", (64, 48), (20 * number, 90, 200)) for number in range(count))
    first.save(path, save_all=count > 1, append_images=others, **({"duration": 125} if count > 1 else {}))


def write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 8000, "NONE", ""))
        file.writeframes(bytes(16_000))


def write_song(path: Path) -> None:
    """Sound in a container of videos."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16_000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def damage(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    write(path)
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_in_index(data: bytearray) -> bytearray:
    """Bits of the table that says where the frames are."""
    start = data.index(b"stco")
    for place in range(start + 8, start + 16):
        data[place] ^= 0xFF
    return data


Maker = Callable[[Path], object]
GOOD: dict[str, Maker] = {
    "plain.mp4": write,
    "UPPER.MP4": write,
    "no ending": lambda path: write(path, format="mp4"),
    "-dash.mp4": write,
    "with spaces  and 'quotes\".mp4": write,
    "видео 影片 🎬.mp4": write,
    "100%d [a]*?#.mp4": write,
    "markup [bold]red[/].mp4": write,
    "deep/er.mp4": write,
    "vp8.webm": lambda path: write(path, "libvpx"),
    "vp9.webm": lambda path: write(path, "libvpx-vp9"),
    "a.mkv": write,
    "ten bits.mkv": lambda path: write(path, "libx265", "yuv420p10le"),
    "lossless of odd size.mkv": lambda path: write(path, "ffv1", "yuv444p", (127, 93)),
    "a.mov": lambda path: write(path, "mjpeg", "yuvj420p"),
    "a.avi": lambda path: write(path, "mpeg4"),
    "a.ts": write,
    "a.flv": write,
    "a.m4v": lambda path: write(path, format="mp4"),
    "raw.h264": lambda path: write(path, format="h264"),
    "fragmented.mp4": lambda path: write(path, options={"movflags": "frag_keyframe+empty_moov"}),
    "index first.mp4": lambda path: write(path, options={"movflags": "faststart"}),
    "portrait.mp4": lambda path: write(path, matrix=TURNED),
    "wide pixels.mp4": lambda path: write(path, aspect=Fraction(4, 3)),
    "4k.mp4": lambda path: write(path, size=(3840, 2160), seconds=(0, 0.125, 0.25)),
    "one frame.mp4": lambda path: write(path, seconds=(0.0,)),
    "two frames.webm": lambda path: write(path, "libvpx", seconds=(0.0, 0.5)),
    "changing rate.mp4": lambda path: write(path, seconds=(0, 1, 2, 2.1, 2.2, 2.3, 2.4, 4)),
    "starts late.mkv": lambda path: write(path, seconds=tuple(5 + second for second in EVEN)),
    "with sound.mp4": lambda path: write(path, sound=True),
    "animated.gif": lambda path: write_pictures(path, 8),
    "animated.webp": lambda path: write_pictures(path, 8),
}
BAD: dict[str, Maker] = {
    "empty.mp4": Path.touch,
    "text.mp4": lambda path: path.write_text("not a video\n"),
    "description.nfo": lambda path: path.write_text("A movie.\n" * 20),
    "noise.mkv": lambda path: path.write_bytes(random.Random(0).randbytes(20_000)),
    "truncated.mp4": lambda path: damage(path, lambda data: data[: len(data) // 2]),
    "truncated too.webm": lambda path: (write(path, "libvpx"), os.truncate(path, 40)),
    "flipped.mp4": lambda path: damage(path, flip_in_index),
    "song.mp4": write_song,
    "gone.mp4": lambda path: path.symlink_to("nowhere.mp4"),
    "pipe.mp4": os.mkfifo if hasattr(os, "mkfifo") else Path.touch,
}
LEFT_OUT: dict[str, Maker] = {
    "notes.txt": lambda path: path.write_text("notes"),
    "README.md": lambda path: path.write_text("# Notes"),
    "Thumbs.db": Path.touch,
    "desktop.ini": Path.touch,
    "IMG_1.AAE": Path.touch,
    "sound.wav": write_sound,
    "sound.m4a": write_song,
    "plain.srt": lambda path: path.write_text("1\n"),
    "plain.json": lambda path: path.write_text("{}"),
    "thumbnail.jpg": lambda path: write_pictures(path, 1),
    "thumbnail.gif": lambda path: write_pictures(path, 1),
    "thumbnail.webp": lambda path: write_pictures(path, 1),
}


def make(folder: Path) -> Path:
    for name, maker in {**GOOD, **BAD, **LEFT_OUT, ".hidden.mp4": write}.items():
        maker(folder / name)
    return folder


def captions(path: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what no two runs have in common."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: line[name] for name in line.keys() - {"sha256", "seconds", "tokens_per_second"}} for line in lines]


def test_thumbnails_are_left_out_and_moving_pictures_are_not(tmp_path: Path) -> None:
    for name in (*LEFT_OUT, "animated.gif", "animated.webp", "damaged.gif"):
        {**GOOD, **LEFT_OUT, "damaged.gif": Path.touch}[name](tmp_path / name)
    questions = read_questions(str(tmp_path))
    assert [question.name for question in questions] == ["animated.gif", "animated.webp"]
    assert questions.left_out == tuple(sorted([*LEFT_OUT, "damaged.gif"]))


def test_videos_of_phones_are_no_sound(tmp_path: Path) -> None:
    (tmp_path / "a.3gp").touch()
    assert [question.name for question in read_questions(str(tmp_path))] == ["a.3gp"]


@needs_posix
def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("videos/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "clip.mp4").touch()
    for link, to in {"linked": "../elsewhere", "c": "b", "b/back": ".."}.items():
        (tmp_path / "videos" / link).symlink_to(to)
    names = [question.name for question in read_questions(str(tmp_path / "videos"))]
    assert names == ["b/clip.mp4", "linked/clip.mp4"]


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "clip.mp4").touch()
    right = os.scandir

    def scandir(path: Any) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return right(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(VideoError, match=r"locked cannot be read \(Permission denied\): change its permissions"):
        read_questions(str(tmp_path))


@needs_posix
@pytest.mark.full
def test_a_folder_as_people_have_them(tmp_path: Path) -> None:
    assert len(GOOD) + len(BAD) >= 40
    models, videos = save_models(tmp_path / "models"), make(tmp_path / "videos")
    options = (*models, "--max-new-tokens", 8, "--max-frames", 8)
    whole = sparrow("generate", videos, *options, "--output", tmp_path / "whole" / "captions.jsonl")
    assert whole.code == 3 and "Traceback" not in whole.output, whole.output
    assert f"{len(GOOD)} of {len(GOOD) + len(BAD)} rows answered, {len(BAD)} have an error" in whole.output
    assert f"left out, no videos by their names: {', '.join(sorted(LEFT_OUT))}" in whole.output.splitlines()

    expected = captions(tmp_path / "whole" / "captions.jsonl")
    assert [line["name"] for line in expected] == sorted({**GOOD, **BAD})
    for line in expected:
        name = line["name"]
        if name in GOOD:
            assert line["error"] is None and line["text"] and line["visual_tokens"] > 0, line
        else:
            assert line["error"] and "\n" not in line["error"] and line["text"] is None, line
            assert whole.output.count(f"\n{name}: {line['error']}\n") == 1, line
    height, width = read_video(str(videos / "portrait.mp4"))[0].shape[1:3]
    assert (height, width) == (128, 96)

    output = tmp_path / "stopped" / "captions.jsonl"
    command: Any = ("generate", videos, *options, "--output", output)
    killed = sparrow(*command, watched=output.parent, stop=signal.SIGKILL, at=15)
    assert killed.code == -signal.SIGKILL and 0 < len(captions(output)) < len(expected)
    interrupted = sparrow(*command, watched=output.parent, stop=signal.SIGINT, at=15)
    assert interrupted.code == 130 and "Traceback" not in interrupted.output, interrupted.output
    assert len(captions(output)) < len(expected)
    finished = sparrow(*command_in(interrupted.output))
    assert finished.code == 3, finished.output
    assert captions(output) == expected
