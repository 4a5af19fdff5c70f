"""Every figure on runs small enough to work it out by hand."""

import pytest
import torch

from sparrow_hf import GenerationStats
from sparrow_hf.clocks import PhaseClock
from sparrow_hf.metrics import Run, acceptance, bootstrap, end_to_end_ratio, pooled_tau, speed, spread, walltime_ratio


def run(accepted: list[int], *, prefill: float = 1.0, decode: float = 1.0, levels: int = 3) -> Run:
    """A run in which every round ended with a token of the target's own."""
    decode_tokens = sum(count + 1 for count in accepted)
    return Run(
        new_tokens=decode_tokens + 1,
        decode_tokens=decode_tokens,
        rounds=len(accepted),
        accepted=accepted,
        num_draft_levels=levels,
        prefill_seconds=prefill,
        decode_seconds=decode,
    )


def test_acceptance_by_hand():
    # Rounds of both runs: 3 0 1 1 | 2. Tokens after the prefill: 9 + 3.
    figures = acceptance([run([3, 0, 1, 1]), run([2])])
    assert figures.rounds == 5
    assert figures.tau == pytest.approx(12 / 5)
    assert figures.k == pytest.approx(7 / 5)
    assert figures.per_position == pytest.approx([4 / 5, 2 / 5, 1 / 5])
    assert figures.conditional == pytest.approx([4 / 5, 1 / 2, 1 / 2])
    assert figures.histogram == pytest.approx([1 / 5, 2 / 5, 1 / 5, 1 / 5])
    # 4 + 1 rounds and 2 prefills for 10 + 4 tokens.
    assert figures.forwards_per_token == pytest.approx(7 / 14)


def test_tau_pools_rounds_instead_of_averaging_clips():
    long, short = run([0] * 9), run([3])
    assert pooled_tau([long, short]) == pytest.approx(13 / 10)
    assert (pooled_tau([long]) + pooled_tau([short])) / 2 == pytest.approx(2.5)


def test_a_round_that_stops_on_a_drafted_token_counts_no_token_of_the_target():
    stopped = Run(
        new_tokens=4,
        decode_tokens=3,
        rounds=1,
        accepted=[3],
        num_draft_levels=3,
        prefill_seconds=1.0,
        decode_seconds=1.0,
    )
    assert acceptance([stopped]).tau == 3
    assert acceptance([stopped]).k == 3


def test_plain_generate_is_the_unit():
    figures = acceptance([run([0, 0, 0], levels=0)])
    assert (figures.tau, figures.k, figures.forwards_per_token) == (1, 0, 1)
    assert figures.per_position == []
    assert figures.histogram == [1]


def test_positions_nobody_reached_have_no_conditional_acceptance():
    assert acceptance([run([0, 0])]).conditional == [0, 0, 0]


def test_speed_by_hand():
    # 4 tokens after the prefill in each run. Plain: 2 s of prefill, 8 s of decoding; then 4 s and 2 s with a draft.
    plain = [run([0, 0, 0, 0], prefill=2, decode=8)] * 6
    drafted = [run([3], prefill=2, decode=4), run([3], prefill=2, decode=2)]
    figures = speed(plain[:2], drafted)
    assert figures.dsr_per_prompt == [2, 4]
    assert figures.dsr == pytest.approx((3, 2.5, 3.5))  # of 2 and 4
    assert figures.esr == pytest.approx((25 / 12, 45 / 24, 55 / 24))  # of 10/6 and 10/4
    assert figures.prefill_share.median == pytest.approx(0.2)
    assert figures.esr_from_dsr == pytest.approx(1 / (0.2 + 0.8 / 3))
    assert figures.plain_ms_per_token.median == pytest.approx(2000)
    assert figures.ms_per_token.median == pytest.approx(750)
    assert figures.dsr_interval is None
    interval = speed(plain, drafted * 3).dsr_interval
    assert interval is not None and 2 <= interval.lower <= interval.upper <= 4
    # 5 tokens in 6 s and in 4 s, against 5 in 10 s: a ratio of means, which is no mean of ratios of seconds.
    assert walltime_ratio(plain[:2], drafted) == pytest.approx((5 / 6 + 5 / 4) / 2 / (5 / 10))


def test_esr_equals_its_formula_where_prefills_are_equal():
    plain, drafted = run([0] * 6, prefill=3, decode=7), run([2, 2], prefill=3, decode=2.5)
    figures = speed([plain], [drafted])
    assert figures.esr.median == pytest.approx(end_to_end_ratio(0.3, 2.8))
    assert figures.esr.median == pytest.approx(figures.esr_from_dsr)


def test_speed_needs_pairs():
    with pytest.raises(ValueError, match="a plain run of the same prompt"):
        speed([run([1])], [run([1]), run([1])])
    with pytest.raises(ValueError, match="first token"):
        speed([run([])], [run([])])
    with pytest.raises(ValueError, match="at least one"):
        acceptance([])


def test_spread_and_bootstrap():
    assert spread([4, 1, 3, 2]) == (2.5, 1.75, 3.25)
    runs = [run([count]) for count in (0, 1, 2, 3) * 5]
    interval = bootstrap(runs, pooled_tau)
    assert interval == bootstrap(runs, pooled_tau)
    assert 1 < interval.lower < pooled_tau(runs) < interval.upper < 4
    assert bootstrap(runs[:1] * 6, pooled_tau) == (1, 1)
    # Even their range would hold the median in 94 % of all cases only.
    assert bootstrap(runs[:5], pooled_tau) is None


def test_the_statistics_of_a_call_are_the_figures_of_its_run():
    accepted = [3, 0, 1, 1, 2]
    measured = acceptance([run(accepted)])
    stats = GenerationStats(3, PhaseClock(torch.device("cpu")), new_tokens=13, accepted=accepted)
    assert (stats.rounds, stats.tau, stats.k) == (measured.rounds, measured.tau, measured.k) == (5, 12 / 5, 7 / 5)
    assert stats.per_position == measured.per_position
    idle = GenerationStats(2, PhaseClock(torch.device("cpu")), new_tokens=1)
    assert (idle.rounds, idle.tau, idle.k, idle.per_position) == (0, 0.0, 0.0, [0.0, 0.0])
