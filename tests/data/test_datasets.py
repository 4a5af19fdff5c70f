"""Rows from every kind of file, by every form that `datasets` gives their media."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from rows import ANSWER, ask, make_media, video

from sparrow_hf.data import clean_messages, load_rows, prepare_conversation, prepare_inputs, read_image, read_video
from sparrow_hf.errors import ImageError, TrainingDataError, VideoError
from sparrow_hf.testbed.nano import build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips and a picture."""
    return make_media(tmp_path_factory.mktemp("media"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])) for name, value in first.items()
    )


def test_bytes_and_undecoded_datasets_columns_read_as_the_file_does(processor, folder):
    clip, picture = folder / "1.mp4", folder / "picture.png"
    expected = prepare_inputs(processor, ask(video(str(clip)), {"type": "image", "image": str(picture)})["messages"])
    for first, second in (
        (video(clip.read_bytes()), {"type": "image", "image": picture.read_bytes()}),
        (video({"path": str(clip), "bytes": None}), {"type": "image", "image": {"path": str(picture), "bytes": None}}),
        (video({"path": None, "bytes": clip.read_bytes()}), {"type": "image", "path": picture}),
        ({"type": "video", "video": None, "path": str(clip)}, {"type": "image", "image": Image.open(picture)}),
    ):
        assert same(prepare_inputs(processor, ask(first, second)["messages"]), expected)


@pytest.mark.parametrize("source", [b"", b"no video at all", "http://127.0.0.1:9/clip.mp4"])
def test_what_cannot_be_read_is_named(source):
    with pytest.raises(VideoError):
        read_video(source)
    with pytest.raises(ImageError):
        read_image(source)
    with pytest.raises(ImageError, match=r"no image file at .*missing\.png"):
        read_image("missing.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "folder", "parquet", "disk", "splits"])
def test_every_source_gives_the_same_rows(tmp_path, folder, processor, kind, streaming):
    parts = video("../media.mp4"), {"type": "image", "image": "../picture.png"}
    (tmp_path / "media.mp4").write_bytes((folder / "1.mp4").read_bytes())
    (tmp_path / "picture.png").write_bytes((folder / "picture.png").read_bytes())
    text = {"messages": [{"role": "user", "content": "what ?"}, ANSWER]}
    rows = [ask(*parts) | {"id": 2}, text | {"id": 3}]
    place = tmp_path / "rows"
    place.mkdir()
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    if kind in ("jsonl", "folder"):
        source = write_jsonl(place / "rows.jsonl", rows)
        source = place if kind == "folder" else source
    elif kind == "parquet":
        source = place / "rows.parquet"
        table.to_parquet(str(source))
    else:
        source = place
        (datasets.DatasetDict({"train": table}) if kind == "splits" else table).save_to_disk(str(source))
    loaded = load_rows(source, streaming=streaming)
    found = list(loaded)
    assert [row["row_index"] for row in found] == [0, 1] and found[1]["id"] == 3
    expected = [ask(video(str(folder / "1.mp4")), {"type": "image", "image": str(folder / "picture.png")}), rows[1]]
    for first, second in zip(found, expected, strict=True):
        assert same(prepare_conversation(processor, first), prepare_conversation(processor, second))
    if not streaming:
        assert len(loaded) == 2 and loaded[-1]["row_index"] == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_slices_are_rows_with_their_places_in_the_dataset(tmp_path, kind):
    rows = [{"messages": [{"role": "user", "content": f"question {index}"}, ANSWER]} for index in range(5)]
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(source, rows)
    else:
        datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(str(source))
    loaded = load_rows(source)
    everything = list(loaded)
    for part, places in (
        (slice(2), [0, 1]),
        (slice(8), [0, 1, 2, 3, 4]),
        (slice(-2, None), [3, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(7, 9), []),
    ):
        found = loaded[part]
        assert found == everything[part] and [row["row_index"] for row in found] == places
        assert all(row["row_folder"] == str(tmp_path.resolve()) for row in found)


def test_video_columns_are_not_decoded_by_datasets(tmp_path, folder, processor):
    part = {
        "type": datasets.Value("string"),
        "text": datasets.Value("string"),
        "video": datasets.Video(),
        "image": datasets.Image(),
    }
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    written = {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]}
    image = {"type": "image", "image": str(folder / "picture.png")}
    row = ask(video((folder / "1.mp4").read_bytes()), image, answer=written)
    features = datasets.Features({"messages": datasets.List(turn)})
    datasets.Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "rows"))
    before = {path.name for path in (tmp_path / "rows").iterdir()}
    (found,) = load_rows(tmp_path / "rows")
    # Nor are they copied.
    assert {path.name for path in (tmp_path / "rows").iterdir()} == before
    (streamed,) = load_rows(tmp_path / "rows", streaming=True)
    assert streamed == found
    parts = found["messages"][0]["content"]
    # What Arrow filled in must not reach a chat template, which takes a key for its presence.
    assert parts[2]["video"] is None and clean_messages(found)[0]["content"][2] == {"type": "text", "text": "what ?"}
    assert same(prepare_conversation(processor, found), prepare_conversation(processor, row))


def test_missing_files_are_reported(tmp_path):
    for source in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(TrainingDataError, match="no rows can be read"):
            load_rows(source)
    with pytest.raises(TrainingDataError, match="column 'messages'; it has text"):
        load_rows(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]))
    with pytest.raises(TrainingDataError, match="'test'"):
        load_rows(tmp_path / "a.jsonl", split="test")
