"""The simulation of rounds on recurrent targets, where its outcome is known."""

import pytest

from sparrow_research.recurrent_cost import BUDGETS, LEVELS, ROWS, acceptance_for, between, counted, speed


@pytest.mark.parametrize("strategy", ["rows", "reread", *BUDGETS])
def test_without_rejections_every_strategy_is_the_same(strategy: str | int) -> None:
    assert speed(lambda rows: 1.0, 1.0, strategy) == LEVELS + 1


def test_if_every_draft_is_rejected() -> None:
    one, row = (lambda rows: 1.0), (lambda rows: float(rows))
    # A token takes two forwards, or one and a forward of its own; every second round drafts nothing; or none does.
    assert speed(one, 0.0, "reread") == 0.5
    assert speed(one, 0.0, 0) == speed(one, 0.0, "rows") == 1.0
    # Rounds of LEVELS + 1 rows, and of two without drafts.
    assert speed(row, 0.0, 0) == 2 / (LEVELS + 1 + 2)


def test_costs_between_measured_ones() -> None:
    cost = between({1: 1.0, 4: 4.0, 8: 6.0})
    assert [cost(rows) for rows in (1, 2, 4, 6, 8, 100)] == [1.0, 2.0, 4.0, 5.0, 6.0, 6.0]


def test_a_tau_is_that_of_chains_that_can_drop_rows() -> None:
    assert acceptance_for(LEVELS + 1) == pytest.approx(1.0)
    assert acceptance_for(1.0) == pytest.approx(0.0, abs=1e-9)
    found = counted({rows: 7.0 * rows for rows in ROWS})
    for tau in ("2.0", "2.5", "3.0"):
        # A forward of LEVELS + 1 rows gives τ tokens.
        assert found["forwards"]["rows"][tau] == pytest.approx(1 / float(tau), rel=0.02)
        assert found["rows"]["rows"][tau] == pytest.approx((LEVELS + 1) / float(tau), rel=0.02)
        assert found["calls"]["reread"][tau] == pytest.approx(found["rows"]["reread"][tau], rel=0.01)
