"""The paper's claims, held against what was measured here. Verdicts follow from the figures by a rule each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .table import NAMES, Results, best

Judged = tuple[bool | None, str]
"""Whether it holds (`None`: cannot be told), and the figures."""

CHAIN = "draft:sparrow@chain-5"
RIVALS = (
    "prompt-lookup",
    "assistant:",
    "specvlm:",
    "draft:text-only",
    "draft:msd",
    "draft:vispec",
    "draft:hivis",
    "none",
)


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
    judged = {family: claim.judge(results, family) for family in results.families}
    told = {holds for holds, _ in judged.values() if holds is not None}
    verdict = {
        frozenset(): "cannot be told here",
        frozenset({True}): "holds here",
        frozenset({False}): "does not hold here",
    }.get(frozenset(told), "holds for one family only")
    figures = " ".join(f"{NAMES.get(family, family)}: {text}" for family, (_, text) in judged.items())
    return f"**{claim.title}: {verdict}.** {figures} ({claim.rule}) {claim.remark}".rstrip() + "\n"


def _missing(*values: Any) -> bool:
    return any(value is None for value in values)


def _ends(results: Results, family: str, arm: str, name: str) -> tuple[int, int, float | None, float | None]:
    """Shortest and longest length, and a figure of an arm at both."""
    lengths = results.lengths(family)
    first, last = (results.figure(family, f"video-{length}", arm, name) for length in (lengths[0], lengths[-1]))
    return lengths[0], lengths[-1], first, last


def dilution(results: Results, family: str) -> Judged:
    """τ of drafts that keep everything, short and long."""
    short, long, *_ = _ends(results, family, CHAIN, "tau")
    parts, falls = [], []
    for name, arm in {"MSD-like": "draft:msd@chain-5", "all middle-layer rows": "draft:no-window@chain-5"}.items():
        *_, first, last = _ends(results, family, arm, "tau")
        if first is None or last is None:
            return None, "not measured."
        falls.append(last < 0.9 * first)
        parts.append(f"{name} {first:.2f} → {last:.2f}")
    return all(falls), f"τ at {short:,} → {long:,} visual tokens: {', '.join(parts)}."


def negative_gain(results: Results, family: str) -> Judged:
    """MSD with and without its visual rows."""
    short, long, *with_rows = _ends(results, family, "draft:msd@chain-5", "tau")
    *_, first, last = _ends(results, family, "draft:msd@chain-5/glimpse=0", "tau")
    if _missing(*with_rows, first, last):
        return None, "not measured."
    assert last is not None and with_rows[1] is not None
    text = (
        f"MSD-like without its visual rows {first:.2f} against {with_rows[0]:.2f} with them at {short:,} tokens, "
        f"{last:.2f} against {with_rows[1]:.2f} at {long:,}."
    )
    return last > with_rows[1], text


def _mass(pooled: dict[str, Any]) -> list[float]:
    """Attention of the last instruction token on instruction, visual rows and text, mean over layers and heads."""
    return np.asarray(pooled["attention"]["last_instruction"]).mean(axis=(0, 1)).tolist()


def attention(results: Results, family: str) -> Judged:
    """Where the last instruction token looks, short and long."""
    analysis = results.analyses.get(family)
    if analysis is None or len(analysis["lengths"]) < 2:
        return None, "not measured."
    short, long = analysis["lengths"][0], analysis["lengths"][-1]
    before, after = _mass(short), _mass(long)
    text = (
        f"mass on visual rows {before[1]:.0%} → {after[1]:.0%}, on the instruction {before[0]:.0%} → {after[0]:.0%} "
        f"from {short['visual_tokens']['mean']:,.0f} to {long['visual_tokens']['mean']:,.0f} visual tokens."
    )
    return after[1] > before[1], text


def internalization(results: Results, family: str) -> Judged:
    """From which layer on visual rows are not missed."""
    analysis = results.analyses.get(family)
    if analysis is None:
        return None, "not measured."
    depth = len(analysis["all"]["similarity"]["visual"])
    needed = analysis["recommendation"]["needed_layers"]
    agreement = analysis["all"]["agreement"]
    text = (
        f"needed in {needed} of {depth} layers; without them from the start {agreement['0']:.0%} of the tokens stay, "
        f"hidden from layer {needed} on {agreement[str(needed)]:.1%}."
    )
    return needed <= 0.75 * depth, text


def similarity(results: Results, family: str) -> Judged:
    """How like their inputs visual and text states are half-way up and at the top."""
    analysis = results.analyses.get(family)
    if analysis is None:
        return None, "not measured."
    cosines = analysis["all"]["similarity"]
    middle = len(cosines["visual"]) // 2
    text = (
        f"visual rows {cosines['visual'][middle - 1]:.2f} after half of the layers and {cosines['visual'][-1]:.2f} "
        f"after all, text rows {cosines['text'][middle - 1]:.2f} and {cosines['text'][-1]:.2f}."
    )
    return cosines["visual"][middle - 1] > cosines["text"][-1], text


def fastest(results: Results, family: str) -> Judged:
    """The default's best tree against the best tree of the best rival."""
    parts, ahead = [], []
    for length in results.lengths(family):
        rows = results.cell(family, f"video-{length}")
        own = best(rows, "sparrow")
        rival = max((row for row in rows if row["arm"].startswith(RIVALS)), key=lambda row: row["dsr"], default=None)
        if own is None or rival is None:
            continue
        if length >= 3000:
            ahead.append(own["dsr"] > rival["dsr"])
        parts.append(
            f"{own['dsr']:.2f} ({own['arm'].partition('@')[2]}) against {rival['dsr']:.2f} "
            f"({rival['arm'].removeprefix('draft:')}) at {length:,}"
        )
    return (all(ahead) if ahead else None), f"DSR {', '.join(parts)}."


def never_behind(results: Results, family: str) -> Judged:
    """The slowest of all cells and trees of the default."""
    rows = [
        row
        for row in results.rows
        if row["family"] == family
        and row["arm"].startswith("draft:sparrow@")
        and row["provenance"]["dtype"] != "bfloat16"
    ]
    if not rows:
        return None, "not measured."
    slowest = min(rows, key=lambda row: row["dsr"])
    chains = min((row for row in rows if "@chain" in row["arm"]), key=lambda row: row["dsr"])
    return chains["dsr"] > 1, (
        f"slowest chain {chains['dsr']:.2f} ({chains['benchmark']}, {chains['arm'].removeprefix('draft:')}), slowest "
        f"tree {slowest['dsr']:.2f} ({slowest['benchmark']}, {slowest['arm'].removeprefix('draft:')})."
    )


def flat(results: Results, family: str) -> Judged:
    """τ of the default by length, beside how far the target's own captions can be trusted there."""
    lengths = results.lengths(family)
    taus = {length: results.figure(family, f"video-{length}", CHAIN, "tau") for length in lengths}
    right = results.targets.get(family, {})
    trusted = [length for length in lengths if right.get(str(length), 0) >= 0.95]
    first = taus[lengths[0]]
    if first is None:
        return None, "not measured."
    parts = [
        f"{tau:.2f} at {length:,} (target {right[str(length)]:.2f} right)" if str(length) in right else f"{tau:.2f}"
        for length, tau in taus.items()
        if tau is not None
    ]
    kept = [(taus[length] or 0) >= 0.95 * first for length in trusted if length != lengths[0]]
    return (all(kept) if kept else None), f"τ {', '.join(parts)}."


def ablation(results: Results, family: str) -> Judged:
    """The published recipe and what is left of it without its parts, short and long."""
    arms = {
        "all three": "draft:paper@chain-5",
        "without VATA": "draft:paper@chain-5/glimpse=all",
        "without IVSB": "draft:no-bridge@chain-5",
        "without MTP": "draft:no-mtp@chain-5",
    }
    figures = {name: _ends(results, family, arm, "tau")[2:] for name, arm in arms.items()}
    parts = [
        f"{name} {' → '.join('?' if tau is None else f'{tau:.2f}' for tau in taus)}" for name, taus in figures.items()
    ]
    whole = figures["all three"][0]
    others = [taus[0] for name, taus in figures.items() if name != "all three"]
    if whole is None or _missing(*others):
        return None, f"τ short → long: {', '.join(parts)}."
    return all(whole > other for other in others if other is not None), f"τ short → long: {', '.join(parts)}."


def glimpse(results: Results, family: str) -> Judged:
    """The default against the published recipe and against itself without a glimpse."""
    parts, ahead = [], []
    for length in results.lengths(family):
        taus = [
            results.figure(family, f"video-{length}", arm, "tau")
            for arm in (CHAIN, f"{CHAIN}/glimpse=0", "draft:paper@chain-5")
        ]
        if _missing(*taus):
            continue
        own, without, paper = (tau for tau in taus if tau is not None)
        ahead.append(own > max(without, paper))
        parts.append(f"{own:.2f} / {without:.2f} / {paper:.2f} at {length:,}")
    return (
        all(ahead) if ahead else None
    ), f"τ of the default, of it without its glimpse, as published: {', '.join(parts)}."


def constant_cost(results: Results, family: str) -> Judged:
    """Draft cache and draft step by length."""
    rows = [results.figure(family, f"video-{length}", CHAIN, "draft_cache_rows") for length in results.lengths(family)]
    steps = [step for step in results.draft_steps if step["family"] == family and step["tree"] == "chain-5"]
    if _missing(*rows) or not steps:
        return None, "not measured."
    taken = [step["milliseconds"] for step in steps]
    text = (
        f"most rows in the draft's cache {', '.join(f'{row:.0f}' for row in rows if row is not None)} from shortest "
        f"to longest; one chain of 5 takes {', '.join(f'{each:.2f}' for each in taken)} ms at "
        f"{', '.join(format(step['visual_tokens'], ',') for step in steps)} visual tokens."
    )
    return max(taken) < 1.15 * min(taken), text


def sampling(results: Results, family: str) -> Judged:
    """Greedy against T = 1."""
    figures = [
        (results.figure(family, cell, CHAIN, "tau"), results.figure(family, cell, CHAIN, "dsr"))
        for cell in ("video-400", "sampling-400")
    ]
    (tau, dsr), (sampled_tau, sampled_dsr) = figures
    if tau is None or dsr is None or sampled_tau is None or sampled_dsr is None:
        return None, "not measured."
    return sampled_dsr > 1, f"τ {tau:.2f} → {sampled_tau:.2f}, DSR {dsr:.2f} → {sampled_dsr:.2f} at 400 visual tokens."


def prefill(results: Results, family: str) -> Judged:
    """What the prefill leaves of the speed-up."""
    parts, shares = [], []
    for length in results.lengths(family):
        row = results.row(family, f"video-{length}", CHAIN)
        if row is not None:
            shares.append(row["prefill_share"])
            parts.append(f"{row['prefill_share']:.0%} and DSR {row['dsr']:.2f}, ESR {row['esr']:.2f} at {length:,}")
    if not parts:
        return None, "not measured."
    return shares == sorted(shares), f"prefill share of a plain call {', '.join(parts)}."


def lossless(results: Results, family: str) -> Judged:
    """Identity with plain `generate()`, in fp32 and bf16."""
    counts = {"float32": [0, 0], "bfloat16": [0, 0]}
    for row in results.rows:
        if row["family"] == family and row["identical"] is not None and row["arm"] != "plain":
            count = counts[row["provenance"]["dtype"]]
            count[0] += row["identical"]
            count[1] += row["prompts"]
    (same, total), (same_bf16, total_bf16) = counts.values()
    text = f"{same:,} of {total:,} answers identical in fp32"
    if total_bf16:
        text += f", {same_bf16} of {total_bf16} in bf16 (from a near-tie on, the texts part)"
    return same == total, text + "."


def other_prompts(results: Results, family: str) -> Judged:
    """Pictures and text."""
    taus = {cell: results.figure(family, cell, CHAIN, "tau") for cell in ("pictures", "text", "video-400")}
    if _missing(*taus.values()):
        return None, "not measured."
    text = ", ".join(f"{tau:.2f} ({cell})" for cell, tau in taus.items())
    return min(tau for tau in taus.values() if tau is not None) > 2, f"τ {text}."


CLAIMS: Sequence[Claim] = (
    Claim(
        "Drafts that keep every visual row accept less as videos grow (Figure 1a)",
        "holds if both lose more than a tenth of τ",
        dilution,
    ),
    Claim(
        "Taking the visual rows away from such a draft raises τ (Figure 1b, “negative visual gain”)",
        "holds if it does at the longest length",
        negative_gain,
        "Shares in between: the pictures below.",
    ),
    Claim(
        "Attention drifts to visual tokens as videos grow (Figure 2)",
        "holds if their share rises with length",
        attention,
    ),
    Claim(
        "Visual rows can be hidden after a middle layer (Figures 3 and 5)",
        "holds if at least 98 % of the answers' tokens stay when they are hidden from three quarters of the depth on",
        internalization,
        "A tiny target need not use its depth as a 7B does; `sparrow analyze` asks yours.",
    ),
    Claim(
        "Visual states stay closer to their inputs than text states (Figure 6)",
        "holds if visual rows half-way up are more like their inputs than text rows at the top",
        similarity,
    ),
    Claim(
        "Sparrow decodes faster than its rivals, the more so on long videos (Tables 2 and 3)",
        "holds if its fastest tree beats every rival's from 3,000 visual tokens on",
        fastest,
        "On one CPU thread a wide tree costs more than it brings, for everyone.",
    ),
    Claim("Sparrow is never slower than plain decoding", "holds if no chain is, in fp32", never_behind),
    Claim(
        "τ does not fall with the length of the video (Table 3)",
        "holds if 95 % of it stays wherever at least 95 % of the target's claims are right",
        flat,
        "Where the target itself errs, its text is harder to foresee for anybody.",
    ),
    Claim(
        "VATA, IVSB and MTP each help (the ablation)",
        "holds if each one's absence costs τ at the shortest length",
        ablation,
    ),
    Claim(
        "A glimpse of 64 visual rows beats none (our extension)",
        "holds if it beats both at every length",
        glimpse,
    ),
    Claim(
        "The draft's cost does not grow with the video",
        "holds if its step takes less than 15 % longer at the longest length",
        constant_cost,
    ),
    Claim(
        "Sampling at T = 1 costs acceptance and stays worth it (Table 2)",
        "holds if it stays faster than plain",
        sampling,
    ),
    Claim(
        "The prefill takes a growing share, which bounds what a user gains",
        "holds if its share grows with length",
        prefill,
    ),
    Claim("Pictures and text alone work too (Table 5)", "holds if τ stays above 2", other_prompts),
    Claim("Drafting loses nothing", "holds if every fp32 text is plain `generate()`'s", lossless),
)
