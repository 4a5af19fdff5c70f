"""Engines of other settings: prompts in pieces, requests that are preempted, a target without middle states."""

from typing import Any
from unittest.mock import patch

import torch
from engines import STATE_TOLERANCE, Family, check, draft_states, engine, others


def test_pieces_and_preemptions(qwen: Family, plain: list[list[int]]) -> None:
    """Pieces of 96 tokens; KV blocks for two of eight requests, so that some lose theirs and start anew."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    own = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return own(self, request, *args, **kwargs)

    options = {
        "long_prefill_token_threshold": 96,
        "num_gpu_blocks_override": 48,
        "block_size": 32,
        "max_model_len": 1400,
    }
    clips = (qwen.of_length(400) * 2)[:8]
    with engine(qwen, **options) as pieces, patch.object(Scheduler, "_preempt_request", preempt):
        check(pieces.answer([qwen.request(clip) for clip in clips[:5]], at_once=False), clips[:5], "vllm")
        pieces.forget()
        answers = pieces.answer([qwen.request(clip) for clip in clips])
        assert preempted
        assert answers.ids == [clip["vllm"]["ids"] for clip in clips]
        assert pieces.answer(others(qwen)).ids == plain


def test_a_target_without_middle_states(llava: Family) -> None:
    clips = llava.of_length(400)
    with engine(llava) as with_draft:
        answers = with_draft.answer([llava.request(clip) for clip in clips], at_once=False)
    check(answers, clips, "none")


def test_a_larger_draft(qwen: Family) -> None:
    """Four feature layers, two decoder layers, a vocabulary of its own. States that are not scaled are seen."""
    from sparrow_vllm import model

    clips = qwen.of_length(400)
    wanted = [torch.tensor(clip["larger"]["states"]) for clip in clips]
    with engine(qwen, speculative_config=qwen.speculative_config(model=str(qwen.folder / "larger-draft"))) as larger:
        for found, states in zip(draft_states(qwen, larger, clips), wanted, strict=True):
            # Rounding grows through the outputs that an untrained draft feeds itself.
            torch.testing.assert_close(found, states, rtol=0, atol=10 * STATE_TOLERANCE)
        check(larger.answer([qwen.request(clip) for clip in clips], at_once=False), clips, "larger")
        with patch.object(model, "of_one_length", lambda features, latest: features):
            (found,) = draft_states(qwen, larger, clips[:1])
    assert (found - wanted[0]).abs().max() > 100 * STATE_TOLERANCE


def test_frame_headers(qwen3: Family) -> None:
    """Qwen3-VL writes a time before each frame: the draft does not read it, as in transformers."""
    from sparrow_vllm import model

    (clip,) = qwen3.clips
    found = []
    own = model.describe

    def describe(*arguments: Any) -> Any:
        found.append(own(*arguments))
        return found[-1]

    with engine(qwen3, draft=False, max_model_len=4096) as without:
        expected = without.answer([qwen3.request(clip)]).ids
    with patch.object(model, "describe", describe), engine(qwen3, max_model_len=4096) as with_draft:
        found.clear()
        # The random target of vLLM and that of transformers differ in what they say, draft or none.
        assert with_draft.answer([qwen3.request(clip)]).ids == expected
    rows = next(rows for rows in found if len(rows.hidden) == len(clip["prompt_ids"]))
    assert (~rows.hidden).nonzero().flatten().tolist() == clip["kept"]
    assert rows.positions[~rows.hidden].tolist() == list(range(len(clip["kept"])))
