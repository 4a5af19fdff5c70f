"""Public data sets from small local copies of the same schema; other rows through `load_rows`."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from sparrow_hf.draft_inputs import visual_mask
from sparrow_hf.errors import BenchmarkError, TrainingDataError
from sparrow_hf.evaluation.prompts import conversation_prompts, read_conversations
from sparrow_hf.evaluation.video_datasets import EXPLAIN, read_dataset
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.testbed.world import make_clip


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return str(path.absolute())


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def asked(row: dict[str, Any]) -> tuple[str, str]:
    """Video and question of a row."""
    [turn] = row["messages"]
    video, text = turn["content"]
    return video["video"], text["text"]


def test_video_detail_caption(tmp_path: Path):
    row = {"video_name": "v_abc", "question": "Describe the video."}
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row, row | {"video_name": "v_gone"}])
    path = touch(tmp_path / "Test_Videos" / "v_abc.mkv")
    rows, missing = read_dataset("videodetailcaption", tmp_path)
    assert [asked(row) for row in rows] == [(path, "Describe the video.")]
    assert missing == ["v_gone"]


def test_mvbench_distinguishes_videos_of_one_name(tmp_path: Path):
    row = {"video": "video_1.mp4", "question": "How many?", "candidates": ["1", "2"], "answer": "2"}
    write_json(tmp_path / "json" / "moving_count.json", [row])
    write_json(tmp_path / "json" / "action_count.json", [row])
    write_json(tmp_path / "json" / "action_antonym.json", [row | {"video": "9.webm"}])
    clevrer = touch(tmp_path / "video" / "data0613" / "clevrer" / "video_validation" / "video_1.mp4")
    perception = touch(tmp_path / "video" / "perception" / "videos" / "video_1.mp4")
    something = touch(tmp_path / "video" / "ssv2_video_mp4" / "9.webm")
    rows, missing = read_dataset("mvbench", tmp_path)
    assert {asked(row)[0] for row in rows} == {clevrer, perception, something}
    assert asked(rows[0])[1] == f"How many?\n(A) 1\n(B) 2\n{EXPLAIN}"
    assert not missing


def test_mvbench_asks_about_a_part_of_the_video(tmp_path: Path):
    row = {"video": "1.mp4", "question": "What next?", "candidates": ["a", "b"], "answer": "a"}
    windows = [{"start": 0.25, "end": 0.75}, {"start": 0.5}, {"start": None, "end": None}, {}]
    write_json(tmp_path / "action_sequence.json", [row | window for window in windows])
    make_clip(tmp_path / "star" / "1.mp4", 1, 32)
    rows = read_conversations(f"mvbench:{tmp_path}").rows
    told = [{name: row["messages"][0]["content"][0].get(f"video_{name}") for name in ("start", "end")} for row in rows]
    assert told == [{"start": None, "end": None} | window for window in windows]
    processor = build_processor()
    prompts = conversation_prompts(processor, rows)
    counts = [int(visual_mask(prompt.read()["input_ids"], [processor.video_token_id]).sum()) for prompt in prompts]
    assert counts[0] < counts[1] < counts[2] == counts[3]
    assert len({prompt.name.split(", ")[1] for prompt in prompts}) == 3


def test_long_video_bench(tmp_path: Path):
    row = {
        "video_id": "x", "id": "x_0", "video_path": "x.mp4", "subtitle_path": "x_en.json", "question": "What next?",
        "option0": "rain", "option1": "sun", "option2": "N/A", "option3": "N/A", "option4": "N/A", "correct_choice": 1,
        "duration": 8.0, "duration_group": 15, "question_category": "T3E", "topic_category": "NP",
        "starting_timestamp_for_subtitles": 0.0,
    }  # fmt: skip
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [row])
    path = touch(tmp_path / "videos" / "x.mp4")
    [row] = read_dataset("longvideobench", tmp_path).rows
    assert asked(row) == (path, f"What next?\n(A) rain\n(B) sun\n{EXPLAIN}")


def test_videos_may_be_links(tmp_path: Path):
    copy = tmp_path / "copy"
    write_json(copy / "1_plotQA.json", [{"video": "1.mp4", "question": "Who?", "candidates": ["a"]}])
    (copy / "1_plotQA").mkdir()
    (copy / "1_plotQA" / "1.mp4").symlink_to(touch(tmp_path / "cache" / "blob"))
    [row] = read_dataset("mlvu", copy).rows
    assert asked(row)[0] == str(copy / "1_plotQA" / "1.mp4")


def test_mlvu_asks_for_choices_and_for_summaries(tmp_path: Path):
    choice = {"video": "1.mp4", "duration": 9.0, "question": "Who?", "candidates": ["a", "b"], "answer": "b",
              "question_type": "plotQA"}  # fmt: skip
    summary = {"video": "1.mp4", "duration": 9.0, "question": "Sum it up.", "answer": "It ends.",
               "question_type": "summary"}  # fmt: skip
    write_json(tmp_path / "MLVU" / "json" / "1_plotQA.json", [choice])
    write_json(tmp_path / "MLVU" / "json" / "9_summary.json", [summary])
    first, last = (touch(tmp_path / "MLVU" / "video" / task / "1.mp4") for task in ("1_plotQA", "9_summary"))
    rows, _ = read_dataset("mlvu", tmp_path)
    assert [asked(row) for row in rows] == [(first, f"Who?\n(A) a\n(B) b\n{EXPLAIN}"), (last, "Sum it up.")]
    assert [row["task"] for row in rows] == ["1_plotQA", "9_summary"]


def test_a_wrong_copy_is_reported(tmp_path: Path):
    with pytest.raises(BenchmarkError, match="unknown data set 'imagenet'"):
        read_dataset("imagenet", tmp_path)
    with pytest.raises(BenchmarkError, match="download MLVU/MVLU"):
        read_dataset("mlvu", tmp_path / "nowhere")
    with pytest.raises(BenchmarkError, match=r"1_plotQA\.json, 2_needle\.json"):
        read_dataset("mlvu", tmp_path)
    write_json(tmp_path / "1_plotQA.json", [{"clip": "1.mp4", "question": "Who?"}])
    with pytest.raises(BenchmarkError, match=r"not of MLVU/MVLU's schema .*it has clip, question"):
        read_dataset("mlvu", tmp_path)
    (tmp_path / "1_plotQA.json").write_text("{")
    with pytest.raises(BenchmarkError, match="is not JSON"):
        read_dataset("mlvu", tmp_path)
    # What is left of a large file where git has not fetched it.
    (tmp_path / "validation-00000-of-00001.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BenchmarkError, match="is not Parquet"):
        read_dataset("longvideobench", tmp_path)


def test_a_limit_takes_from_everywhere_and_keeps_the_numbers(tmp_path: Path):
    row = {"video": "1.mp4", "duration": 9.0, "candidates": ["a"], "answer": "a", "question_type": "plotQA"}
    write_json(tmp_path / "1_plotQA.json", [row | {"question": str(index)} for index in range(6)])
    touch(tmp_path / "1_plotQA" / "1.mp4")
    rows, _ = read_conversations(f"mlvu:{tmp_path}", limit=3)
    assert [(row["row_index"], asked(row)[1][0]) for row in rows] == [(0, "0"), (2, "2"), (4, "4")]


def test_rows_of_messages_become_prompts_of_each_length(tmp_path: Path):
    make_clip(tmp_path / "clip.mp4", 1, 32)
    turn = {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what ?"}]}
    answered = [turn, {"role": "assistant", "content": "a dot"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in ([turn], answered, [turn])))
    rows, missing = read_conversations(str(path), limit=2)
    # The answer is the target's to write.
    assert [len(row["messages"]) for row in rows] == [1, 1] and not missing
    processor = build_processor()
    prompts = conversation_prompts(processor, rows, max_frames=[8, 4])
    assert [(prompt.name.split(",")[0], prompt.length) for prompt in prompts] == [
        ("row 0", 4), ("row 1", 4), ("row 0", 8), ("row 1", 8)
    ]  # fmt: skip
    counts = [int(visual_mask(prompt.read()["input_ids"], [processor.video_token_id]).sum()) for prompt in prompts]
    assert counts == [8, 8, 16, 16]
    assert [prompt.length for prompt in conversation_prompts(processor, rows)] == [None, None]

    # Another question under an old number is a new prompt.
    rows[0]["messages"][0]["content"][1]["text"] = "where ?"
    changed = conversation_prompts(processor, rows, max_frames=[8, 4])
    assert [new.name == old.name for new, old in zip(changed, prompts, strict=True)] == [False, True, False, True]
    # So is another video: files count by their paths, and videos in memory by their content.
    names = set()
    for shown in (b"a", b"b", Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "red"), np.zeros((1, 2, 2, 3))):
        rows[0]["messages"][0]["content"][0] = {"type": "image", "image": shown}
        names.add(conversation_prompts(processor, rows[:1])[0].name)
    assert len(names) == 5

    path.write_text(json.dumps({"messages": answered[1:]}) + "\n")
    with pytest.raises(TrainingDataError, match="row 0: all its turns are answers"):
        read_conversations(str(path))


def test_a_row_with_its_own_max_frames_is_used_once_with_it(tmp_path: Path):
    make_clip(tmp_path / "clip.mp4", 1, 32)
    turn = {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what ?"}]}
    rows = [{"messages": [turn]}, {"messages": [turn], "max_frames": 6}, {"messages": [turn], "fps": 2}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = build_processor()

    def asked(*max_frames: int) -> list[tuple[str, int | None, int]]:
        prompts = conversation_prompts(processor, read_conversations(str(path)).rows, max_frames)
        counts = (visual_mask(prompt.read()["input_ids"], [processor.video_token_id]).sum() for prompt in prompts)
        return [(prompt.name[:5], prompt.length, int(count)) for prompt, count in zip(prompts, counts, strict=True)]

    by_length = [("row 0", 4, 8), ("row 2", 4, 8), ("row 1", 6, 12), ("row 0", 8, 16), ("row 2", 8, 8)]
    assert asked(8, 4) == by_length
    assert asked() == [("row 1", 6, 12), ("row 0", None, 32), ("row 2", None, 8)]
    # The same question with other frames is another one.
    names = {prompt.name for prompt in conversation_prompts(processor, read_conversations(str(path)).rows)}
    assert len({name.split(", ")[1] for name in names}) == 3

    path.write_text(json.dumps({"messages": [turn], "fps": "2"}) + "\n")
    with pytest.raises(TrainingDataError, match="row 0: the row's 'fps' must be a positive number"):
        conversation_prompts(processor, read_conversations(str(path)).rows)
