"""An untrained target and a draft of it. Modules that need other ones have their own."""

import pytest
from noise import build_target
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target()


@pytest.fixture(scope="module")
def draft_folder(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("draft")
    SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(folder)
    return str(folder)
