"""What was renamed can still be imported by its former name, with a warning."""

import importlib
import sys

import pytest

from sparrow_hf.training import run


def test_the_former_name_warns_and_gives_the_same() -> None:
    sys.modules.pop("sparrow_hf.training.launch", None)
    with pytest.warns(FutureWarning, match=r"is now sparrow_hf\.training\.run"):
        former = importlib.import_module("sparrow_hf.training.launch")
    assert (former.DDP_CONFIG, former.Launch, former.prepare) == (
        run.DDP_CONFIG,
        run.TrainingRun,
        run.prepare_training,
    )
    assert run.DDP_CONFIG.is_file()
