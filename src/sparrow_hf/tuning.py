"""Chooses the shape of a draft's tree from what its rounds cost and give on this machine: `sparrow tune`.

First, a few chains of different depths and a few trees decode the prompts. From their rounds, `tree_costs` predicts
the speed of every shape. Then the best few decode the prompts again, beside plain `generate()`, and the fastest is
chosen.
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .artifacts import atomic_files, write_json, write_text
from .checksums import read_json
from .data.prepare import to_target
from .errors import BenchmarkError, DraftLoadError
from .generation.integration import follow
from .generation.self_check import how_to_verify
from .hub import AGAIN
from .measurement import PLAIN, Arm, compare, measure, prefill_once, warm_up
from .metrics import Run, acceptance, conditional, pooled_tau
from .model_card import PROVENANCE_FILE, read_provenance
from .modeling_sparrow import SparrowDraftModel
from .tree_costs import MAX_DEPTH, ROOT_ALONE, Costs, Pace, Rounds, candidates, choose, speed_up
from .tree_shapes import TreeShape, chain, parse_tree_shape, tree_name

#: Depths of the chains whose rounds are measured; those in between are predicted.
DEPTHS = (2, 5, 8, 12, MAX_DEPTH)
TREES = ("24-8-4",)
#: How many of the predicted shapes decode again. Depths that differ by less than a quarter are no two candidates.
NUM_VERIFIED = 3
#: Tokens of the shortest answer with a draft: the prefill's, one that is drafted, and the target's own behind it.
SHORTEST_DRAFTED = 3

Read = Callable[[], Mapping[str, Tensor]]
"""Gives the inputs of one prompt, as the target's processor returned them."""

Progress = Callable[[int, int, float], None]
"""Called with the calls of `generate()` that are done, all calls, and the seconds that all may take; first after the
warm-up, with no call done."""


@dataclass(frozen=True)
class Length:
    """What was measured on the prompts of one length.

    Attributes:
        prompts: How many could be decoded.
        identical: How many calls of the second part gave plain `generate()`'s tokens, and how many there were.
        costs: From the first part.
        plain_seconds, measured: From the second part: of plain `generate()` per token, and the pace of each shape.
    """

    prompts: int
    identical: tuple[int, int]
    costs: Costs
    plain_seconds: float
    measured: dict[TreeShape, Pace]


@dataclass(frozen=True)
class Tuning:
    """The outcome of [`tune`].

    Attributes:
        shape: The shape to use.
        configured: The shape the draft had.
        lengths: Name of each length → what was measured.
        predicted, measured: Shape → tokens per second over plain `generate()`'s, over all lengths; all shapes, and
            those that decoded again.
    """

    shape: TreeShape
    configured: TreeShape
    lengths: dict[str, Length]
    predicted: dict[TreeShape, float]
    measured: dict[TreeShape, float]

    def rows(self) -> list[dict[str, Any]]:
        """Of every length and every shape that decoded again, the predicted figures beside the measured ones.

        `round` is in steps of plain `generate()` of the same part.
        """
        return [
            {"length": name, "shape": tree_name(shape)}
            | _figures("predicted", length.costs.predict(shape), length.costs.plain_seconds)
            | _figures("measured", pace, length.plain_seconds)
            for name, length in self.lengths.items()
            for shape, pace in length.measured.items()
        ]

    def evidence(self, **details: Any) -> dict[str, Any]:
        """What is written beside the draft, as JSON types: the choice, its measurements, and whatever is named."""
        return {
            "shape": tree_name(self.shape),
            "configured": tree_name(self.configured),
            "speed_up": {tree_name(shape): round(speed, 3) for shape, speed in self.measured.items()},
            "costs": {name: _described(length) for name, length in self.lengths.items()},
            "table": self.rows(),
            **details,
        }


def tune(
    draft: SparrowDraftModel,
    target: PreTrainedModel,
    prompts: Mapping[str, Sequence[Read]],
    *,
    trees: Sequence[str] = TREES,
    num_verified: int = NUM_VERIFIED,
    repeats: int = 1,
    max_new_tokens: int = 128,
    progress: Progress | None = None,
    **settings: Any,
) -> Tuning:
    """Measures a draft on this machine and chooses the shape of its tree; the draft keeps the shape it has.

    Use the answer with `draft.config.set_tree_shape(tuning.shape)`, or write it with [`write_shape`].

    Args:
        draft, target: The models, on their device.
        prompts: Name of a length → its prompts. The shape is best over all lengths, each with the same weight.
        trees: Trees to consider beside the chains of up to 16 tokens.
        num_verified: How many of the predicted shapes decode again; the draft's own one does too.
        repeats: How often each shape decodes each prompt; the call of median time counts.
        max_new_tokens: Maximum length of an answer.
        progress: See [`Progress`].
        settings: Further arguments of `generate()`; greedy by default.

    Raises:
        BenchmarkError: There is no prompt, the answers to all prompts of a length are single tokens, or none may be
            long enough for a draft.
        BindingError: The draft was made for another target.
    """
    if not prompts or not all(prompts.values()) or num_verified < 1 or repeats < 1:
        raise BenchmarkError("tuning needs at least one prompt of each length, one shape to verify and one repeat")
    if max_new_tokens < SHORTEST_DRAFTED:
        raise BenchmarkError(
            f"answers of at most {max_new_tokens} tokens leave no room for a draft: ask for at least "
            f"{SHORTEST_DRAFTED} (max_new_tokens)"
        )
    follow(draft, target)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | settings
    configured = draft.config.tree_shape
    shapes = [ROOT_ALONE, *map(chain, DEPTHS)]
    if how_to_verify(draft.target).trees is not None:
        shapes += [shape for shape in map(parse_tree_shape, trees) if shape not in shapes]
    if configured not in shapes and (configured.beam_width > 1 or configured.num_draft_levels > MAX_DEPTH):
        # It decodes again beside the best, and its costs follow from no other shape's.
        shapes.append(configured)
    arms = _arms(draft, shapes)
    calls = (len(arms) + num_verified + 2) * repeats + 1
    done, total = 0, calls * sum(map(len, prompts.values()))
    seconds = 0.0
    for reads in prompts.values():
        inputs = to_target(reads[0](), target)
        warm_up(target, arms, inputs, settings, shared_prefill=True)
        plain, _ = measure(target, arms[0], inputs, settings)
        # Each part computes a prompt once. No call decodes for much longer than a plain one.
        seconds += len(reads) * (2 * plain.prefill_seconds + calls * plain.decode_seconds)

    def advance(calls: int) -> None:
        nonlocal done
        done += calls
        if progress is not None:
            progress(done, total, seconds)

    advance(0)
    costs = {}
    for name, reads in prompts.items():
        parts = []
        for turn, read in enumerate(reads):
            parts.append(_cost_runs(target, arms, to_target(read(), target), settings, turn, repeats))
            advance(len(arms) * repeats + 1)
        costs[name] = costs_of(name, shapes, parts)
    predicted = candidates(list(costs.values()))
    again = [*_apart(predicted, num_verified), configured]
    arms = _arms(draft, list(dict.fromkeys(again)))
    lengths = {}
    for name, reads in prompts.items():
        runs = []
        for turn, read in enumerate(reads):
            runs.append(
                compare(target, arms, to_target(read(), target), settings, turn, repeats=repeats, shared_prefill=True)
            )
            advance((num_verified + 2) * repeats)
        lengths[name] = _measured(costs[name], arms, runs)
    per_token = [length.plain_seconds for length in lengths.values()]
    measured = {
        arm.tree: speed_up(per_token, [length.measured[arm.tree] for length in lengths.values()])
        for arm in arms
        if arm.tree is not None
    }
    return Tuning(choose(measured), configured, lengths, predicted, measured)


def costs_of(name: str, shapes: Sequence[TreeShape], parts: Sequence[tuple[dict[str, Run], float]]) -> Costs:
    """The costs at one length.

    Args:
        name: Of the length.
        shapes: The shapes that decoded, each an arm with its [`tree_name`].
        parts: Of each prompt, the runs of all arms, and the seconds of the draft's prefill.

    Raises:
        BenchmarkError: No answer got past its first token.
    """
    parts = [(runs, prefill) for runs, prefill in parts if runs[PLAIN].decode_tokens]
    if not parts:
        raise BenchmarkError(
            f"every prompt of length {name} is answered with a single token, so there is nothing to decode: ask for "
            "longer answers"
        )
    rounds = {}
    for shape in shapes:
        runs = [(runs[tree_name(shape)], prefill if shape.num_draft_levels else 0.0) for runs, prefill in parts]
        rounds[shape] = Rounds(
            tau=pooled_tau([run for run, _ in runs]),
            per_position=tuple(acceptance([run for run, _ in runs]).per_position),
            draft_seconds=max(
                statistics.median(((run.draft_seconds or 0.0) - prefill) / run.rounds for run, prefill in runs), 0.0
            ),
            verify_seconds=statistics.median(
                (run.decode_seconds - (run.draft_seconds or 0.0)) / run.rounds for run, _ in runs
            ),
        )
    plain = [runs[PLAIN] for runs, _ in parts]
    return Costs(
        plain_seconds=statistics.median(run.seconds_per_token for run in plain),
        prefill_seconds=statistics.median(prefill for _, prefill in parts),
        answer_tokens=statistics.mean(run.decode_tokens for run in plain),
        rounds=rounds,
    )


def write_shape(folder: str | os.PathLike[str], shape: TreeShape, evidence: Mapping[str, Any]) -> None:
    """Writes a shape into the `config.json` of a saved draft, and its evidence into `PROVENANCE.json` as `tuned`.

    The weights and their digest stay as they are. Whoever loads the draft meanwhile gets the old shape or the new one.

    Raises:
        DraftLoadError: The folder holds no draft.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise DraftLoadError(f"{folder} holds no config.json of a draft: give the folder that save_pretrained wrote")
    with atomic_files(folder, CONFIG_NAME, lambda name: False) as partial:
        config = read_json(folder / CONFIG_NAME, DraftLoadError, AGAIN) | shape._asdict()
        # As transformers writes it.
        write_text(partial / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_json(partial / PROVENANCE_FILE, read_provenance(folder) | {"tuned": dict(evidence)}, indent=2)


def _arms(draft: SparrowDraftModel, shapes: Sequence[TreeShape]) -> list[Arm]:
    return [Arm(PLAIN), *(Arm(tree_name(shape), draft, shape) for shape in shapes)]


def _cost_runs(
    target: PreTrainedModel,
    arms: Sequence[Arm],
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    turn: int,
    repeats: int,
) -> tuple[dict[str, Run], float]:
    """The runs of all arms on one prompt, and the seconds of the draft's prefill."""
    prefill = prefill_once(target, arms, inputs, settings)
    runs = compare(target, arms, inputs, settings, turn, repeats=repeats, prefill=prefill)
    # The round of an answer of two tokens has no room for a draft: all the draft does is its prefill.
    short, _ = measure(target, arms[-1], inputs, {**settings, "max_new_tokens": 2}, prefill=prefill)
    return runs, short.draft_seconds or 0.0


def _apart(speeds: Mapping[TreeShape, float], count: int) -> list[TreeShape]:
    """The fastest shapes, fastest first, leaving out chains that are almost as deep as a faster one."""

    def are_alike(one: TreeShape, other: TreeShape) -> bool:
        depths = sorted((one.num_draft_levels, other.num_draft_levels))
        return one.beam_width == other.beam_width == 1 and 4 * (depths[1] - depths[0]) < depths[1]

    found: list[TreeShape] = []
    for shape in speeds:
        if len(found) < count and not any(are_alike(shape, other) for other in found):
            found.append(shape)
    return found


def _measured(costs: Costs, arms: Sequence[Arm], runs: Sequence[Mapping[str, Run]]) -> Length:
    decoded = [each for each in runs if each[PLAIN].decode_tokens]
    paces = {}
    for arm in arms[1:]:
        of_arm = [each[arm.name] for each in decoded]
        seconds = statistics.median(run.decode_seconds / run.rounds for run in of_arm)
        paces[arm.tree or ROOT_ALONE] = Pace(pooled_tau(of_arm), seconds)
    same = [run.differs_at is None for each in decoded for name, run in each.items() if name != PLAIN]
    plain_seconds = statistics.median(each[PLAIN].seconds_per_token for each in decoded)
    return Length(len(decoded), (sum(same), len(same)), costs, plain_seconds, paces)


def _figures(kind: str, pace: Pace, plain_seconds: float) -> dict[str, float]:
    return {
        f"{kind}_tau": round(pace.tau, 3),
        f"{kind}_round": round(pace.round_seconds / plain_seconds, 3),
        f"{kind}_tokens_per_second": round(pace.tokens_per_second, 2),
    }


def _described(length: Length) -> dict[str, Any]:
    costs = length.costs
    fixed, level = costs.draft_line
    deepest = costs.chains[max(costs.chains)]
    return {
        "prompts": length.prompts,
        "identical": list(length.identical),
        "plain_ms_per_token": _ms(costs.plain_seconds),
        "draft_level_ms": _ms(level),
        "draft_fixed_ms": _ms(fixed),
        "draft_prefill_ms": _ms(costs.prefill_seconds),
        "verify_ms": {tree_name(shape): _ms(rounds.verify_seconds) for shape, rounds in costs.rounds.items()},
        "acceptance": [round(share, 3) for share in conditional(deepest.per_position)],
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
