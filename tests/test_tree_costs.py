"""Predicted costs of shapes, and the choice among them, against costs that are known exactly."""

import pytest

from sparrow_hf import TreeShape
from sparrow_hf.tree_costs import ROOT_ALONE, Costs, Pace, Rounds, assumed_costs, candidates, choose, speed_up
from sparrow_hf.tree_shapes import chain, parse_tree_shape, tree_name

PLAIN, PREFILL, TOKENS = 0.010, 0.020, 100.0


def known_costs(alpha: float, level: float, node: float, tree: Rounds | None = None) -> Costs:
    """Every drafted token is accepted with probability `alpha`; of a chain of D, the draft takes 2 + D · level ms and
    verification 10 + D · node ms."""

    def rounds(depth: int) -> Rounds:
        shares = tuple(alpha**j for j in range(1, depth + 1))
        return Rounds(1 + sum(shares), shares, (2 + depth * level) / 1000, (10 + depth * node) / 1000)

    found = {ROOT_ALONE: rounds(0)} | {chain(depth): rounds(depth) for depth in (2, 5, 16)}
    return Costs(PLAIN, PREFILL, TOKENS, found if tree is None else found | {TreeShape(24, 8, 4): tree})


def exact_seconds_per_token(alpha: float, level: float, node: float, depth: int) -> float:
    tau = sum(alpha**j for j in range(depth + 1))
    return (12 + depth * (level + node)) / 1000 / tau + PREFILL / TOKENS


def test_depths_that_were_not_measured_are_predicted() -> None:
    costs = known_costs(0.9, 0.5, 0.25)
    assert costs.draft_line == pytest.approx((0.002, 0.0005))
    assert costs.verify_line == pytest.approx((0.010, 0.00025))
    for depth in (1, 2, 4, 9, 16):
        pace = costs.predict(chain(depth))
        assert 1 / pace.tokens_per_second == pytest.approx(exact_seconds_per_token(0.9, 0.5, 0.25, depth))


@pytest.mark.parametrize(
    ("alpha", "level", "node"),
    [(0.9, 0.5, 0.25), (0.8, 0.5, 0.25), (0.6, 1.0, 0.5), (0.98, 0.1, 0.0), (0.3, 2.0, 2.0)],
)
def test_the_fastest_depth_comes_first(alpha: float, level: float, node: float) -> None:
    speeds = candidates([known_costs(alpha, level, node)])
    exact = {depth: PLAIN / exact_seconds_per_token(alpha, level, node, depth) for depth in range(1, 17)}
    assert next(iter(speeds)) == chain(max(exact, key=exact.__getitem__))
    assert {shape.num_draft_levels: speed for shape, speed in speeds.items()} == pytest.approx(exact)


def test_acceptance_of_a_depth_is_that_of_the_nearest_deeper_chain() -> None:
    rounds = {
        ROOT_ALONE: Rounds(1.0, (), 0.0, 0.01),
        chain(2): Rounds(2.3, (0.8, 0.5), 0.0, 0.01),
        chain(4): Rounds(2.5, (0.6, 0.4, 0.3, 0.2), 0.0, 0.01),
    }
    costs = Costs(0.01, 0.0, 1.0, rounds)
    assert [costs.predict(chain(depth)).tau for depth in (1, 2, 3, 4)] == pytest.approx([1.8, 2.3, 2.3, 2.5])


def test_a_tree_is_as_fast_as_it_was() -> None:
    costs = known_costs(0.5, 1.0, 1.0, Rounds(tau=6.0, per_position=(), draft_seconds=0.006, verify_seconds=0.012))
    pace = costs.predict(TreeShape(24, 8, 4))
    assert pace.tau == 6.0 and pace.round_seconds == pytest.approx(0.018 + PREFILL * 6 / TOKENS)
    assert next(iter(candidates([costs]))) == TreeShape(24, 8, 4)


def test_all_lengths_count_alike() -> None:
    # Twice as fast at one length, half as fast at the other.
    assert speed_up([0.01, 0.1], [Pace(2.0, 0.01), Pace(1.0, 0.2)]) == pytest.approx(1.0)
    deep, shallow = known_costs(0.98, 0.1, 0.0), known_costs(0.3, 2.0, 2.0)
    chosen = next(iter(candidates([deep, shallow]))).num_draft_levels
    depths = [next(iter(candidates([costs]))).num_draft_levels for costs in (shallow, deep)]
    assert depths[0] <= chosen <= depths[1] and depths[0] < depths[1]


def test_the_smallest_of_equally_fast_shapes_is_chosen() -> None:
    assert choose({chain(14): 4.00, chain(11): 3.93, chain(9): 3.91}) == chain(11)
    assert choose({chain(5): 3.0, TreeShape(24, 8, 4): 4.0}) == TreeShape(24, 8, 4)


def test_assumed_costs_are_those_of_the_built_in_models() -> None:
    costs = assumed_costs([0.9, 0.81])
    assert costs.predict(chain(5)).round_seconds == pytest.approx(1.575)
    assert costs.predict(chain(4)).tau == pytest.approx(1 + 0.9 + 0.81 + 0.9**3 + 0.9**4)
    deep, shallow = (choose(candidates([assumed_costs([alpha])])) for alpha in (0.95, 0.5))
    assert shallow.num_draft_levels < 5 < deep.num_draft_levels


@pytest.mark.parametrize("name", ["none", "chain-1", "chain-12", "24-8-4"])
def test_a_shape_has_the_name_that_is_read_as_it(name: str) -> None:
    assert tree_name(parse_tree_shape(name)) == name
