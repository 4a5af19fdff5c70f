"""What a round costs and gives by the shape of its tree, and which shape pays. Pure functions of measurements.

A round of a chain of D levels takes

    fixed + D · level + first + D · node        seconds, and gives        1 + a_1 + … + a_D        tokens,

where `fixed` is what the draft does once per round (it reads the accepted tokens), `level` one of its levels, `first`
and `node` everything else for the root and for each further node, and `a_j` how often the j-th drafted token is
accepted. The draft's prefill, once per call, is spread over the tokens of an answer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from . import metrics
from .tree_shapes import TREE_PRESETS, TreeShape, chain

ROOT_ALONE = TREE_PRESETS["none"]
#: Of shapes that are slower than the fastest by no more than this share, the one with the fewest nodes is chosen.
TOLERANCE = 0.02
#: Deepest chain that is considered.
MAX_DEPTH = 16


@dataclass(frozen=True)
class Rounds:
    """Measured rounds of one shape.

    Attributes:
        tau: Tokens per round.
        per_position: `a_1` … `a_levels`.
        draft_seconds: Of the draft, per round, without its prefill.
        verify_seconds: Of everything else per round: the target's forward, walk and commit.
    """

    tau: float
    per_position: tuple[float, ...]
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class Pace:
    """How fast a shape decodes: predicted, or measured.

    Attributes:
        tau: Tokens per round.
        round_seconds: Of a round, with its share of the draft's prefill.
    """

    tau: float
    round_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tau / self.round_seconds


@dataclass(frozen=True)
class Costs:
    """What was measured on prompts of one length.

    Attributes:
        plain_seconds: Of plain `generate()`, per token.
        prefill_seconds: Of the draft's prefill, per call.
        answer_tokens: Tokens of an answer after the prefill's.
        rounds: Shape → its rounds: the root alone, chains of two depths or more, and trees.
    """

    plain_seconds: float
    prefill_seconds: float
    answer_tokens: float
    rounds: dict[TreeShape, Rounds]

    @property
    def chains(self) -> dict[int, Rounds]:
        """Depth → rounds of the measured chains, shallowest first."""
        found = {shape.num_draft_levels: shape for shape in self.rounds if shape.beam_width == 1}
        return {depth: self.rounds[found[depth]] for depth in sorted(found) if depth > 0}

    @property
    def draft_line(self) -> tuple[float, float]:
        """`fixed` and `level`: the line through the draft's seconds per round by depth."""
        return self._line([rounds.draft_seconds for rounds in self.chains.values()])

    @property
    def verify_line(self) -> tuple[float, float]:
        """`first` and `node`: the line through the other seconds per round by depth."""
        return self._line([rounds.verify_seconds for rounds in self.chains.values()])

    def _line(self, seconds: Sequence[float]) -> tuple[float, float]:
        slope, start = np.polyfit(list(self.chains), seconds, 1)
        return float(start), float(slope)

    def predict(self, shape: TreeShape) -> Pace:
        """The pace of a chain no deeper than the deepest measured one, or of a measured tree.

        A chain's acceptance is that of the shallowest measured chain that is as deep: deeper ones start their rounds
        at other tokens.
        """
        if shape.beam_width == 1:
            (fixed, level), (first, node) = self.draft_line, self.verify_line
            depth = shape.num_draft_levels
            seconds = fixed + depth * level + first + depth * node
            as_deep = next(rounds for measured, rounds in self.chains.items() if measured >= depth)
            tau = 1 + sum(as_deep.per_position[:depth])
        else:
            rounds = self.rounds[shape]
            tau, seconds = rounds.tau, rounds.draft_seconds + rounds.verify_seconds
        return Pace(tau, seconds + self.prefill_seconds * tau / self.answer_tokens)


def speed_up(plain_seconds: Iterable[float], paces: Iterable[Pace]) -> float:
    """Tokens per second over those of plain `generate()`: the geometric mean over lengths."""
    logs = [math.log(seconds * pace.tokens_per_second) for seconds, pace in zip(plain_seconds, paces, strict=True)]
    return math.exp(sum(logs) / len(logs))


def candidates(costs: Sequence[Costs]) -> dict[TreeShape, float]:
    """Every shape that can be predicted at all lengths → its predicted speed-up, fastest first."""
    deepest = min(max(each.chains) for each in costs)
    trees = [shape for shape in costs[0].rounds if shape.beam_width > 1]
    shapes = [*map(chain, range(1, deepest + 1)), *trees]
    plain = [each.plain_seconds for each in costs]
    speeds = {shape: speed_up(plain, [each.predict(shape) for each in costs]) for shape in shapes}
    return dict(sorted(speeds.items(), key=lambda item: -item[1]))


def choose(speeds: dict[TreeShape, float]) -> TreeShape:
    """The smallest shape that is as fast as the fastest, up to [`TOLERANCE`]."""
    enough = max(speeds.values()) * (1 - TOLERANCE)
    return min((shape for shape, speed in speeds.items() if speed >= enough), key=lambda shape: shape.num_tree_nodes)


def assumed_costs(per_position: Sequence[float]) -> Costs:
    """Costs where none were measured, in steps of plain `generate()`, with a measured acceptance.

    A round is taken to cost 1.1 + 0.025 for each drafted token to verify it, 0.05 for each level to draft it, and 0.1
    fixed: a chain of 5 takes 1.58 steps, as measured on the built-in models. Positions beyond the measured ones are
    accepted as the last of them is, given the one before it.

    Args:
        per_position: `a_1`, `a_2` …, at least one.
    """
    shares = list(per_position)[:MAX_DEPTH]
    last = metrics.conditional(shares)[-1]
    while len(shares) < MAX_DEPTH:
        shares.append(shares[-1] * last)

    def rounds(depth: int) -> Rounds:
        taken = tuple(shares[:depth])
        return Rounds(1 + sum(taken), taken, 0.1 + 0.05 * depth if depth else 0.0, 1.1 + 0.025 * depth)

    return Costs(1.0, 0.0, 1.0, {chain(depth): rounds(depth) for depth in (0, 1, MAX_DEPTH)})
