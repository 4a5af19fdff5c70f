"""A training that is resumed: what may have changed since, and what is compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.data.datasets import StreamedRows
from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.checkpoints import SETTINGS_FILE, check_settings, describe_training, seal_checkpoint


@pytest.fixture
def make_trainer(
    target: PreTrainedModel, make_draft: Callable[..., SparrowDraftModel], recorded: list[Any]
) -> Callable[..., SparrowTrainer]:
    """A training of 6 steps, on its way in Python."""

    def make(folder: Path, **overrides: Any) -> SparrowTrainer:
        settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 3, "learning_rate": 1e-2} | overrides
        args = SparrowTrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings
        )
        return SparrowTrainer(make_draft(), target, args, train_dataset=recorded, eval_dataset=recorded[:1])

    return make


def test_how_often_is_logged_evaluated_and_saved_may_change(
    make_trainer: Callable[..., SparrowTrainer], tmp_path: Path
) -> None:
    first = make_trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, save_steps=1, logging_steps=0.5)
    again.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (3, 4, 5, 6)]
    history = again.state.log_history
    assert [entry["step"] for entry in history if "eval_tau" in entry] == [3, 4, 6]
    # Half of all steps, as it was said before.
    assert [entry["step"] for entry in history if "loss" in entry] == [3, 6]


def test_a_training_in_python_is_compared_with_its_checkpoint(
    make_trainer: Callable[..., SparrowTrainer], tmp_path: Path
) -> None:
    make_trainer(tmp_path, max_steps=3).train()
    settings = json.loads((tmp_path / "checkpoint-3" / SETTINGS_FILE).read_text())
    assert settings["arguments"]["learning_rate"] == 1e-2 and settings["draft"]["num_mtp_steps"] == 4
    others = {"learning_rate": 0.02, "seed": 7, "per_device_train_batch_size": 2}
    with pytest.raises(TrainingOptionsError) as refused:
        make_trainer(tmp_path, max_steps=3, **others).train(resume_from_checkpoint=True)
    for told in ("learning_rate: 0.01, now 0.02", "seed: 42, now 7", "train_batch_size: 8, now 2"):
        assert told in str(refused.value)
    with pytest.warns(UserWarning, match="planned for .*'max_steps': 3.* goes on with .*'max_steps': 4"):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_settings_is_resumed_with_a_warning(
    make_trainer: Callable[..., SparrowTrainer], tmp_path: Path
) -> None:
    make_trainer(tmp_path, save_steps=2).train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    # As an earlier version left it.
    seal_checkpoint(tmp_path / "checkpoint-2", {})
    again = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"written no settings into .*training\.json: nothing tells whether"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_rows_are_streamed_as_before_or_not_at_all(
    make_trainer: Callable[..., SparrowTrainer], recorded: list[Any], tmp_path: Path
) -> None:
    make_trainer(tmp_path, max_steps=3).train()
    streamed = make_trainer(tmp_path, max_steps=3)
    streamed.train_dataset = StreamedRows(recorded)
    with pytest.raises(TrainingOptionsError, match="streaming: False, now True"):
        streamed.train(resume_from_checkpoint=True)
    # An earlier version did not name it.
    settings = json.loads((tmp_path / "checkpoint-3" / SETTINGS_FILE).read_text())
    del settings["streaming"]
    seal_checkpoint(tmp_path / "checkpoint-3", settings)
    check_settings(tmp_path / "checkpoint-3", describe_training(streamed))
