"""The paper's claims and this package's, held against what was measured here. Verdicts follow from the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .arms import DEFAULT, PAPER
from .judges import (
    TRUSTED,
    Judged,
    ablation,
    attention,
    beyond_plain,
    constant_cost,
    dilution,
    fastest,
    flat,
    glimpse,
    internalization,
    lossless,
    negative_gain,
    never_behind,
    other_prompts,
    prefill,
    sampling,
    similarity,
)
from .table import NAMES, Results


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        title: What is claimed, and where.
        rule: When it counts as holding.
        judge: Looks at one family.
        remark: What a reader should know beyond the figures.
    """

    title: str
    rule: str
    judge: Callable[[Results, str], Judged]
    remark: str = ""


def paragraph(claim: Claim, results: Results) -> str:
    """The claim, the verdict, the figures of every family."""
    judged = {NAMES.get(family, family): claim.judge(results, family) for family in results.families}
    words = {True: "holds", False: "does not hold", None: "cannot be told here"}
    told = {words[holds] for holds, _ in judged.values()}
    verdict = (
        told.pop() if len(told) == 1 else ", ".join(f"{words[holds]} ({name})" for name, (holds, _) in judged.items())
    )
    figures = " ".join(f"{name}: {text}" for name, (_, text) in judged.items())
    return f"**{claim.title}: {verdict}.** {figures} (It holds if {claim.rule}.) {claim.remark}".rstrip() + "\n"


PAPERS: tuple[Claim, ...] = (
    Claim(
        "Figure 1a, drafts that keep every visual row accept less as videos grow",
        "both lose more than a tenth of τ from the shortest to the longest",
        dilution,
    ),
    Claim(
        "Figure 1b, taking the visual rows away from such a draft raises τ (“negative visual gain”)",
        "it does at the longest length",
        negative_gain,
        "Shares in between are in the picture *retention*.",
    ),
    Claim(
        "Figure 2, attention drifts to visual tokens as videos grow",
        "their share of the last instruction token's attention rises",
        attention,
    ),
    Claim(
        "Figures 3 and 5, the target does without its visual rows after a middle layer",
        "98 % of the answers' tokens and 95 % of the right claims stay when they are hidden from three quarters of "
        "the depth on",
        internalization,
        "A tiny target need not use its depth as a 7B does; `sparrow analyze` asks yours.",
    ),
    Claim(
        "Figure 6, visual states stay closer to their inputs than text states",
        "they do half-way up and at the top",
        similarity,
    ),
    Claim(
        "The main comparison, the published Sparrow decodes faster than its rivals on long videos",
        "its chain of 5 beats every rival's from 3,000 visual tokens on",
        partial(fastest, draft=PAPER),
        "On a GPU wide trees cost little and a draft's cache costs more: only there can the paper's factors be told.",
    ),
    Claim(
        "Lengths, τ of the published Sparrow does not fall with the length of the video",
        f"95 % of it stays wherever at least {TRUSTED:.0%} of the target's own claims are right",
        partial(flat, draft=PAPER),
        "Where the target itself errs, its text is harder to foresee for anybody.",
    ),
    Claim(
        "The ablation, VATA, IVSB and MTP each help",
        "without VATA τ is lower at the longest, without IVSB or MTP at the shortest length",
        ablation,
    ),
    Claim(
        "Temperatures, sampling at T = 1 costs acceptance and stays faster than plain",
        "τ falls and DSR stays above 1 at both lengths",
        partial(sampling, draft=PAPER),
    ),
    Claim(
        "Other tasks, pictures and text are faster too",
        "DSR stays above 1",
        partial(other_prompts, draft=PAPER),
        "These targets never learned from pictures or from text alone: their answers are made up.",
    ),
    Claim(
        "The prefill takes a growing share, which bounds what a user gains",
        "its share grows with every length",
        prefill,
    ),
)

OURS: tuple[Claim, ...] = (
    Claim("Drafting loses nothing", "every fp32 text is plain `generate()`'s", lossless),
    Claim(
        "The default decodes faster than every rival on long videos",
        "its chain of 5 beats every rival's from 3,000 visual tokens on",
        partial(fastest, draft=DEFAULT),
    ),
    Claim(
        "The default as it ships decodes faster than anything transformers does without a draft",
        "its DSR, compiled or not, is above that of plain `generate()`, also with grouped attention and compiled, "
        "and of prompt lookup, at every length",
        beyond_plain,
        "Compiled arms and prompt lookup were not measured from 13,000 visual tokens on.",
    ),
    Claim(
        "No chain of the default is slower than plain decoding",
        "every median DSR in fp32 is above 1, and above that of our own loop without a draft",
        never_behind,
    ),
    Claim(
        "τ of the default does not fall with the length of the video",
        f"95 % of it stays wherever at least {TRUSTED:.0%} of the target's own claims are right",
        partial(flat, draft=DEFAULT),
    ),
    Claim(
        "A glimpse of 64 visual rows beats drafts that see none",
        "its τ is higher at every length",
        glimpse,
    ),
    Claim(
        "The draft's cost does not grow with the video",
        "neither its cache nor, on any clip, its step is 15 % more at one length than at another",
        constant_cost,
    ),
)
