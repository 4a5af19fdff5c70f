"""A tiny random target, greedy answers of its own, and drafts for it; a built-in family, and prompts for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from greedy import greedy
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from sparrow_hf import SparrowDraftModel
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
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


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    """Of the built-in family Qwen2.5-VL."""
    return build_processor()


@pytest.fixture(scope="module")
def nano(processor: ProcessorMixin) -> PreTrainedModel:
    """A target of two layers that writes no placeholders."""
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    return target


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two questions about clips of different length, and three without."""
    folder = tmp_path_factory.mktemp("clips")
    clips = [make_clip(folder / f"{seed}.mp4", seed, tokens) for seed, tokens in enumerate((16, 32))]
    text = [{"role": "user", "content": question} for question in ("describe this video .", "a dot ?", "what ?")]
    asked = [{"messages": clip.messages, "id": index} for index, clip in enumerate(clips)]
    # An assistant turn is what the target is to write itself.
    return asked + [{"messages": [turn, {"role": "assistant", "content": "first ,"}]} for turn in text]


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
