"""Measuring: arms side by side on the same inputs, and the figures that come out of it."""

from ..generation.stopwatch import StopWatch
from .comparison import Arm, compare, first_difference, measure, parse_tree, warm_up
from .metrics import Acceptance, Interval, Run, Speed, Spread, acceptance, end_to_end_ratio, speed, spread
from .streaming import ProvenanceStreamer

__all__ = [
    "Acceptance",
    "Arm",
    "Interval",
    "ProvenanceStreamer",
    "Run",
    "Speed",
    "Spread",
    "StopWatch",
    "acceptance",
    "compare",
    "end_to_end_ratio",
    "first_difference",
    "measure",
    "parse_tree",
    "spread",
    "speed",
    "warm_up",
]
