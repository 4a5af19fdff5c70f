"""`sparrow generate` goes on in a file of answers only where these are answers to what is asked now."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor
from typer.testing import CliRunner, Result
from untrained import save_models

from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.checksums import sealed
from sparrow_hf.cli import app
from sparrow_hf.data.prepare import processor_digest
from sparrow_hf.loading import load_target
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        make_clip(folder / f"{number}.mp4", EVALUATION_SEEDS[number], visual_tokens=16)
    return sorted(folder.iterdir())


@pytest.fixture
def generate(models: tuple[object, ...], tmp_path: Path) -> Callable[..., Result]:
    def run(source: object, *options: object, name: str = "captions.jsonl") -> Result:
        words = ("generate", source, *models[:2], "--draft", "none", "--max-new-tokens", 4, "--output")
        words = (*words, tmp_path / name, *options)
        return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(video: str) -> str:
    content = [{"type": "video", "video": video}, {"type": "text", "text": "what is this ?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n"


@pytest.mark.parametrize("asked", [".", "rows.jsonl", "clip.mp4"])
def test_equally_named_files_of_another_folder_are_not_answered_by_the_first(
    asked: str,
    generate: Callable[..., Result],
    clips: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder of videos, rows that name a video beside them, and a video by its name in the working folder."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, clip in zip(folders, clips, strict=True):
        folder.mkdir()
        shutil.copy(clip, folder / "clip.mp4")
        if asked == "rows.jsonl":
            (folder / asked).write_text(row("clip.mp4"))
    monkeypatch.chdir(folders[0])
    assert generate(asked).exit_code == 0
    (line,) = lines_of(tmp_path / "captions.jsonl")
    assert (line["source"], line["file"]) == ("clip.mp4", str(folders[0] / "clip.mp4"))
    written = (tmp_path / "captions.jsonl").read_bytes()
    monkeypatch.chdir(folders[1])
    refused = generate(asked)
    told = f"holds answers about other files of the same names, 1 in number ({line['name']}: {line['file']}): choose"
    assert refused.exit_code == 2 and told in refused.output, refused.output
    assert (tmp_path / "captions.jsonl").read_bytes() == written
    # The same files by another path are the same.
    (tmp_path / "link").symlink_to(folders[0])
    monkeypatch.chdir(tmp_path / "link")
    assert generate(asked).exit_code == 0
    # A folder that was moved is answered already.
    monkeypatch.chdir(tmp_path)
    folders[0].rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert generate(asked).exit_code == 0
    assert (tmp_path / "captions.jsonl").read_bytes() == written


def test_lines_of_earlier_versions_name_their_file_as_the_source(
    generate: Callable[..., Result], clips: list[Path], tmp_path: Path
) -> None:
    for number, clip in enumerate(clips):
        (tmp_path / str(number)).mkdir()
        shutil.copy(clip, tmp_path / str(number) / "clip.mp4")
    assert generate(tmp_path / "0").exit_code == 0
    path = tmp_path / "captions.jsonl"
    (line,) = lines_of(path)
    del line["file"], line["sha256"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.warns(UserWarning, match="carries no digests"):
        assert generate(tmp_path / "0").exit_code == 0
    with pytest.warns(UserWarning, match="carries no digests"):
        refused = generate(tmp_path / "1")
    assert refused.exit_code == 2 and f"(clip.mp4: {tmp_path}/0/clip.mp4)" in refused.output


def test_answers_of_other_weights_in_the_same_folder_are_not_gone_on_with(
    models: tuple[object, ...], clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, output = tmp_path / "target", tmp_path / "captions.jsonl"
    shutil.copytree(str(models[1]), target)
    (tmp_path / "videos").mkdir()
    shutil.copy(clips[0], tmp_path / "videos")

    def generate(target: Path = target) -> Result:
        words = ("generate", tmp_path / "videos", "--target", target, "--draft", "none", "--max-new-tokens", 4)
        return CliRunner().invoke(app, [str(word) for word in (*words, "--output", output)], env={"COLUMNS": "400"})

    assert generate().exit_code == 0
    (line,) = lines_of(output)
    first = tensor_digest(load_target(str(target))[0].state_dict())
    assert line["provenance"]["target_sha256"] == first
    # The same weights by another name.
    monkeypatch.chdir(tmp_path)
    assert generate(Path("target")).exit_code == 0 and lines_of(output) == [line]
    model = load_target(str(target))[0]
    model.get_input_embeddings().weight.data[0] += 1
    model.save_pretrained(target)
    second = tensor_digest(model.state_dict())
    shutil.copy(clips[1], tmp_path / "videos")
    refused = generate()
    assert refused.exit_code == 2
    assert f"was made differently (target_sha256: '{first}', now '{second}'): choose" in refused.output
    assert lines_of(output) == [line]

    # A line of an earlier version says nothing of weights.
    del line["provenance"]["target_sha256"]
    output.write_text(json.dumps(sealed({name: line[name] for name in line if name != "sha256"})) + "\n")
    assert generate().exit_code == 0
    assert [each["provenance"].get("target_sha256") for each in lines_of(output)] == [None, second]


def test_answers_by_another_processor_are_not_gone_on_with(
    generate: Callable[..., Result], models: tuple[object, ...], clips: list[Path], tmp_path: Path
) -> None:
    shutil.copy(clips[0], tmp_path / "clip.mp4")
    assert generate(tmp_path / "clip.mp4").exit_code == 0
    (line,) = lines_of(tmp_path / "captions.jsonl")
    processor = AutoProcessor.from_pretrained(str(models[1]))
    assert processor_digest(processor) == line["provenance"]["processor_sha256"]
    processor.save_pretrained(tmp_path / "same")
    assert generate(tmp_path / "clip.mp4", "--processor", tmp_path / "same").exit_code == 0
    processor.video_processor.do_normalize = False
    processor.save_pretrained(tmp_path / "other")
    refused = generate(tmp_path / "clip.mp4", "--processor", tmp_path / "other")
    assert refused.exit_code == 2 and "was made differently (processor_sha256: " in refused.output
    processor = AutoProcessor.from_pretrained(str(models[1]))
    processor.chat_template += " "
    assert processor_digest(processor) != line["provenance"]["processor_sha256"]

    # A line of an earlier version says nothing of the processor.
    del line["provenance"]["processor_sha256"]
    unsealed = {name: value for name, value in line.items() if name != "sha256"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(sealed(unsealed)) + "\n")
    assert generate(tmp_path / "clip.mp4", "--processor", tmp_path / "other").exit_code == 0


def test_errors_of_what_is_not_asked_are_not_tried_again(generate: Callable[..., Result], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.mp4").write_text("not a video")
        generate(tmp_path / name, "--retry-errors")
    assert [line["name"] for line in lines_of(tmp_path / "captions.jsonl")] == ["a.mp4", "b.mp4"]


def test_a_file_that_cannot_be_written_is_told_before_models_are_loaded(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: Path) -> str:
        words = ("generate", clips[0], "--target", "nowhere", "--draft", "none", "--output", output)
        return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"}).output

    (tmp_path / "file").touch()
    assert "nowhere" in run(tmp_path / "new" / "a.jsonl")
    assert "is a folder: name a file in it" in run(tmp_path)
    assert "nowhere" not in run(tmp_path / "file" / "a.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "a.jsonl cannot be written: change its permissions" in run(tmp_path / "a.jsonl")
