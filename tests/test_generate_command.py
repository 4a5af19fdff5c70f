"""`sparrow generate`: its doors, its lines, its endings, and that a stopped run goes on where it was."""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import command_in, full_disk, lines_in, needs_posix, sparrow, stop_after_lines
from typer.testing import CliRunner, Result
from untrained import save_models

from sparrow_hf.captioning import read_questions
from sparrow_hf.cli import app
from sparrow_hf.data import prepare_prompt
from sparrow_hf.generation.emission import TokenEmitter
from sparrow_hf.loading import load_target
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip

TIMES = {"sha256", "seconds", "tokens_per_second", "plain_seconds", "speedup"}
GOOD, BAD = ["a.mp4", "deep/b.mp4", "e"], ["c.mp4", "d.mkv"]
SHORT = ("--max-new-tokens", 8, "--max-frames", 8)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one in a folder and one without an ending; two that are none; and files beside them."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(("a.mp4", "deep/b.mp4", "e.mp4")):
        make_clip(folder / name, EVALUATION_SEEDS[number], visual_tokens=32)
    (folder / "e.mp4").rename(folder / "e")
    (folder / "c.mp4").touch()
    (folder / "d.mkv").write_text("no video")
    (folder / "notes.txt").write_text("no video either")
    (folder / ".hidden.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def answered(models: tuple[object, ...], videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run over the folder writes that nothing stops."""
    output = tmp_path_factory.mktemp("answered") / "captions.jsonl"
    result = run("generate", videos, *models, *SHORT, "--output", output)
    assert result.exit_code == 3, result.output
    return output


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines_of(path)]


def test_every_good_video_is_answered_and_every_bad_one_told(
    models: tuple[object, ...], videos: Path, answered: Path
) -> None:
    lines = {line["name"]: line for line in lines_of(answered)}
    assert list(lines) == sorted(GOOD + BAD)
    target, processor = load_target(str(models[1]))
    for name in GOOD:
        line = lines[name]
        row = read_questions(str(videos / name)).items[0].row
        inputs = prepare_prompt(processor, row, 2.0, 8)
        ids = target.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert line["text"] == processor.decode(ids, skip_special_tokens=True).strip()
        assert (line["source"], line["question"]) == (str(videos / name), "Describe this video in detail.")
        assert (line["tokens"], line["truncated"], line["error"]) == (len(ids), True, None)
        assert line["visual_tokens"] == 8 and line["seconds"] > 0 and line["identical"] is None
    for name in BAD:
        assert lines[name]["error"] and lines[name]["text"] is None and lines[name]["tokens"] is None
        assert "\n" not in lines[name]["error"]
    assert lines["c.mp4"].keys() == lines["a.mp4"].keys()
    assert "is an empty file" in lines["c.mp4"]["error"]


def test_the_same_command_has_nothing_left_to_do(
    models: tuple[object, ...], videos: Path, answered: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    shutil.copy(answered, output)
    again = run("generate", videos, *models, *SHORT, "--output", output, "--json")
    assert again.exit_code == 3 and output.read_bytes() == answered.read_bytes()
    totals = json.loads(again.stdout)
    assert (totals["rows"], totals["errors"], totals["tokens"], totals["different"]) == (5, 2, 24, None)
    assert "left out, no videos by their names: notes.txt" in again.stderr
    assert "3 of 5 rows answered, 2 have an error" in again.stderr

    # Other settings are refused by name, and the file is left as it is.
    other = run("generate", videos, *models, "--max-new-tokens", 9, "--max-frames", 8, "--output", output)
    assert other.exit_code == 2 and "settings.max_new_tokens: 8, now 9" in other.output
    assert output.read_bytes() == answered.read_bytes()

    # Rows with an error are tried again where that is asked for.
    mended = run("generate", videos, *models, *SHORT, "--output", output, "--retry-errors")
    assert mended.exit_code == 3
    assert [line["name"] for line in lines_of(output)] == GOOD + BAD  # those with an error come last now


@pytest.mark.parametrize("foreign", ["no newline", '{"a": 1}', '{"a": 1}\n', "[]\n", "\x00\xff\n"])
def test_a_file_of_something_else_is_never_written_to(
    foreign: str, models: tuple[object, ...], videos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine.txt"
    output.write_text(foreign)
    result = run("generate", videos / "a.mp4", *models, *SHORT, "--output", output)
    assert result.exit_code == 2 and "is not an answer of sparrow generate: move the file elsewhere" in result.output
    assert output.read_text() == foreign


@needs_posix
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stop", "told"), [(signal.SIGINT, "Stopped by Ctrl-C"), (signal.SIGTERM, "Stopped by SIGTERM")]
)
def test_a_stopped_folder_goes_on(
    stop: signal.Signals,
    told: str,
    models: tuple[object, ...],
    videos: Path,
    answered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "captions.jsonl"
    with monkeypatch.context() as patches:
        stop_after_lines(2, stop, patches)
        stopped = run("generate", videos, *models, *SHORT, "--output", output)
    assert stopped.exit_code == 128 + stop and "Traceback" not in stopped.output
    assert f"{told}: 2 of 5 answers are kept in {output}; go on with: sparrow" in stopped.output
    assert without_times(output) == without_times(answered)[:2]
    assert run(*command_in(stopped.output)).exit_code == 3
    assert without_times(output) == without_times(answered)


@needs_posix
def test_a_folder_that_was_killed_in_the_middle_of_a_line_goes_on(
    models: tuple[object, ...], videos: Path, answered: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    command = ("generate", videos, *models, *SHORT, "--output", output)
    killed = sparrow(*command, largest_file=room_for_lines(2, answered), dies=True)
    assert killed.code == -signal.SIGXFSZ
    assert lines_in(output) == 2 and not output.read_bytes().endswith(b"\n")
    assert run(*command).exit_code == 3
    assert without_times(output) == without_times(answered)


@needs_posix
def test_a_full_disk_keeps_whole_lines(
    models: tuple[object, ...], videos: Path, answered: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    with full_disk(room_for_lines(2, answered)):
        stopped = run("generate", videos, *models, *SHORT, "--output", output)
    assert stopped.exit_code == 4 and "Traceback" not in stopped.output
    assert "The disk is full" in stopped.output and "2 of 5 answers are kept" in stopped.output
    assert output.read_bytes().endswith(b"\n") and lines_in(output) == 2
    assert run(*command_in(stopped.output)).exit_code == 3
    assert without_times(output) == without_times(answered)


def room_for_lines(number: int, answered: Path) -> int:
    """Bytes of the first lines, and of the beginning of the next one."""
    return sum(map(len, answered.read_bytes().splitlines(keepends=True)[:number])) + 100


def test_rows_ask_their_own_questions(models: tuple[object, ...], videos: Path, tmp_path: Path) -> None:
    def ask(video: str, **more: Any) -> dict[str, Any]:
        content = [{"type": "video", "video": video}, {"type": "text", "text": "describe this video ."}]
        return {"messages": [{"role": "user", "content": content}], **more}

    rows, output = tmp_path / "rows.jsonl", tmp_path / "captions.jsonl"
    shutil.copy(videos / "a.mp4", tmp_path / "a.mp4")

    def write(*asked: dict[str, Any]) -> None:
        rows.write_text("".join(json.dumps(row) + "\n" for row in asked))

    write(ask("a.mp4", fps=4.0), ask("nowhere.mp4", fps=4.0))
    command = ("generate", rows, *models, "--max-new-tokens", 8, "--output", output, "--draft", "none")
    result = run(*command)
    assert result.exit_code == 3, result.output
    good, bad = lines_of(output)
    # Paths start at the file's folder, and the row's own fps is used: 16 frames, of which two make a step.
    assert (good["source"], good["question"], good["error"]) == ("a.mp4", "describe this video .", None)
    assert good["name"].startswith("row 0, ") and good["visual_tokens"] == 16
    assert "no draft" in result.output and good["tau"] == 1
    assert "nowhere.mp4" in bad["error"] and "nowhere.mp4" in result.stderr

    asked = run(*command[:2], "What happens?", *command[2:])
    assert asked.exit_code == 2 and "ask their own questions" in asked.output
    write(ask("a.mp4", fps=2.0), ask("nowhere.mp4", fps=4.0))
    changed = run(*command)
    assert changed.exit_code == 2 and f"holds answers to other rows, 1 in number ({good['name']})" in changed.output


def test_one_video_prints_its_text_and_nothing_else(models: tuple[object, ...], videos: Path) -> None:
    video = videos / "a.mp4"
    plain = run("generate", video, "What is this?", *models, *SHORT, "--json")
    assert plain.exit_code == 0, plain.output
    line = json.loads(plain.stdout)
    assert line["question"] == "What is this?"
    compared = run("generate", video, "What is this?", *models, *SHORT, "--compare")
    assert compared.exit_code == 0 and compared.stdout == line["text"] + "\n"
    assert "IDENTICAL to plain generate(), " in compared.stderr
    assert "float32 on cpu" in compared.stderr and "sdpa attention, draft tree" in compared.stderr
    sampled = ("--temperature", 1.5, "--seed", 3, "--json", "--compare", "--attention", "eager")
    first, second = (run("generate", video, *models, *SHORT, *sampled) for _ in range(2))
    told = json.loads(first.stdout)
    assert told["identical"] is True and told["differs_at"] is None and told["speedup"] > 0
    assert told["provenance"]["settings"] == {
        "max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip
    assert told["provenance"]["attention"] == "eager"
    assert told["text"] == json.loads(second.stdout)["text"] != line["text"]


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_a_text_that_differs_is_told(
    dtype: str, code: int, models: tuple[object, ...], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TokenEmitter.choose
    monkeypatch.setattr(TokenEmitter, "choose", lambda self, *args: (right(self, *args) + 1) % 300)
    result = run("generate", videos / "a.mp4", *models, *SHORT, "--compare", "--dtype", dtype)
    assert result.exit_code == code
    assert "NOT IDENTICAL to plain generate()" in result.stderr
    assert ("two nearly equal tokens may swap" in result.stderr) == (dtype == "bfloat16")


def test_out_of_memory_is_the_error_of_a_row(
    models: tuple[object, ...], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = TokenEmitter.choose, []

    def choose(self: TokenEmitter, *args: Any) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return right(self, *args)

    monkeypatch.setattr(TokenEmitter, "choose", choose)
    output = tmp_path / "captions.jsonl"
    assert run("generate", videos, *models, *SHORT, "--output", output).exit_code == 3
    first, second = lines_of(output)[0], lines_of(output)[3]
    assert first["error"].startswith("memory ran out, lower --max-frames or --fps (CUDA out of memory.")
    assert second["name"] == "deep/b.mp4" and second["error"] is None


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["missing.mp4"], "no video file at missing.mp4"),
        ([], "name a video, a folder or rows"),
        (["empty"], "empty holds no videos and no rows"),
        (["videos"], "videos holds 2 rows: name a file for the answers with --output"),
        (["c.mp4", "--retry-errors"], "--retry-errors needs the --output"),
        (["c.mp4", "--draft", "none", "--compare"], "name one with --draft"),
        (["c.mp4"], "c.mp4 is an empty file"),
        (["c.mp4", "--output", "videos"], "videos is a folder: name a file in it"),
        (["rows", "--output", "rows/captions.jsonl"], "write the answers outside of rows"),
        (["c.mp4", "--attention", "nonsense"], "cannot be loaded"),
        (["c.mp4", "--draft", "nowhere"], "draft 'nowhere' cannot be loaded"),
        ([""], "The name of the video is empty"),
        # What a shell makes of `videos/*.mp4`.
        (["videos/1.mp4", "videos/2.mp4"], "videos/2.mp4 is a file, not a question"),
        (["c.mp4", "--output", "./c.mp4"], "c.mp4 holds what is asked: name another file"),
        (["rows/1.jsonl", "--output", "rows/1.jsonl"], "rows/1.jsonl holds what is asked: name another file"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(
    wrong: list[str],
    sentence: str,
    models: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c.mp4", "videos/1.mp4", "videos/2.mp4", "empty/.keep", "rows/1.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    result = run("generate", *models, *wrong)
    assert result.exit_code == 2 and sentence in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and result.stdout == ""


def test_the_built_in_models_need_nothing() -> None:
    threads = torch.get_num_threads()
    result = run("generate", "--compare", "--max-new-tokens", 32)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("this video shows five scenes")
    assert "built-in qwen2.5-vl in float32 on cpu" in result.stderr
    assert "IDENTICAL to plain generate()" in result.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_shows_which_tokens_were_accepted(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of text in the colour of its token: green as often as the statistics say."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        words = [str(word) for word in ("generate", videos / "a.mp4", "--max-new-tokens", 24)]
        with pytest.raises(SystemExit) as ended:
            app(words, prog_name="sparrow")
        terminal.flush()
        written = b""
        while select.select([reader], [], [], 0.5)[0]:  # one reading may give a part
            written += os.read(reader, 100_000)
    shown = written.decode()
    assert ended.value.code == 0
    monkeypatch.undo()
    line = json.loads(run(*words, "--json").stdout)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).strip() == line["text"]
    torch.set_num_threads(threads)
    # A token that was not accepted is the first one or ends a round; the last round may end with an accepted one.
    accepted, own = shown.count("\x1b[1;32m"), shown.count("\x1b[33m")
    rounds = round((line["tokens"] - 1) / line["tau"])
    assert accepted > 12 and accepted + own == line["tokens"] == 24 and own in (rounds, rounds + 1)


def test_a_video_may_be_asked_about_by_its_address_and_for_one_token(models: tuple[object, ...], videos: Path) -> None:
    address = (videos / "a.mp4").as_uri()
    one = run("generate", address, *models, "--max-new-tokens", 1, "--max-frames", 8, "--json", "--compare")
    line = json.loads(one.stdout)
    assert (one.exit_code, line["tokens"], line["tau"], line["identical"]) == (0, 1, 0.0, True)
    whole = run("generate", videos / "a.mp4", *models, *SHORT, "--json")
    assert json.loads(whole.stdout)["text"].startswith(line["text"])


def test_a_json_array_holds_rows(models: tuple[object, ...], tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"messages": [{"role": "user", "content": "what is this ?"}]}]))
    result = run("generate", rows, *models, *SHORT, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["question"] == "what is this ?"


@needs_posix
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("error", [SystemError, RuntimeError])
def test_an_interrupt_is_no_bad_row(
    error: type[Exception],
    models: tuple[object, ...],
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C code that runs Python code may turn an interrupt into another error."""

    def interrupted(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            raise error("returned a result with an exception set") from stop

    monkeypatch.setattr("sparrow_hf.captioning.caption.measure", interrupted)
    output = tmp_path / "captions.jsonl"
    result = run("generate", videos, *models, *SHORT, "--output", output)
    assert result.exit_code == 130 and "Stopped by Ctrl-C: 0 of 5 answers are kept" in result.stderr
    assert output.read_bytes() == b""


@needs_posix
@pytest.mark.full
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_does_not_matter(
    closed: str, models: tuple[object, ...], videos: Path, answered: Path, tmp_path: Path
) -> None:
    words = ["generate", videos, *models, *SHORT, "--output", tmp_path / "captions.jsonl"]
    command = shlex.join([sys.executable, "-m", "sparrow_hf.cli", *map(str, words)])
    assert subprocess.run(f"{command} {closed}", shell=True, timeout=240).returncode == 3
    assert without_times(tmp_path / "captions.jsonl") == without_times(answered)
