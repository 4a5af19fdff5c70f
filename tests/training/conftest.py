"""A tiny random target, greedy answers of its own, and drafts for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from greedy import greedy
from torch import Tensor
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.training import append_answer, read_with_target

from families import FAMILY_BY_NAME


@pytest.fixture(scope="session")
def target() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


@pytest.fixture(scope="session")
def prompts(target: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Four prompts whose videos and questions differ in length."""
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    questions = ("What moves here?", "Describe it.", "What is shown in this video?", "Why?")
    return [
        family.build_inputs(target, num_frames=frames, seed=seed, question=question)
        for seed, (frames, question) in enumerate(zip((4, 12, 8, 20), questions, strict=True))
    ]


@pytest.fixture(scope="session")
def samples(target: PreTrainedModel, prompts: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """The prompts with the target's own greedy answers, of 7, 12, 9 and 15 tokens."""
    rows = []
    for prompt, length in zip(prompts, (7, 12, 9, 15), strict=True):
        output = target.generate(**prompt, **greedy(length))
        rows.append(append_answer(prompt, output[0, prompt["input_ids"].shape[1] :].tolist()))
    return rows


@pytest.fixture
def make_draft(target: PreTrainedModel) -> Callable[..., SparrowDraftModel]:
    """Builds a draft bound to the target, its weights drawn from a seed."""

    def build(seed: int = 0, **overrides: Any) -> SparrowDraftModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draft = SparrowDraftModel.from_target(target, **({"num_glimpse_tokens": 4} | overrides))
            # The usual initialisation makes rows nearly independent of what they attend to.
            for parameter in draft.parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.2)
        return draft

    return build


@pytest.fixture
def recorded(make_draft: Callable[..., SparrowDraftModel], samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the target made of the samples: all rows, as a recording keeps them."""
    draft = make_draft()
    return [read_with_target(draft, sample).to_row() for sample in samples]
