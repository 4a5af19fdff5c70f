"""Kinds of targets: figures where they are known, and that each kind sees its clips."""

import pytest

from sparrow_hf.generation import caches
from sparrow_hf.measurement import Arm
from sparrow_hf.metrics import Run
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import TRAIN_SEEDS
from sparrow_research.kind_targets import KINDS, Kind
from sparrow_research.kinds import CarryingArm, prompts_of, summary


def _run(tokens: int, rounds: int, seconds: float, verify_seconds: float | None = None) -> Run:
    return Run(
        new_tokens=tokens + 1,
        decode_tokens=tokens,
        rounds=rounds,
        accepted=[],
        num_draft_levels=5,
        prefill_seconds=100.0,
        decode_seconds=seconds,
        verify_seconds=verify_seconds,
    )


def test_times_are_ratios_to_the_plain_call_next_to_each() -> None:
    # The machine was half as fast during the third pair: a step took 2, 2 and 4 seconds.
    plain = [_run(12, 12, 24.0), _run(12, 12, 24.0), _run(12, 12, 48.0)]
    # A round took 3, 5 and 8 seconds.
    runs = [_run(12, 3, 12.0, 9.0), _run(12, 3, 24.0, 15.0), _run(12, 3, 32.0, 24.0)]
    assert summary(plain, runs) == {"tau": 4.0, "round": 2.0, "speed": 1.5, "speed_of_rounds": 2.0}


def test_what_is_carried_is_as_before_afterwards() -> None:
    before = caches.MAX_CARRIED
    with pytest.raises(KeyError), CarryingArm(Arm("plain"), max_carried=0).carrying():
        assert caches.MAX_CARRIED == 0
        raise KeyError
    assert caches.MAX_CARRIED == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_targets_read_clips(kind: Kind) -> None:
    processor = build_processor(kind)
    target = build_target(processor.tokenizer, 4, family=kind)
    (prompt,) = prompts_of(processor, TRAIN_SEEDS[:1])
    assert len(processor.tokenizer) <= target.config.text_config.vocab_size
    assert target(**prompt).logits.isfinite().all()
    blank = prompt | {"pixel_values_videos": prompt["pixel_values_videos"] * 0}
    # The video is seen.
    assert not target(**prompt).logits[0, -1].equal(target(**blank).logits[0, -1])
