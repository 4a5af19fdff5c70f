"""What a part of a message may hold: sources of every form, sampling, sizes. What it may not is said shortly."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from rows import ask, make_media, video
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from sparrow_hf.data import clean_messages, prepare_inputs, prepare_prompt, read_video
from sparrow_hf.errors import ImageError, SparrowError, TrainingDataError, VideoError
from sparrow_hf.testbed import FAMILIES
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.testbed.tokenizer import build_tokenizer
from sparrow_hf.training import SparrowDataCollator, media_keys


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


def turns(*parts: Any) -> list[dict[str, Any]]:
    return ask(*parts)["messages"][:1]


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def grid(processor: Any, part: dict[str, Any], kind: str = "video", **sampling: Any) -> list[int]:
    return prepare_inputs(processor, turns(part), **sampling)[f"{kind}_grid_thw"][0].tolist()


# -- sources ----------------------------------------------------------------------------------------------------------


def test_a_video_of_any_form_is_the_video(processor: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = folder / "1.mp4"
    data, text = clip.read_bytes(), base64.b64encode(clip.read_bytes()).decode()
    expected = prepare_inputs(processor, turns(video(str(clip))))
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a b%.mp4").write_bytes(data)
    for part in (
        video(clip),
        video("~/1.mp4"),
        video(f"file://{clip}"),
        video(f"FILE://localhost{clip}"),
        video(f"file:{clip}"),
        video(f"file://{quote(str(folder / 'a b%.mp4'))}"),
        video(f"file://{folder}/a b%.mp4"),
        video(bytearray(data)),
        video(memoryview(data)),
        video(f"data:video/mp4;base64,{text}"),
        video(f"data:;base64,{quote(text)}"),
        video(f"data:video/mp4,{quote(data)}"),
        video({"url": f"DATA:video/mp4;base64,{text}"}),
        {"type": "video", "base64": text},
        {"type": "video", "base64": base64.urlsafe_b64encode(data).decode().rstrip("=")},
        {"type": "video", "bytes": data},
        {"type": "video_url", "video_url": {"url": f"file://{clip}"}},
        {"type": "video_url", "video_url": str(clip)},
        {"type": "video", "video": {"path": None, "bytes": None}, "path": str(clip), "fps": None, "nframes": None},
    ):
        assert_same(prepare_inputs(processor, turns(part)), expected)


def test_frames_of_any_form_are_the_video(processor: Any, folder: Path, tmp_path: Path) -> None:
    frames = read_video(folder / "1.mp4", max_frames=4)[0]
    expected = prepare_inputs(processor, turns(video(frames) | {"fps": 4}))
    pictures = [Image.fromarray(frame) for frame in frames]
    files = []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        files.append(f"{number}.png")
    stored = [{"path": None, "bytes": (tmp_path / name).read_bytes()} for name in files]
    forms = [
        torch.from_numpy(frames),
        torch.from_numpy(frames).movedim(-1, 1),
        frames.tolist(),
        pictures,
        tuple(pictures),
        [torch.from_numpy(frame) for frame in frames],
        files,
        [f"file://{tmp_path / name}" for name in files],
        stored,
    ]
    for form in forms:
        for rate in ({"fps": 4}, {"sample_fps": 4.0}):
            row = ask(video(form) | rate) | {"row_folder": str(tmp_path)}
            assert_same(prepare_prompt(processor, row), expected)
    assert media_keys(ask(video(files)) | {"row_folder": str(tmp_path)}) == {str(tmp_path / name) for name in files}
    floats = torch.from_numpy(frames).to(torch.bfloat16)
    assert_same(
        prepare_inputs(processor, turns(video(floats))),
        prepare_inputs(processor, turns(video(frames.astype(np.float32)))),
    )


def test_an_image_of_any_form_is_the_image(processor: Any, folder: Path) -> None:
    path = folder / "picture.png"
    text = base64.b64encode(path.read_bytes()).decode()
    expected = prepare_inputs(processor, turns({"type": "image", "image": str(path)}))
    for part in (
        {"type": "image", "image": Image.open(path)},
        {"type": "image", "image": f"data:image/png;base64,{text}"},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": f"data:image;base64,{text}"}},
        {"type": "image_url", "image_url": {"url": f"data:image;base64,{text}", "detail": "auto"}},
        {"type": "image", "image": np.asarray(Image.open(path))},
        {"type": "image", "image": {"path": "gone.png", "bytes": path.read_bytes()}},
    ):
        assert_same(prepare_inputs(processor, turns(part)), expected)


PAYLOAD = base64.b64encode(np.random.default_rng(0).bytes(1500)).decode()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (video(f"data:video/mp4;base64,{PAYLOAD}"), "cannot be read as a video"),
        (video(f"data:video/mp4;base64,{PAYLOAD}!"), "base64 of a video cannot be decoded"),
        (video(f"data:video/mp4;base64{PAYLOAD}"), "needs a comma"),
        (video(PAYLOAD), "no video file at .*'base64'"),
        (video(PAYLOAD * 10), "which is no path: give base64 as 'base64'"),
        ({"type": "image", "image": PAYLOAD[:120]}, "no image file at .*'base64'"),
        ({"type": "image", "url": f"data:image/png;base64,{PAYLOAD}"}, "cannot be read as an image"),
        ({"type": "image", "image": b"this is text"}, "cannot be read as an image"),
        ({"type": "input_audio", "input_audio": {"data": PAYLOAD, "format": "wav"}}, "found type 'input_audio'"),
        ({"type": PAYLOAD}, "found type"),
        ({"type": ["video"], "video": PAYLOAD}, "found type a list of 1"),
        ({"video": PAYLOAD}, "found no type and the keys 'video'"),
        ({"type": "video", "vidoe": PAYLOAD}, "placeholder for video but no video"),
        ({"type": "video", "video": "a.mp4", "url": PAYLOAD}, "'video' and 'url' name several"),
        (video({"url": "a.mp4", "detail": PAYLOAD}), "found the keys 'url', 'detail'"),
        (video({"url": {"url": PAYLOAD}}), "must be a path"),
        (video(3), "must be a path, .* found 3"),
        (video(True), "must be a path, .* found True"),
        (video(Image.new("RGB", (8, 8))), "must be a path, .* found a Image"),
        (video(""), "empty text"),
        (video([]), "empty list"),
        (video(()), "empty list"),
        (video([[1, 2], [3]]), "nested lists of different lengths"),
        (video([[PAYLOAD]]), "something else than numbers"),
        (video(["1.mp4", ["2.mp4"]]), "a list of 1"),
        (video([np.zeros((4, 4, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)]), "must be of one size"),
        (video([__file__]), "cannot be read as an image"),
        (video(np.zeros((3, 4))), "got shape"),
        ({"type": "image", "image": np.zeros((2, 2, 2, 3))}, "2 or 3 dimensions"),
        (video("s3://bucket/clip.mp4"), "cannot be opened"),
        (video("file://clips/1.mp4"), "names no file of this machine"),
        (video("clip\0.mp4"), "which is no path"),
        (video("a" * 300), "no video file at"),
        ({"type": "text", "text": PAYLOAD, "cache_control": {"type": "ephemeral"}}, "has no 'cache_control'"),
        ({"type": "text"}, "needs a 'text', found None"),
        ({"type": "text", "text": 3}, "needs a 'text', found 3"),
    ],
)
def test_no_error_holds_a_payload(processor: Any, part: Any, reason: str) -> None:
    with pytest.raises(SparrowError, match=reason) as caught:
        prepare_inputs(processor, turns(part))
    for message in (str(caught.value), str(caught.value.__cause__)):
        assert PAYLOAD[:24] not in message and len(message) < 600
    # In a row it is the row's fault, and obeys `on_bad_row`.
    batch = SparrowDataCollator(processor, on_bad_row="skip")([ask(part) | {"row_index": 5}, ask()])
    ((index, said),) = batch["skipped"]
    assert index == 5 and said.startswith("row 5: ") and PAYLOAD[:24] not in said and len(batch["samples"]) == 1


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_a_part_is_sampled_as_it_says(processor: Any, folder: Path) -> None:
    clip = str(folder / "2.mp4")
    for own, sampling in (
        ({"fps": 2.0}, {"fps": 2}),
        ({"fps": np.float32(2)}, {"fps": 2}),
        ({"nframes": 4}, {"num_frames": 4}),
        ({"num_frames": 4.0}, {"num_frames": 4}),
        ({"max_frames": 6}, {"max_frames": 6}),
        ({"fps": 1, "min_frames": 8}, {"fps": 1, "min_frames": 8}),
        ({"video_start": 0.5, "video_end": 1.5}, {"start": 0.5, "end": 1.5}),
    ):
        frames, metadata = read_video(clip, **sampling)
        found = prepare_inputs(processor, turns(video(clip) | own))
        expected = processor(
            text=processor.apply_chat_template(turns({"type": "video"}), add_generation_prompt=True),
            videos=[frames],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert_same(found, expected)
        assert found["video_grid_thw"][0, 0] == -(-len(frames) // 2) < 12


def test_a_parts_own_sampling_goes_before_the_rows_and_the_options(processor: Any, folder: Path) -> None:
    clip = video(str(folder / "2.mp4"))
    assert len(read_video(folder / "2.mp4")[0]) == 12
    assert grid(processor, clip)[0] == 6
    assert grid(processor, clip, fps=2)[0] == 2
    assert grid(processor, clip | {"fps": 4}, fps=2)[0] == 3
    assert grid(processor, clip | {"num_frames": 10}, fps=2, max_frames=4)[0] == 5
    assert grid(processor, clip | {"fps": 8}, max_frames=4)[0] == 2
    assert grid(processor, clip | {"min_frames": 8}, fps=2, max_frames=4)[0] == 4
    row = ask(clip, clip | {"nframes": 2}) | {"fps": 4}
    assert prepare_prompt(processor, row, fps=2)["video_grid_thw"][:, 0].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"max_frame": 4}, "has no 'max_frame': did you mean 'max_frames'"),
        ({"frames_upbound": 4}, "has no 'frames_upbound': it takes video"),
        ({"fps": 0}, "'fps' must be a positive number, found 0"),
        ({"fps": "2"}, "'fps' must be a positive number, found '2'"),
        ({"fps": True}, "found True"),
        ({"fps": float("nan")}, "found nan"),
        ({"fps": float("inf")}, "found inf"),
        ({"fps": 10**5000}, "found a huge number"),
        ({"fps": [2]}, "found a list of 1"),
        ({"nframes": 4.5}, "'nframes' must be a positive number, and a whole one"),
        ({"max_frames": 0}, "'max_frames' must be"),
        ({"nframes": 4, "num_frames": 4}, "'num_frames' is set twice"),
        ({"nframes": 4, "fps": 2}, "'num_frames' leaves 'fps' without effect"),
        ({"min_frames": 8, "max_frames": 4}, r"'min_frames' \(8\) is above"),
        ({"video_start": -1}, "'video_start' must be a time in seconds"),
        ({"video_start": 2, "video_end": 1}, "must be behind 'video_start'"),
        ({"video_start": 100}, "shows nothing after 100 s"),
        ({"min_pixels": 100, "max_pixels": 50}, r"'min_pixels' \(100\) is above"),
        ({"resized_height": 64}, "set both or none"),
        ({"resized_height": 64, "resized_width": 64, "max_pixels": 64}, "without effect"),
        ({"resized_height": 64.5, "resized_width": 64}, "'resized_height' must be a whole number"),
        ({"total_pixels": 0}, "'total_pixels' must be"),
        ({"resized_height": 64_000, "resized_width": 64}, "aspect ratio"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(
    processor: Any, folder: Path, own: dict[str, Any], reason: str
) -> None:
    part = video(str(folder / "1.mp4")) | own
    with pytest.raises((TrainingDataError, VideoError), match=reason):
        prepare_inputs(processor, turns(part))


def test_settings_without_effect_are_refused(processor: Any, folder: Path) -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    for name in ("max_frames", "nframes", "video_start"):
        with pytest.raises(TrainingDataError, match="frames that are given one by one are all shown"):
            prepare_inputs(processor, turns(video(frames) | {name: 2}))
    with pytest.raises(TrainingDataError, match="has no 'fps'"):
        prepare_inputs(processor, turns({"type": "image", "image": str(folder / "picture.png"), "fps": 2}))
    assert grid(processor, video(frames) | {"fps": None, "max_frames": None}) == [2, 4, 4]


# -- sizes ------------------------------------------------------------------------------------------------------------

FACTOR = 32


@pytest.mark.parametrize(
    ("own", "size"),
    [
        ({}, (64, 64)),
        ({"max_pixels": 64 * 64}, (64, 64)),
        ({"max_pixels": 3000}, smart_resize(64, 64, FACTOR, 1, 3000)),
        ({"min_pixels": 10_000}, smart_resize(64, 64, FACTOR, 10_000, 10_500)),
        ({"min_pixels": 1000, "max_pixels": 2000}, smart_resize(64, 64, FACTOR, 1000, 2000)),
        ({"total_pixels": 4 * 2000}, smart_resize(64, 64, FACTOR, 1, 2000)),
        ({"total_pixels": 10**9}, (64, 64)),
        ({"resized_height": 90, "resized_width": 130}, (96, 128)),
    ],
)
def test_frames_have_the_size_that_their_part_asks_for(
    processor: Any, folder: Path, own: dict[str, Any], size: tuple[int, int]
) -> None:
    part = video(str(folder / "1.mp4")) | own
    rows, columns = (side // 16 for side in size)
    assert grid(processor, part)[1:] == [rows, columns]
    frames = read_video(folder / "1.mp4")[0]
    assert grid(processor, video(frames) | own)[1:] == [rows, columns]
    plain = {name: part[name] for name in ("type", "video")}
    if size == (64, 64):
        assert_same(prepare_inputs(processor, turns(part)), prepare_inputs(processor, turns(plain)))
    # One that asks for nothing keeps its size beside one that does.
    both = prepare_inputs(processor, turns(part, plain, {"type": "image", "image": str(folder / "picture.png")}))
    assert both["video_grid_thw"][:, 1:].tolist() == [[rows, columns], [4, 4]]
    alone = prepare_inputs(processor, turns(plain))["pixel_values_videos"]
    assert torch.equal(both["pixel_values_videos"][-len(alone) :], alone)


def test_images_have_the_size_that_their_part_asks_for(processor: Any, folder: Path) -> None:
    part = {"type": "image", "image": str(folder / "picture.png")}
    usual = grid(processor, part, "image")
    assert grid(processor, part | {"max_pixels": 10**6}, "image")[1:] == [4, 4]
    assert grid(processor, part | {"max_pixels": 2000}, "image")[1:] == [2, 2]
    assert grid(processor, part | {"resized_height": 128, "resized_width": 64}, "image")[1:] == [8, 4]
    assert usual[0] == 1


def test_a_family_of_one_size_refuses_sizes_by_name(folder: Path) -> None:
    tokenizer = build_tokenizer()
    other = next(family.processor(tokenizer) for family in FAMILIES if "llava" in family.name)
    assert "pixel_values_videos" in prepare_inputs(other, turns(video(str(folder / "1.mp4")) | {"nframes": 2}))
    with pytest.raises(TrainingDataError, match="makes all videos one size: leave out 'max_pixels'"):
        prepare_inputs(other, turns(video(str(folder / "1.mp4")) | {"max_pixels": 5000}))


# -- the target's template --------------------------------------------------------------------------------------------


def test_media_that_the_template_leaves_out_are_refused(folder: Path) -> None:
    processor = build_processor()
    seen = turns(video(str(folder / "1.mp4")))
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(SparrowError, match="cannot take .*number of videos"):
        prepare_inputs(processor, seen)
    processor.chat_template = "{{ raise_exception('no videos') }}"
    with pytest.raises(TrainingDataError, match="row 2: TemplateError: no videos"):
        SparrowDataCollator(processor)([{"messages": seen, "answer": "a dot", "row_index": 2}])


def test_the_targets_own_placeholder_is_no_text(processor: Any, folder: Path) -> None:
    for part in ({"type": "text", "text": "<|video_pad|>"}, video(str(folder / "1.mp4"))):
        with pytest.raises(TrainingDataError, match="places for videos"):
            prepare_inputs(processor, turns(part, {"type": "text", "text": "<|video_pad|> ?"}))


def test_later_turns_show_media_too(processor: Any, folder: Path) -> None:
    clip, picture = video(str(folder / "1.mp4")), {"type": "image", "image": str(folder / "picture.png")}
    told = [
        {"role": "system", "content": [{"type": "text", "text": "describe"}]},
        *turns(picture),
        {"role": "assistant", "content": "a dot"},
        {"role": "tool", "content": "a ring"},
        *turns(clip, clip | {"nframes": 2}),
    ]
    inputs = prepare_inputs(processor, told)
    assert inputs["video_grid_thw"][:, 0].tolist() == [4, 1] and len(inputs["image_grid_thw"]) == 1
    assert clean_messages({"messages": told}) == told[:-1] + [
        told[-1] | {"content": [clip, clip | {"num_frames": 2}, told[-1]["content"][-1]]}
    ]


def test_a_missing_source_is_an_error_of_its_kind(processor: Any) -> None:
    with pytest.raises(VideoError, match="placeholder for video"):
        prepare_inputs(processor, turns({"type": "video"}))
    with pytest.raises(ImageError, match="placeholder for image"):
        prepare_inputs(processor, turns({"type": "image_url", "image_url": {"url": None}}))
