"""Rows from every kind of file, in every family's processor; bad ones are named, and never trained on."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sparrow_hf.data import clean_messages
from sparrow_hf.errors import ImageError, TrainingDataError, VideoError
from sparrow_hf.rows import visual_mask
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.training import (
    SparrowDataCollator,
    SparrowTrainer,
    SparrowTrainingArguments,
    load_rows,
)
from sparrow_hf.video import prepare_inputs, read_image, read_video

from families import FAMILY_BY_NAME

ANSWER = {"role": "assistant", "content": "a dot"}


def ask(*parts: dict[str, Any], answer: dict[str, Any] = ANSWER) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]}, answer]}


def video(source: Any) -> dict[str, Any]:
    return {"type": "video", "video": source}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips and a picture."""
    folder = tmp_path_factory.mktemp("media")
    for seed, tokens in ((1, 16), (2, 24)):
        make_clip(folder / f"{seed}.mp4", seed, tokens)
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def collate(processor):
    ids = [processor.video_token_id, processor.image_token_id]
    return lambda **options: SparrowDataCollator(processor, ids, **options)


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
def test_every_source_gives_the_same_rows(tmp_path, folder, collate, kind, streaming):
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
    for first, second in zip(collate()(found)["samples"], collate()(expected)["samples"], strict=True):
        assert same(first, second)
    if not streaming:
        assert len(loaded) == 2 and loaded[-1]["row_index"] == 1


def test_video_columns_are_not_decoded_by_datasets(tmp_path, folder, collate):
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
    (found,) = load_rows(tmp_path / "rows")
    parts = found["messages"][0]["content"]
    # What Arrow filled in must not reach a chat template, which takes a key for its presence.
    assert parts[2]["video"] is None and clean_messages(found)[0]["content"][2] == {"type": "text", "text": "what ?"}
    assert same(collate().prepare(found), collate().prepare(row))


def test_what_is_not_there_is_said(tmp_path):
    for source in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(TrainingDataError, match="no rows can be read"):
            load_rows(source)
    with pytest.raises(TrainingDataError, match="column 'messages'; it has text"):
        load_rows(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]))
    with pytest.raises(TrainingDataError, match="'test'"):
        load_rows(tmp_path / "a.jsonl", split="test")


BAD_ROWS = {
    "no messages": ({"messages": []}, "'messages' must be a list of turns"),
    "no role": ({"messages": [{"content": "x"}]}, "needs a 'role'"),
    "unknown part": (ask({"type": "audio", "audio": "a.wav"}), "a part must be"),
    "no source": (ask({"type": "video"}), "placeholder for video but no video"),
    "missing video": (ask(video("nowhere.mp4")), "no video file"),
    "empty video": (ask(video(b"")), "empty file"),
    "damaged video": (ask(video(b"no video")), "cannot be read as a video"),
    "missing image": (ask({"type": "image", "image": "nowhere.png"}), "no image file"),
    "no pixels": (ask({"type": "text", "text": "<|video_pad|>"}), ""),
    "no answer": ({"messages": ask()["messages"][:1]}, "no answer"),
    "short answer": (ask() | {"answer_ids": [5]}, "at least 2 tokens"),
    "visual answer": (ask(answer={"role": "assistant", "content": "<|video_pad|> dot"}), "placeholders"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_index_or_left_out(tmp_path, collate, name):
    bad, reason = BAD_ROWS[name]
    good = ask()
    rows = [good | {"row_index": 6}, bad | {"row_index": 7}, good | {"row_index": 8}]
    with pytest.raises(TrainingDataError, match=f"row 7: .*{reason}"):
        collate()(rows)
    batch = collate(on_bad_row="skip")(rows)
    assert len(batch["samples"]) == 2
    ((index, said),) = batch["skipped"]
    assert index == 7 and reason in said


def test_pixels_are_missing_also_where_the_processor_does_not_notice(collate, processor):
    sample = collate().prepare(ask())
    sample["input_ids"][0, 1] = processor.video_token_id
    with pytest.raises(TrainingDataError, match="row 4: .*no pixel values"):
        collate()([sample | {"row_index": 4}])


def test_skipped_rows_are_reported_and_never_trained_on(tmp_path, target, make_draft, samples, caplog):
    def train(rows, **settings):
        draft = make_draft()
        args = SparrowTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            per_device_train_batch_size=1, max_steps=4, num_visual_rows_max=4, logging_steps=1, **settings,
        )  # fmt: skip
        trainer = SparrowTrainer(draft, target, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return trainer

    length = samples[0]["input_ids"].shape[1]
    bad = [samples[0] | {"answer_start": length - 1, "row_index": index} for index in range(2)]
    with pytest.raises(TrainingDataError, match="row [01]: "):
        train([*samples[:2], *bad])
    trainer = train([*samples[:2], *bad], on_bad_row="skip")
    assert {index for index, _ in trainer.skipped_rows} == {0, 1}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]
    assert trainer.evaluate()["eval_tau"] >= 1
    trainer = train(bad, on_bad_row="skip")
    for name, tensor in make_draft().state_dict().items():
        assert torch.equal(tensor, trainer.draft.state_dict()[name]), name


def test_rows_say_how_densely_their_videos_are_read(collate, folder):
    row = ask(video(str(folder / "2.mp4")))

    def steps(collator, **fields):
        return int(collator.prepare(row | fields)["video_grid_thw"][0, 0])

    assert (steps(collate()), steps(collate(max_frames=4)), steps(collate(max_frames=4), max_frames=8)) == (6, 2, 4)
    assert steps(collate(), fps=4) == 3


CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] %}{% if 'video' in part %}VIDEO{% elif 'image' in part %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_videos_images_and_text_turns_in_one_row_of_every_family(family, folder):
    processor = family.processor(family.tokenizer)
    processor.chat_template = CHAT_TEMPLATE.replace("VIDEO", family.video_prompt).replace("IMAGE", family.image_prompt)
    collator = SparrowDataCollator(processor, family.visual_token_ids, max_frames=4)
    clips = [video(str(folder / f"{seed}.mp4")) for seed in (1, 2)]
    image = {"type": "image", "image": str(folder / "picture.png")}
    rest = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and ?"}, ANSWER]

    def visual_tokens(*parts):
        row = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]}, *rest]}
        sample = collator.prepare(row)
        return int(visual_mask(sample["input_ids"], family.visual_token_ids).sum())

    one, picture = visual_tokens(clips[0]), visual_tokens(image)
    assert visual_tokens() == 0 and one > 0 and picture > 0
    assert visual_tokens(*clips) == 2 * one
    assert visual_tokens(image, image) == 2 * picture
    if family.mixes_modalities:
        assert visual_tokens(clips[0], image, clips[1]) == 2 * one + picture


def test_videos_of_different_lengths_say_what_to_do(folder):
    family = FAMILY_BY_NAME["llava_onevision"]
    processor = family.processor(family.tokenizer)
    processor.chat_template = CHAT_TEMPLATE.replace("VIDEO", family.video_prompt)
    row = ask(video(str(folder / "1.mp4")), video(str(folder / "2.mp4")))
    with pytest.raises(TrainingDataError, match="different shapes .* max_frames"):
        SparrowDataCollator(processor, family.visual_token_ids).prepare(row)
