"""Reading videos and messages: what is decoded, what is passed on, and the error of each unreadable file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from sparrow_hf import extras
from sparrow_hf.errors import MissingDependencyError, VideoError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.testbed.world import make_clip, write_mp4
from sparrow_hf.video import prepare_inputs, read_video


@pytest.fixture(scope="module")
def processor() -> Qwen2_5_VLProcessor:
    return build_processor()


@pytest.fixture
def gray_ramp(tmp_path: Path) -> Path:
    """Forty frames at 8 per second, each a little brighter than the one before."""
    shades = np.arange(40, dtype=np.uint8) * 6
    write_mp4(tmp_path / "ramp.mp4", np.broadcast_to(shades[:, None, None, None], (40, 64, 64, 3)))
    return tmp_path / "ramp.mp4"


def shades_of(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean(axis=(1, 2, 3)) / 6).astype(int).tolist()


def test_every_frame_is_read_by_default(gray_ramp: Path) -> None:
    frames, metadata = read_video(gray_ramp)
    assert frames.shape == (40, 64, 64, 3) and frames.dtype == np.uint8
    assert shades_of(frames) == list(range(40))
    assert (metadata.fps, metadata.total_num_frames, metadata.duration) == (8, 40, 5)


@pytest.mark.parametrize(
    ("fps", "max_frames", "kept"),
    [
        (2, None, list(range(0, 40, 4))),
        (4, None, list(range(0, 40, 2))),
        (100, None, list(range(40))),
        (None, 8, list(range(0, 40, 5))),
        (2, 5, [0, 8, 16, 24, 32]),
        (None, 1, [0]),
        (0.01, None, [0]),
    ],
)
def test_sampling_is_even(gray_ramp: Path, fps: float | None, max_frames: int | None, kept: list[int]) -> None:
    frames, metadata = read_video(gray_ramp, fps, max_frames)
    assert shades_of(frames) == kept == list(metadata.frames_indices)


@pytest.mark.parametrize("arguments", [{"fps": 0}, {"fps": -1.0}, {"max_frames": 0}])
def test_senseless_sampling_is_refused(gray_ramp: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        read_video(gray_ramp, **arguments)


def write_nothing(path: Path, video_bytes: bytes) -> None:
    pass


def write_empty(path: Path, video_bytes: bytes) -> None:
    path.touch()


def write_text(path: Path, video_bytes: bytes) -> None:
    path.write_text("this is not a video " * 50)


def write_start_only(path: Path, video_bytes: bytes) -> None:
    path.write_bytes(video_bytes[: len(video_bytes) // 2])


def write_without_frame_data(path: Path, video_bytes: bytes) -> None:
    """A file whose index, moved to the front as for streaming, announces 40 frames, with half of the data missing."""
    import av

    whole = path.with_name("whole.mp4")
    whole.write_bytes(video_bytes)
    streamable = path.with_name("streamable.mp4")
    with av.open(str(whole)) as source, av.open(str(streamable), "w", options={"movflags": "faststart"}) as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    path.write_bytes(streamable.read_bytes()[: int(0.6 * streamable.stat().st_size)])


def write_sound_only(path: Path, video_bytes: bytes) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_no_frames(path: Path, video_bytes: bytes) -> None:
    write_mp4(path, np.zeros((0, 64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "write",
    [
        write_nothing,
        write_empty,
        write_text,
        write_start_only,
        write_without_frame_data,
        write_sound_only,
        write_no_frames,
    ],
)
def test_the_error_of_an_unreadable_file_names_it_and_what_to_do(gray_ramp: Path, tmp_path: Path, write: Any) -> None:
    path = tmp_path / "broken.mp4"
    write(path, gray_ramp.read_bytes())
    with pytest.raises(VideoError, match=r"(Check|Record|Download|Re-encode|re-encode)") as caught:
        read_video(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["movie.nfo", "notes.txt", "notes"])
def test_a_text_is_no_video(tmp_path: Path, name: str) -> None:
    """FFmpeg would make pictures of its letters."""
    (tmp_path / name).write_text("The description of a movie.\n" * 20)
    with pytest.raises(VideoError, match=rf"{name} (is a text, not|cannot be read as) a video"):
        read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["av", "torchvision"])
def test_a_missing_dependency_names_the_install_line(
    gray_ramp: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None if package == name else find_spec(package))
    with pytest.raises(MissingDependencyError, match=rf'needs {name}, .* pip install "\.\[video\]"'):
        read_video(gray_ramp)


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "describe this video in detail ."}]}]


def count(processor: Qwen2_5_VLProcessor, inputs: Any) -> tuple[int, int]:
    ids = inputs["input_ids"]
    return int((ids == processor.video_token_id).sum()), int((ids == processor.image_token_id).sum())


def test_a_path_a_string_and_an_array_give_the_same_inputs(processor: Qwen2_5_VLProcessor, gray_ramp: Path) -> None:
    frames, _ = read_video(gray_ramp)
    expected = prepare_inputs(processor, ask({"type": "video", "video": str(gray_ramp)}))
    assert count(processor, expected) == (80, 0)
    assert expected["second_per_grid_ts"].tolist() == [0.25]
    for part in (
        {"type": "video", "video": gray_ramp},
        {"type": "video", "path": str(gray_ramp)},
        {"type": "video", "video": frames, "fps": 8},
        {"type": "video", "video": torch.from_numpy(frames), "fps": 8},
    ):
        inputs = prepare_inputs(processor, ask(part))
        assert inputs.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(inputs[name], value), name


def test_sampling_reaches_the_positions(processor: Qwen2_5_VLProcessor, gray_ramp: Path) -> None:
    inputs = prepare_inputs(processor, ask({"type": "video", "video": gray_ramp}), fps=2)
    assert count(processor, inputs) == (20, 0)
    assert inputs["second_per_grid_ts"].tolist() == [1.0]


def test_no_video_several_videos_and_images_work(processor: Qwen2_5_VLProcessor, tmp_path: Path) -> None:
    short, long = (make_clip(tmp_path / f"{tokens}.mp4", 1, tokens) for tokens in (32, 60))
    parts = [clip.messages[0]["content"][0] for clip in (short, long)]
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}

    assert count(processor, prepare_inputs(processor, ask())) == (0, 0)
    assert count(processor, prepare_inputs(processor, [{"role": "user", "content": "tell ."}])) == (0, 0)
    assert count(processor, prepare_inputs(processor, ask(*parts))) == (92, 0)
    both = prepare_inputs(processor, ask(parts[1], picture, parts[0]))
    assert count(processor, both) == (92, 4)
    assert both["video_grid_thw"].tolist() == [[15, 4, 4], [8, 4, 4]]
    assert both["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_the_generation_prompt_can_be_left_out(processor: Qwen2_5_VLProcessor) -> None:
    with_prompt = prepare_inputs(processor, ask())["input_ids"][0].tolist()
    without = prepare_inputs(processor, ask(), add_generation_prompt=False)["input_ids"][0].tolist()
    assert with_prompt[: len(without)] == without
    assert processor.tokenizer.convert_ids_to_tokens(with_prompt[len(without) :]) == ["<|im_start|>", "assistant"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video"},
        {"type": "video", "video": np.zeros((0, 64, 64, 3), np.uint8)},
        {"type": "video", "video": np.zeros((64, 64, 3), np.uint8)},
        {"type": "video", "video": np.zeros((4, 64, 64, 5), np.uint8)},
    ],
)
def test_a_malformed_video_part_is_refused(processor: Qwen2_5_VLProcessor, part: dict[str, Any]) -> None:
    with pytest.raises(VideoError, match="video"):
        prepare_inputs(processor, ask(part))
