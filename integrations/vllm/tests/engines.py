"""Engines of vLLM for the tests, the clips, and what is counted while they answer."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

#: Small, offline and on loopback; read when vLLM is imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ |= ENVIRONMENT


@dataclass
class Family:
    """A built-in target, its exported draft, and what transformers said to its clips (`references.py`)."""

    folder: Path
    method: str
    target: str = field(init=False)
    clips: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.target = (self.folder / "target").read_text()
        self.clips = json.loads((self.folder / "clips.json").read_text())

    def of_length(self, visual_tokens: int) -> list[dict[str, Any]]:
        return [clip for clip in self.clips if clip["visual_tokens"] == visual_tokens]

    def speculative_config(self, **changes: Any) -> dict[str, Any]:
        draft = str(self.folder / "draft")
        return {"method": self.method, "model": draft, "num_speculative_tokens": 5} | changes

    def video(self, clip: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return np.load(self.folder / f"{clip['name']}.npy"), clip["metadata"]

    def request(self, clip: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": clip["prompt"], "multi_modal_data": {"video": [self.video(clip)]}}


@dataclass
class Answers:
    """Token ids of each answer, and the rounds of all."""

    ids: list[list[int]]
    rounds: int

    @property
    def acceptance_length(self) -> float:
        return tokens_per_round(self.ids, self.rounds)


class Engine:
    """One `vllm.LLM`, greedy."""

    def __init__(self, llm: Any):
        self.llm = llm

    def _rounds(self) -> int:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:spec_decode_num_drafts")

    def answer(self, requests: list[Any], at_once: bool = True, max_tokens: int = 100) -> Answers:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, skip_special_tokens=False)
        before = self._rounds()
        batches = [requests] if at_once else [[request] for request in requests]
        outputs = [output for batch in batches for output in self.llm.generate(batch, sampling, use_tqdm=False)]
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        return Answers(ids, self._rounds() - before)

    def forget(self) -> None:
        """Nothing of earlier prompts is cached."""
        assert self.llm.reset_prefix_cache()


@contextmanager
def engine(family: Family, draft: bool = True, **options: Any) -> Iterator[Engine]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "model": family.target,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"video": 2, "image": 2},
        "skip_mm_profiling": True,
        "disable_log_stats": False,
    }
    if draft:
        settings["speculative_config"] = family.speculative_config()
    its = Engine(LLM(**settings | options))
    try:
        yield its
    finally:
        # What a failed test holds must not be taken down while the next engine is built.
        its.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


#: Largest difference of a state from transformers'; states are about 1 in size.
STATE_TOLERANCE = 1e-4
STATES = 5


def draft_states(family: Family, drafting: Engine, clips: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Per clip `(5, H)`: what the draft makes of the prompt's last token and of those that it drafts first."""
    from sparrow_vllm.model import SparrowDraft

    found = []
    own = SparrowDraft.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        states, _ = own(self, *arguments, **named)
        found.append(states)
        return states, states

    drafting.forget()
    of_clips = []
    with patch.object(SparrowDraft, "forward", forward):
        for clip in clips:
            found.clear()
            drafting.answer([family.request(clip)], max_tokens=2)
            prompt = next(index for index, states in enumerate(found) if len(states) == len(clip["prompt_ids"]))
            of_clips.append(torch.stack([states[-1] for states in found[prompt : prompt + STATES]]))
    drafting.forget()
    return of_clips


#: How far the acceptance length may be from transformers'.
TOLERANCE = 0.02


def wanted(clips: list[dict[str, Any]], rows: str) -> float:
    """Acceptance length of transformers."""
    return tokens_per_round([clip[rows]["ids"] for clip in clips], sum(clip[rows]["rounds"] for clip in clips))


def tokens_per_round(ids: list[list[int]], rounds: int) -> float:
    """The first token of an answer comes of its prompt. vLLM also counts accepted tokens behind the last one."""
    return sum(len(answer) - 1 for answer in ids) / rounds


def check(answers: Answers, clips: list[dict[str, Any]], rows: str, tolerance: float = TOLERANCE) -> None:
    """Compares with transformers, which read the clips at the positions that vLLM gives them."""
    print(f"acceptance length {answers.acceptance_length:.2f}, in transformers {wanted(clips, rows):.2f}")
    assert answers.ids == [clip[rows]["ids"] for clip in clips]
    assert answers.acceptance_length == pytest.approx(wanted(clips, rows), rel=tolerance)


def visual_part(prompt: str) -> str:
    """The part of a prompt that stands for its video."""
    return prompt[prompt.index("<|vision_start|>") : prompt.index("<|vision_end|>") + len("<|vision_end|>")]


def others(qwen: Family) -> list[dict[str, Any]]:
    """No video, two videos, an image before a video, and a second turn behind a video and its answer."""
    clips = qwen.of_length(400)
    videos = [qwen.video(clip) for clip in clips[:2]]
    prompt = clips[0]["prompt"]
    visual = visual_part(prompt)
    image = visual.replace("video", "image")
    second_turn = "a big brown crescent comes into view .<|im_end|>\n" + clips[1]["prompt"].replace(visual, "")
    return [
        {"prompt": prompt.replace(visual, "")},
        {"prompt": prompt.replace(visual, visual + "and then" + visual), "multi_modal_data": {"video": videos}},
        {
            "prompt": prompt.replace(visual, image + visual),
            "multi_modal_data": {"image": [videos[1][0][0]], "video": videos[:1]},
        },
        {"prompt": prompt + second_turn, "multi_modal_data": {"video": videos[:1]}},
    ]
