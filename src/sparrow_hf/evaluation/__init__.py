"""Benchmarks: several arms on the same inputs, and the figures computed from them."""

from ..clocks import StopWatch
from ..configuration_sparrow import parse_tree_shape as parse_tree
from ..measurement import Arm, compare, first_difference, measure, warm_up
from ..metrics import Acceptance, Interval, Run, Speed, Spread, acceptance, end_to_end_ratio, speed, spread
from ..prefill import PrefillSnapshot
from ..streaming import ProvenanceStreamer
from .arms import Arms
from .benchmark import Benchmark, Prompt
from .results import write_results
from .run_file import RunFile

__all__ = [
    "Acceptance",
    "Arm",
    "Arms",
    "Benchmark",
    "Interval",
    "PrefillSnapshot",
    "Prompt",
    "ProvenanceStreamer",
    "Run",
    "RunFile",
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
    "write_results",
]
