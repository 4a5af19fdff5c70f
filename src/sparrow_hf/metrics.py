"""The figures of merit of `generate()` calls, each defined and computed here. Pure functions. By what the depth of a
chain is chosen is in `tree_costs.py`.

* τ, tokens per target forward after the prefill, and k, accepted draft tokens per round. A round is one target forward
  after the prefill. Both are pooled: totals over all clips, not a mean of means.
* `a_j = P(k ≥ j)`, how often the j-th drafted token of a round was accepted, and `α_j = a_j / a_(j−1)`, how often it
  was if the one before it was.
* DSR, decode speed-up ratio: seconds per token after the prefill, plain over speculative. The draft's own prefill and
  its first tree are inside the speculative time.
* ESR, end-to-end speed-up ratio: seconds of the whole call, plain over speculative, for the same tokens.
* Wall-time ratio, as Spec-Bench defines it: mean over prompts of tokens per second of the whole call, speculative over
  plain.

Decoding videos and the processor are outside of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0
LEAST_SAMPLES = 6
"""Fewer samples have no confidence interval."""


@dataclass(frozen=True)
class Run:
    """One measured `generate()` call.

    Attributes:
        new_tokens: Tokens generated.
        decode_tokens: Those of them that came after the prefill.
        rounds: Target forwards after the prefill.
        accepted: Accepted draft tokens of each round.
        num_draft_levels: Maximum number of tokens that a round could accept.
        prefill_seconds: From the call of `generate()` to its first token: video encoder and prefill.
        decode_seconds: From the first token to the return of `generate()`.
        differs_at: Index of the first generated token that is not plain `generate()`'s; `None` if all are.
        draft_seconds, verify_seconds: Parts of the decode time, measured in our loop; `None` without a Sparrow draft.
        draft_cache_rows: Maximum length of the draft's cache; `None` without a Sparrow draft.
        peak_bytes: Peak memory of the call beyond what was allocated before; `None` on a CPU.
        asked: Class of words → number of its tokens that were requested of the draft, and number that were accepted
            (see [`count_asked`]); `None` without classes.
        first_call_seconds: Of the untimed call before, in which a compiled arm may compile; `None` in others.
    """

    new_tokens: int
    decode_tokens: int
    rounds: int
    accepted: list[int]
    num_draft_levels: int
    prefill_seconds: float
    decode_seconds: float
    differs_at: int | None = None
    draft_seconds: float | None = None
    verify_seconds: float | None = None
    draft_cache_rows: int | None = None
    peak_bytes: int | None = None
    asked: dict[str, list[int]] | None = None
    first_call_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """The whole call."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def seconds_per_token(self) -> float:
        """Seconds per token after the prefill."""
        return self.decode_seconds / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def prefill_share(self) -> float:
        """Share of the prefill in the whole call."""
        return self.prefill_seconds / self.seconds


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    lower: float
    upper: float


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Acceptance:
    """Acceptance, pooled over runs.

    Attributes:
        rounds: Target forwards after the prefills.
        tau, k: See the head of this module. `tau` is `k + 1`, but for rounds that stop on a drafted token.
        tau_interval: Confidence interval of `tau`, by resampling clips; `None` for too few (see [`bootstrap`]).
        per_position: `a_1` … `a_levels`.
        conditional: `α_1` … `α_levels`; 0 where no round got that far.
        histogram: Share of rounds that accepted 0 … `levels` tokens.
        forwards_per_token: Target forwards, prefills included, per generated token: 1 for plain `generate()`.
    """

    rounds: int
    tau: float
    k: float
    tau_interval: Interval | None
    per_position: list[float]
    conditional: list[float]
    histogram: list[float]
    forwards_per_token: float


@dataclass(frozen=True)
class Speed:
    """How much faster an arm is than plain `generate()` on the same clips.

    Attributes:
        dsr, esr: Ratios of the paired runs.
        dsr_per_prompt: DSR of each pair, in their order.
        dsr_interval: Confidence interval of the median DSR, by resampling clips; `None` for too few.
        prefill_share: Of the plain runs.
        esr_from_dsr: `1 / (p + (1 − p) / DSR)` from the medians of prefill share p and DSR: what ESR must come to.
        plain_ms_per_token, ms_per_token: Milliseconds per token after the prefill.
    """

    dsr: Spread
    esr: Spread
    dsr_per_prompt: list[float]
    dsr_interval: Interval | None
    prefill_share: Spread
    esr_from_dsr: float
    plain_ms_per_token: Spread
    ms_per_token: Spread


def tau(decode_tokens: int, rounds: int) -> float:
    """τ from the tokens after the prefill and the rounds; 0 without a round, as all shares of rounds are."""
    return _ratio(decode_tokens, rounds)


def accepted_per_round(accepted: int, rounds: int) -> float:
    """k from the accepted draft tokens of all rounds together."""
    return _ratio(accepted, rounds)


def count_reaching(accepted: Sequence[int], levels: int) -> list[int]:
    """How many rounds accepted at least 1, 2 … `levels` tokens, from the accepted tokens of each round."""
    return [sum(count >= level for count in accepted) for level in range(1, levels + 1)]


def per_position(reaching: Sequence[int], rounds: int) -> list[float]:
    """`a_1`, `a_2` … from what [`count_reaching`] counts; such counts add up over runs."""
    return [_ratio(count, rounds) for count in reaching]


def conditional(shares: Sequence[float]) -> list[float]:
    """`α_1`, `α_2` … from `a_1`, `a_2` …; 0 where no round got that far."""
    return [_ratio(share, before) for before, share in zip([1.0, *shares], shares, strict=False)]


def acceptance(runs: Sequence[Run]) -> Acceptance:
    """Pools the acceptance of several runs of one arm.

    Raises:
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("acceptance needs at least one run")
    levels = max(run.num_draft_levels for run in runs)
    accepted = [count for run in runs for count in run.accepted]
    rounds = len(accepted)
    shares = per_position(count_reaching(accepted, levels), rounds)
    return Acceptance(
        rounds=rounds,
        tau=pooled_tau(runs),
        k=accepted_per_round(sum(accepted), rounds),
        tau_interval=bootstrap(runs, pooled_tau),
        per_position=shares,
        conditional=conditional(shares),
        histogram=[_ratio(accepted.count(count), rounds) for count in range(levels + 1)],
        forwards_per_token=_ratio(sum(run.rounds + 1 for run in runs), sum(run.new_tokens for run in runs)),
    )


def count_asked(
    tokens: Sequence[int],
    accepted: Sequence[int],
    num_draft_levels: int,
    max_new_tokens: int,
    is_content: Callable[[int], bool],
) -> dict[str, list[int]]:
    """How many tokens of content and of function words were requested of the draft, and how many were accepted.

    A round requests its accepted tokens and the token in place of the first rejected one. The token after a draft that
    was accepted to the end was not requested. The prefill's token belongs to no round.

        round   a1 a2 x          accepted 2 of 5: 3 requested
        round   a1 a2 a3 a4 a5 + accepted 5 of 5: 5 requested

    Args:
        tokens: Generated tokens, the prefill's first.
        accepted: Accepted draft tokens of each round.
        num_draft_levels: Maximum number of tokens that a round drafts.
        max_new_tokens: Maximum length of the text; rounds close to it draft less.
        is_content: Whether a token id belongs to a content word.

    Returns:
        `{"content": [asked, accepted], "function": [asked, accepted]}`.
    """
    counts = {"content": [0, 0], "function": [0, 0]}
    start = 1
    for taken in accepted:
        levels = min(num_draft_levels, max_new_tokens - start - 1)
        for offset, token in enumerate(tokens[start : start + min(taken + 1, levels)]):
            count = counts["content" if is_content(token) else "function"]
            count[0] += 1
            count[1] += offset < taken
        start += taken + 1
    return counts


def asked_acceptance(runs: Sequence[Run]) -> dict[str, float | None]:
    """Share of the tokens asked of the draft that it got accepted, by class of words, pooled over runs.

    Returns:
        `content` and `function` → share; `None` where nothing was asked for, or nobody told the classes.
    """
    counted = [run.asked for run in runs if run.asked is not None]
    shares: dict[str, float | None] = {}
    for name in ("content", "function"):
        asked, accepted = (sum(counts[name][i] for counts in counted) for i in (0, 1))
        shares[name] = accepted / asked if asked else None
    return shares


def speed(plain: Sequence[Run], runs: Sequence[Run]) -> Speed:
    """Compares the runs of an arm with the plain runs of the same clips, in the same order.

    Raises:
        ValueError: The two do not pair up, there is no run, or a run did not get past its first token.
    """
    if len(plain) != len(runs) or not runs:
        raise ValueError(
            f"every run needs a plain run of the same prompt, found {len(runs)} runs and {len(plain)} plain ones"
        )
    if any(run.decode_tokens == 0 for run in (*plain, *runs)):
        raise ValueError("a run that ends with its first token has no decode speed")
    pairs = list(zip(plain, runs, strict=True))
    ratios = [base.seconds_per_token / run.seconds_per_token for base, run in pairs]
    dsr = spread(ratios)
    share = spread([base.prefill_share for base in plain])
    return Speed(
        dsr=dsr,
        esr=spread([base.seconds / run.seconds for base, run in pairs]),
        dsr_per_prompt=ratios,
        dsr_interval=bootstrap(ratios, _median),
        prefill_share=share,
        esr_from_dsr=end_to_end_ratio(share.median, dsr.median),
        plain_ms_per_token=spread([1000 * base.seconds_per_token for base in plain]),
        ms_per_token=spread([1000 * run.seconds_per_token for run in runs]),
    )


def decoded(plain: Sequence[Run], runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Those pairs of a plain run and another of the same clip that got past their first token, and so have a speed."""
    pairs = [pair for pair in zip(plain, runs, strict=True) if all(run.decode_tokens for run in pair)]
    return [base for base, _ in pairs], [run for _, run in pairs]


def end_to_end_ratio(prefill_share: float, dsr: float) -> float:
    """`1 / (p + (1 − p) / DSR)`: ESR when only the decoding gets faster (Amdahl's law)."""
    return 1 / (prefill_share + (1 - prefill_share) / dsr)


def walltime_ratio(plain: Sequence[Run], runs: Sequence[Run]) -> float:
    """Mean tokens per second of whole calls over that of the plain runs; a ratio of means, unlike DSR and ESR."""
    faster, base = (sum(run.new_tokens / run.seconds for run in those) / len(those) for those in (runs, plain))
    return faster / base


def pooled_tau(runs: Sequence[Run]) -> float:
    """τ of several runs together."""
    return tau(sum(run.decode_tokens for run in runs), sum(run.rounds for run in runs))


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, linearly interpolated."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(lower), float(upper))


def bootstrap(samples: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> Interval | None:
    """95 % interval of a statistic under resampling with replacement; the same samples always give the same one.

    Of few samples it is too narrow: a mean's contains the true one in about 86 % of all cases with 6, 93 % with 24.

    `None` for fewer than [`LEAST_SAMPLES`]: the range of five values contains the median in only 94 % of all cases, so
    no resampling of them can give a 95 % interval.
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = rng.integers(len(samples), size=(BOOTSTRAP_SAMPLES, len(samples)))
    lower, upper = np.quantile([statistic([samples[index] for index in draw]) for draw in draws], [0.025, 0.975])
    return Interval(float(lower), float(upper))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
