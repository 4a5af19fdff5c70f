"""Answers are compared with the target that a draft is trained for."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sparrow_hf._transformers import use_vllm_positions
from sparrow_hf.cli import app
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.training.options import parse_options
from sparrow_hf.training.regenerate import regenerate
from sparrow_hf.training.run import prepare_training


@pytest.fixture(scope="module")
def nano() -> PreTrainedModel:
    return build_target(build_processor().tokenizer, num_hidden_layers=2)


@pytest.fixture(scope="module")
def answers(nano: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three answers of the target in two shards, to questions without a video."""
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("what ?", "a dot ?", "a red dot ?")]
    folder = tmp_path_factory.mktemp("answers")
    regenerate(nano, build_processor(), rows, folder, shard_size=2, max_new_tokens=4, min_new_tokens=4)
    return folder


def prepare(answers: Path, target: PreTrainedModel, output: Path, option: str = "--train") -> Any:
    rows = {"--train": answers, option: answers}
    if option == "--held-out":
        (output / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a blue dot"}]}))
        rows["--train"] = output / "rows.jsonl"
    words = [str(word) for pair in rows.items() for word in pair]
    words += f"--target t --output {output}/draft --max-steps 1 --use-cpu --report-to none".split()
    return prepare_training(*parse_options(words), target, build_processor())


EACH = pytest.mark.parametrize("option", ["--train", "--held-out"])


@EACH
def test_answers_of_another_target_are_warned_of(
    answers: Path, nano: PreTrainedModel, tmp_path: Path, option: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(answers, nano, tmp_path, option)
    low = copy.deepcopy(nano).to(torch.bfloat16)
    wrote = json.loads((answers / "provenance.json").read_text())["target_sha256"]
    told = (
        f"another target, or this one in another dtype, wrote the answers in {answers} (unnamed in torch.float32, "
        f"sha256 {wrote[:12]}…; this one is in torch.bfloat16, "
    )
    with pytest.warns(UserWarning, match=re.escape(told)):
        prepare(answers, low, tmp_path, option)


@EACH
def test_answers_at_other_positions_are_refused(
    answers: Path, nano: PreTrainedModel, tmp_path: Path, option: str
) -> None:
    other = copy.deepcopy(nano)
    use_vllm_positions(other)
    with pytest.raises(TrainingDataError) as refused:
        prepare(answers, other, tmp_path, option)
    assert str(refused.value) == (
        f"the answers in {answers} were written without --vllm-positions: go on without --vllm-positions too, or run "
        "`sparrow regenerate` again into another folder"
    )


def test_a_recording_compares_too(answers: Path, nano: PreTrainedModel, tmp_path: Path) -> None:
    for model in (nano, build_processor()):
        model.save_pretrained(tmp_path / "target")
    words = f"record --target {tmp_path}/target --answers {answers} --device cpu --output {tmp_path}/"
    with pytest.warns(UserWarning, match="another target, or this one in another dtype, wrote the answers"):
        assert CliRunner().invoke(app, [*f"{words}a --dtype bfloat16".split()]).exit_code == 0
    refused = CliRunner().invoke(app, [*f"{words}b --vllm-positions".split()])
    assert refused.exit_code == 2 and "were written without --vllm-positions" in refused.output


@EACH
def test_answers_that_are_unfinished_are_warned_of(
    answers: Path, nano: PreTrainedModel, tmp_path: Path, option: str
) -> None:
    (tmp_path / "stopped").mkdir()
    digests = (answers / "digests.sha256").read_text().splitlines()
    for name in ("provenance.json", "answers-00000.jsonl"):
        shutil.copy(answers / name, tmp_path / "stopped")
    kept = [line for line in digests if "answers-00001" not in line]
    (tmp_path / "stopped" / "digests.sha256").write_text("\n".join([*kept, ""]))
    with pytest.warns(UserWarning, match=f"{tmp_path}/stopped holds the answers to 2 of 3 rows: "):
        prepare(tmp_path / "stopped", nano, tmp_path, option)
