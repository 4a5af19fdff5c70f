"""An untrained target and a draft of it. Modules that need other ones have their own."""

import pytest
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel

from families import FAMILY_BY_NAME


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    # Placeholders are no text; and every answer is as long as it may be.
    target.generation_config.suppress_tokens = FAMILY_BY_NAME["qwen2_5_vl"].visual_token_ids
    target.generation_config.eos_token_id = None
    return target


@pytest.fixture(scope="module")
def draft_folder(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("draft")
    SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(folder)
    return str(folder)
