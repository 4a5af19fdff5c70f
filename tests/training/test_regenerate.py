"""The target's own answers: batched as alone, resumed as whole, and ready to train on."""

import contextlib
import errno
import hashlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kills import die, files_of, kill_this_process

from sparrow_hf import SparrowDraftModel
from sparrow_hf.cli.regenerate import regenerate as regenerate_command
from sparrow_hf.data.answers import digests_of, read_answers, read_skipped
from sparrow_hf.data.prepare import prepare_prompt
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed import LLAVA_ONEVISION
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.training import SparrowDataCollator, load_rows, media_keys
from sparrow_hf.training import regenerate as regenerating
from sparrow_hf.training.batched_answers import left_pad
from sparrow_hf.training.regenerate import estimate_answer_bytes, regenerate
from sparrow_hf.video import prepare_inputs

SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 2, "do_sample": True}


def test_the_command_writes_files_of_the_same_size():
    command, function = (inspect.signature(each).parameters for each in (regenerate_command, regenerate))
    for name in ("shard_size", "batch_size", "max_new_tokens", "seed"):
        assert command[name].default == function[name].default, name


def test_a_resumed_run_writes_what_the_whole_one_would(tmp_path, nano, processor, rows):
    whole = regenerate(nano, processor, rows, tmp_path / "a", shard_size=2, **SETTINGS)
    assert [path.name for path in whole] == [f"answers-0000{number}.jsonl" for number in range(3)]
    resumed = regenerate(nano, processor, rows, tmp_path / "b", shard_size=2, **SETTINGS)
    kept = resumed[0].stat().st_mtime_ns
    resumed[1].unlink()
    regenerate(nano, processor, rows, tmp_path / "b", shard_size=2, **SETTINGS)
    assert resumed[0].stat().st_mtime_ns == kept
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in resumed]
    assert not list(tmp_path.rglob("*.partial"))
    provenance = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert provenance["settings"] == SETTINGS
    with pytest.raises(TrainingDataError, match="seed: 0, now 1"):
        regenerate(nano, processor, rows, tmp_path / "b", shard_size=2, seed=1, **SETTINGS)


def test_answers_are_ready_to_train_on(tmp_path, nano, processor, rows):
    regenerate(nano, processor, rows, tmp_path, **SETTINGS)
    answered = list(read_answers(tmp_path))
    assert [row.get("id") for row in answered] == [0, 1, None, None, None]
    assert [len(row["messages"]) for row in answered] == [1] * 5
    samples = SparrowDataCollator(processor)([answered[0]])["samples"]
    sample, answer = samples[0], answered[0]["answer_ids"]
    assert sample["input_ids"][0, sample["answer_start"] :].tolist() == answer
    prompt = prepare_inputs(processor, rows[0]["messages"])
    assert torch.equal(sample["input_ids"][:, : sample["answer_start"]], prompt["input_ids"])
    assert sample["attention_mask"].shape == sample["mm_token_type_ids"].shape == sample["input_ids"].shape
    assert sample["attention_mask"].all() and not sample["mm_token_type_ids"][0, sample["answer_start"] :].any()


def test_answers_may_be_text_or_the_last_turn(processor):
    collate = SparrowDataCollator(processor)
    turns = [
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]},
    ]
    spoken, written = collate([{"messages": turns}, {"messages": turns[:1], "answer": "a dot"}])["samples"]
    assert torch.equal(spoken["input_ids"], written["input_ids"])
    answer = spoken["input_ids"][0, spoken["answer_start"] :].tolist()
    assert processor.tokenizer.decode(answer[:-1]) == "a dot" and answer[-1] == processor.tokenizer.eos_token_id
    with pytest.raises(TrainingDataError, match="no answer"):
        collate([{"messages": turns[:1]}])


def test_what_is_stored_can_be_read_again_from_anywhere(tmp_path, nano, processor, rows, monkeypatch):
    clip = rows[0]["messages"][0]["content"][0]["video"]
    question = {"type": "text", "text": "what ?"}

    def ask(source):
        return {"messages": [{"role": "user", "content": [{"type": "video", "video": source}, question]}]}

    with open(clip, "rb") as file:
        data = file.read()
    (tmp_path / "here.mp4").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    regenerate(nano, processor, [ask(data), ask("here.mp4")], tmp_path / "a", max_frames=6, **SETTINGS)
    monkeypatch.chdir("/")
    loaded = list(load_rows(tmp_path / "a"))
    assert [row["max_frames"] for row in loaded] == [6, 6]
    assert [path.read_bytes() for path in (tmp_path / "a" / "media").iterdir()] == [data]
    first, second = SparrowDataCollator(processor)(loaded)["samples"]
    assert torch.equal(first["pixel_values_videos"], second["pixel_values_videos"])
    assert first["video_grid_thw"].tolist() == [[3, 4, 4]]
    with pytest.raises(TrainingDataError, match="row 0: .*cannot hold a ndarray"):
        regenerate(nano, processor, [ask(torch.zeros(4, 64, 64, 3).numpy())], tmp_path / "b", **SETTINGS)


@pytest.mark.parametrize(
    ("written", "frames"),
    [({}, 8), ({"fps": 4.0}, 4), ({"max_frames": 6}, 6), ({"fps": 4.0, "max_frames": 2}, 2)],
)
def test_answers_are_read_with_the_frames_they_were_written_to(tmp_path, nano, processor, written, frames):
    clip = make_clip(tmp_path / "clip.mp4", 0, 16)
    regenerate(nano, processor, [{"messages": clip.messages}], tmp_path / "a", **written, **SETTINGS)
    (row,) = load_rows(tmp_path / "a")
    settings = {"fps": None, "max_frames": None} | written | {"fixed_frames": True}
    assert {name: row[name] for name in settings} == settings
    for options in ({}, {"max_frames": 2}, {"fps": 2.0}):
        # Two frames make a step.
        assert prepare_prompt(processor, row, **options)["video_grid_thw"].tolist() == [[frames // 2, 4, 4]]
    # Rows of earlier versions name what was set, and leave the rest to the options.
    for name in settings.keys() - written:
        del row[name]
    assert prepare_prompt(processor, row, max_frames=2)["video_grid_thw"].tolist() == [
        [min(frames, written.get("max_frames", 2)) // 2, 4, 4]
    ]


def test_a_table_without_a_rows_own_frames_leaves_them_to_the_options(tmp_path, processor):
    """Arrow fills every row with the columns of all others."""
    clip = make_clip(tmp_path / "clip.mp4", 0, 16)
    row = {"messages": clip.messages, "fps": None, "max_frames": None, "fixed_frames": None}
    assert prepare_prompt(processor, row, max_frames=2)["video_grid_thw"].tolist() == [[1, 4, 4]]


def test_answers_that_hold_their_media_can_be_moved(tmp_path, nano, processor, rows, monkeypatch):
    clips = [Path(row["messages"][0]["content"][0]["video"]).read_bytes() for row in rows[:2]]
    content = [{"type": "video", "video": clip} for clip in clips]
    regenerate(nano, processor, [{"messages": [{"role": "user", "content": content}]}], tmp_path / "a", **SETTINGS)
    names = [f"media/{hashlib.sha256(clip).hexdigest()}" for clip in clips]
    (line,) = (tmp_path / "a" / "answers-00000.jsonl").read_text().splitlines()
    assert [part["video"] for part in json.loads(line)["messages"][0]["content"]] == names
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for found in (list(load_rows("b")), list(read_answers("b"))):
        monkeypatch.chdir("/")
        (sample,) = SparrowDataCollator(processor)(found)["samples"]
        assert media_keys(found[0]) == {f"sha256:{name.removeprefix('media/')}" for name in names}
        assert sample["video_grid_thw"].shape == (2, 3)
        monkeypatch.chdir(tmp_path)

    # Earlier versions named them by absolute path.
    shard = tmp_path / "b" / "answers-00000.jsonl"
    shard.write_text(line.replace('"media/', f'"{tmp_path}/b/media/') + "\n")
    digests_of(tmp_path / "b").add(shard)
    (again,) = SparrowDataCollator(processor)(list(load_rows("b")))["samples"]
    assert torch.equal(again["pixel_values_videos"], sample["pixel_values_videos"])
    (tmp_path / "b").rename(tmp_path / "c")
    with pytest.raises(TrainingDataError) as gone:
        SparrowDataCollator(processor)(list(load_rows("c")))
    assert str(gone.value) == f"row 0: There is no video file at {tmp_path}/b/{names[0]}. Check the path."


def test_bad_rows_are_named_and_left_out_on_request(tmp_path, nano, processor, rows):
    bad = {"messages": [{"role": "user", "content": [{"type": "video", "video": "nowhere.mp4"}]}]}
    prompts = [rows[2], bad, rows[3]]
    with pytest.raises(TrainingDataError, match=r"row 1: There is no video file at .*nowhere"):
        regenerate(nano, processor, prompts, tmp_path / "a", **SETTINGS)
    regenerate(nano, processor, prompts, tmp_path / "b", on_bad_row="skip", shard_size=2, **SETTINGS)
    assert len(list(read_answers(tmp_path / "b"))) == 2
    assert list(read_skipped(tmp_path / "b")) == [1] and "nowhere" in read_skipped(tmp_path / "b")[1]


def test_a_run_that_a_bad_row_stopped_goes_on_without_it(tmp_path, nano, processor, rows):
    bad = {"messages": [{"role": "user", "content": [{"type": "video", "video": "nowhere.mp4"}]}]}
    prompts = [rows[2], rows[3], bad, rows[4]]
    with pytest.raises(TrainingDataError, match="row 2"):
        regenerate(nano, processor, prompts, tmp_path / "a", shard_size=2, **SETTINGS)
    written = (tmp_path / "a" / "answers-00000.jsonl").stat().st_mtime_ns
    regenerate(nano, processor, prompts, tmp_path / "a", on_bad_row="skip", shard_size=2, **SETTINGS)
    assert (tmp_path / "a" / "answers-00000.jsonl").stat().st_mtime_ns == written
    assert len(list(read_answers(tmp_path / "a"))) == 3 and list(read_skipped(tmp_path / "a")) == [2]


def test_videos_that_do_not_fit_into_one_batch_are_answered_one_by_one(tmp_path, rows):
    processor = build_processor(LLAVA_ONEVISION)
    target = build_target(processor.tokenizer, num_hidden_layers=2, family=LLAVA_ONEVISION)
    prompts, settings = rows[:3], SETTINGS | {"do_sample": False}
    with pytest.raises(TrainingDataError, match="pixel_values_videos have shapes"):
        left_pad([dict(prepare_inputs(processor, row["messages"])) for row in prompts[:2]], 0)
    answers = []
    for size in (1, 3):
        regenerate(target, processor, prompts, tmp_path / str(size), batch_size=size, **settings)
        answers.append([row["answer_ids"] for row in read_answers(tmp_path / str(size))])
    assert answers[0] == answers[1] and len(answers[0]) == 3


def asked(*questions, **columns):
    return [{"messages": [{"role": "user", "content": question}]} | columns for question in questions]


def test_what_does_not_fit_into_memory_is_answered_one_by_one_or_left_out(tmp_path, nano, processor, monkeypatch):
    prompts = asked("red ?", "blue . " * 40, "a red dot ?")
    settings = SETTINGS | {"do_sample": False, "shard_size": 3}
    alone = regenerate(nano, processor, prompts, tmp_path / "alone", **settings)[0].read_text().splitlines()
    generate, sizes, most = nano.generate, [], 10_000

    def generate_in_little_memory(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 1 or input_ids.shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(nano, "generate", generate_in_little_memory)
    (shard,) = regenerate(nano, processor, prompts, tmp_path / "a", batch_size=3, **settings)
    assert shard.read_text().splitlines() == alone and sizes == [3, 1, 1, 1]

    most = 40
    told = (
        "row 1: memory ran out, for this row alone: leave it out with --on-bad-row skip (on_bad_row='skip'), or go on "
        "where there is more memory (CUDA out of memory. Tried to allocate 20.00 GiB)"
    )
    with pytest.raises(TrainingDataError) as refused:
        regenerate(nano, processor, prompts, tmp_path / "b", batch_size=3, **settings)
    assert str(refused.value) == told
    (shard,) = regenerate(nano, processor, prompts, tmp_path / "b", batch_size=3, on_bad_row="skip", **settings)
    assert shard.read_text().splitlines() == [alone[0], alone[2]] and read_skipped(tmp_path / "b") == {1: told}


def test_a_full_disk_leaves_no_row_out(tmp_path, nano, processor, rows, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    content = [{"type": "video", "video": Path(rows[0]["messages"][0]["content"][0]["video"]).read_bytes()}]
    monkeypatch.setattr(regenerating, "atomic_path", full)
    with pytest.raises(TrainingDataError, match="row 0: OSError: .*No space left on device"):
        regenerate(
            nano, processor, [{"messages": [{"role": "user", "content": content}]}], tmp_path, on_bad_row="skip"
        )
    assert read_skipped(tmp_path) == {}


def test_a_draft_writes_the_same_answers(tmp_path, nano, processor, rows):
    draft = SparrowDraftModel.from_target(nano, num_glimpse_tokens=4)
    for size in (1, 2):
        settings = SETTINGS | {"batch_size": size}
        plain = regenerate(nano, processor, rows, tmp_path / f"plain {size}", **settings)
        drafted = regenerate(nano, processor, rows, tmp_path / f"drafted {size}", draft=draft, **settings)
        assert plain[0].read_bytes() == drafted[0].read_bytes()
        assert draft.last_generation.rounds > 0


def test_processes_share_the_shards(tmp_path, nano, processor, rows, monkeypatch):
    regenerate(nano, processor, rows, tmp_path / "a", shard_size=1, **SETTINGS)
    written = []
    for index in range(2):
        process = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=not index, main_process_first=contextlib.nullcontext
        )
        with monkeypatch.context() as patch:
            patch.setattr(regenerating, "PartialState", lambda process=process: process)
            regenerate(nano, processor, rows, tmp_path / "b", shard_size=1, **SETTINGS)
        written.append(len(list((tmp_path / "b").glob("*.jsonl"))))
    assert written == [3, 5]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_estimate_bounds_what_is_written(tmp_path, nano, processor, rows):
    shards = regenerate(nano, processor, rows, tmp_path, **SETTINGS)
    written = sum(shard.stat().st_size for shard in shards)
    assert 0.5 * written < estimate_answer_bytes(rows, 6) < 2 * written


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, nano, processor, rows, monkeypatch):
    def run(name):
        regenerate(nano, processor, rows, tmp_path / name, shard_size=2, **SETTINGS)

    write = Path.write_text

    def write_half_and_die(path, text):
        if "00001" not in path.name:
            return write(path, text)
        write(path, text[: len(text) // 2])
        kill_this_process()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half_and_die)
        die(lambda: run("killed"))
    names = [path.name for path in (tmp_path / "killed").iterdir()]
    assert "answers-00000.jsonl" in names and any("00001" in name and name.endswith(".partial") for name in names)
    run("killed")
    run("whole")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert len(files_of(tmp_path / "whole")) == 5


REGENERATE = """
import sys
from sparrow_hf.cli.common import launched_processes
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.training.regenerate import regenerate
assert launched_processes(None).num_processes == int(sys.argv[2])
processor = build_processor()
target = build_target(processor.tokenizer, num_hidden_layers=2)
target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
rows = [dict(messages=[dict(role="user", content="a dot ? " * (1 + index))]) for index in range(5)]
regenerate(target, processor, rows, sys.argv[1], shard_size=2, do_sample=True, max_new_tokens=8, min_new_tokens=3)
"""


@pytest.mark.full
def test_two_processes_write_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REGENERATE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        command = [*launch, count, str(script), str(tmp_path / count), count]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert len(files_of(tmp_path / "2")) == 5
