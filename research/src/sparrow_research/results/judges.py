"""How claims are judged: each function holds one against the figures of one family.

Lengths are compared over the clips that all of them share.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparrow_hf.measurement import NO_DRAFT

from .arms import (
    ALL_ROWS,
    BLIND,
    DEFAULT,
    HIVIS,
    MSD,
    MSD_BLIND,
    NO_IVSB,
    NO_MTP,
    NO_VATA,
    PAPER,
    TUNED,
    TUNED_COMPILED,
    Role,
    arms_of,
    in_our_loop,
    name_of,
)
from .cells import AS_SHIPPED
from .table import Results

Judged = tuple[bool | None, str]
"""Whether it holds (`None`: cannot be told), and the figures."""

NOT_MEASURED: Judged = (None, "not measured.")
TRUSTED = 0.95
"""A target is trusted where at least this share of its own claims are right."""


def listed(values: Mapping[int, float]) -> str:
    """Figures by length: `4.44 at 400, 4.31 at 3,000`."""
    return ", ".join(f"{value:.2f} at {length:,}" for length, value in values.items())


def taus(results: Results, family: str, arm: str) -> dict[int, float]:
    """τ of an arm by length, shortest first."""
    return {length: row["tau"] for length, row in sorted(results.by_length(family, arm).items())}


def taus_of(results: Results, family: str, arms: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """τ by length of several arms, by the names they are told by (→ arm); nothing if one of them was not measured."""
    found = {name: taus(results, family, arm) for name, arm in arms.items()}
    return found if all(found.values()) else {}


# -- drafts and their visual rows -------------------------------------------------------------------------------------


def dilution(results: Results, family: str) -> Judged:
    """τ of drafts that keep everything."""
    found = taus_of(results, family, {name_of(arm): arm for arm in (MSD, ALL_ROWS)})
    if not found:
        return NOT_MEASURED
    falls = [values[max(values)] < 0.9 * values[min(values)] for values in found.values()]
    return all(falls), "; ".join(f"{name} τ {listed(values)}" for name, values in found.items()) + "."


def negative_gain(results: Results, family: str) -> Judged:
    """MSD with and without its visual rows."""
    kept, deleted = (taus(results, family, arm) for arm in (MSD, MSD_BLIND))
    if not kept or not deleted:
        return NOT_MEASURED
    longest = max(kept)
    text = f"{name_of(MSD)} with all rows τ {listed(kept)}; without {listed(deleted)}."
    return deleted[longest] > kept[longest], text


def ablation(results: Results, family: str) -> Judged:
    """The published recipe and what is left of it without one of its parts."""
    arms = {"all three": PAPER} | {name_of(arm): arm for arm in (NO_VATA, NO_IVSB, NO_MTP)}
    found = taus_of(results, family, arms)
    if not found:
        return NOT_MEASURED
    whole, no_vata, no_ivsb, no_mtp = found.values()
    shortest, longest = min(whole), max(whole)
    helps = [
        no_vata[longest] < whole[longest],
        no_ivsb[shortest] < whole[shortest],
        no_mtp[shortest] < whole[shortest],
    ]
    return all(helps), "; ".join(f"{name} τ {listed(values)}" for name, values in found.items()) + "."


def glimpse(results: Results, family: str) -> Judged:
    """The default against drafts without visual rows: itself, one trained so, and the published recipe."""
    arms = {
        "glimpse of 64": DEFAULT,
        "the same draft without": BLIND,
        f"trained without ({name_of(HIVIS)})": HIVIS,
        "as published": PAPER,
    }
    found = taus_of(results, family, arms)
    if not found:
        return NOT_MEASURED
    own, *others = found.values()
    ahead = [own[length] > max(other[length] for other in others) for length in own]
    return all(ahead), "; ".join(f"{name} τ {listed(values)}" for name, values in found.items()) + "."


# -- the target -------------------------------------------------------------------------------------------------------


def attention(results: Results, family: str) -> Judged:
    """Where the last instruction token looks, short and long."""
    analysis = results.analysis(family)
    if analysis is None or len(analysis["lengths"]) < 2:
        return NOT_MEASURED
    short, long = analysis["lengths"][0], analysis["lengths"][-1]
    before, after = (
        np.asarray(each["attention"]["last_instruction"]).mean(axis=(0, 1)).tolist() for each in (short, long)
    )
    return after[1] > before[1], (
        f"mass on visual rows {before[1]:.0%} → {after[1]:.0%}, on the instruction {before[0]:.0%} → {after[0]:.0%} "
        f"from {short['visual_tokens']['mean']:,.0f} to {long['visual_tokens']['mean']:,.0f} visual tokens."
    )


def internalization(results: Results, family: str) -> Judged:
    """From which layer on visual rows are not missed."""
    analysis = results.analysis(family)
    if analysis is None:
        return NOT_MEASURED
    depth, needed = len(analysis["all"]["similarity"]["visual"]), analysis["recommendation"]["needed_layers"]
    agreement, right = analysis["all"]["agreement"], analysis["all"]["score"]
    kept = ", ".join(
        f"{agreement[str(layer)]:.1%} and {right[str(layer)]:.2f} from layer {layer} on"
        for layer in sorted({0, 3 * depth // 4, needed, depth})
    )
    return needed <= 0.75 * depth, (
        f"needed in {needed} of {depth} layers. The answers' tokens that stay, and the claims that are right, with "
        f"visual rows hidden: {kept}."
    )


def similarity(results: Results, family: str) -> Judged:
    """How like their inputs visual and text states are half-way up and at the top."""
    analysis = results.analysis(family)
    if analysis is None:
        return NOT_MEASURED
    visual, text = (analysis["all"]["similarity"][kind] for kind in ("visual", "text"))
    places = (len(visual) // 2 - 1, len(visual) - 1)
    return all(visual[place] > text[place] for place in places), (
        f"cosine to the input after half of the layers: visual rows {visual[places[0]]:.2f}, text rows "
        f"{text[places[0]]:.2f}; after all: {visual[places[1]]:.2f}, {text[places[1]]:.2f}."
    )


# -- speed ------------------------------------------------------------------------------------------------------------


def fastest(results: Results, family: str, draft: str) -> Judged:
    """A draft against the best rival's, from 3,000 visual tokens on."""
    parts, ahead = [], []
    for length in results.lengths(family):
        own = results.row(family, f"video-{length}", draft)
        found = [results.row(family, f"video-{length}", arm) for arm in arms_of(Role.RIVAL)]
        rivals = [row for row in found if row is not None]
        if own is None or len(rivals) < len(found):
            continue
        best = max(rivals, key=lambda row: row["dsr"])
        if length >= 3000:
            ahead.append(own["dsr"] > best["dsr"])
        pairs = list(zip(own["dsr_per_prompt"], best["dsr_per_prompt"], strict=True))
        parts.append(
            f"{own['dsr']:.2f} against {best['dsr']:.2f} ({name_of(best['arm'])}) at {length:,}, margin "
            f"{own['dsr'] / best['dsr'] - 1:+.0%}, ahead on {sum(mine > its for mine, its in pairs)} of {len(pairs)} "
            "prompts"
        )
    return (all(ahead), f"DSR {'; '.join(parts)}.") if ahead else NOT_MEASURED


def beyond_plain(results: Results, family: str) -> Judged:
    """The default as it ships against the fastest arm without a draft of this package."""
    parts, ahead = [], []
    for length in results.lengths(family, AS_SHIPPED):
        found = [results.row(family, f"{AS_SHIPPED}{length}", arm) for arm in (TUNED, TUNED_COMPILED)]
        rows = [row for row in found if row is not None]
        best = rows[0]["best_baseline"]
        ahead.append(all(row["dsr_over_best"] > 1 for row in rows))
        told = " and compiled ".join(f"{row['dsr_over_best']:.2f}" for row in rows)
        parts.append(f"{told} at {length:,} (over {name_of(best)})")
    return (all(ahead), f"DSR over that of the fastest: {'; '.join(parts)}.") if ahead else NOT_MEASURED


def never_behind(results: Results, family: str) -> Judged:
    """The default's slowest chain and tree over all fp32 cells."""
    rows = [
        row
        for row in results.rows
        if row["family"] == family and row["arm"] in arms_of(Role.DEFAULT) and row["provenance"]["dtype"] == "float32"
    ]
    chains = [row for row in rows if "@chain-" in row["arm"]]
    if not chains:
        return NOT_MEASURED
    slowest = min(chains, key=lambda row: row["dsr"])
    text = f"slowest chain DSR {slowest['dsr']:.2f} ({slowest['benchmark']})"
    trees = [row for row in rows if row not in chains]
    if trees:
        wide = min(trees, key=lambda row: row["dsr"])
        text += f", slowest tree {wide['dsr']:.2f} ({wide['arm'].partition('@')[2]}, {wide['benchmark']})"
    # Our loop need not be as fast as plain `generate()`: only what is beyond it is the draft's.
    own = [
        row["dsr"] / control["dsr"]
        for row in chains
        if (control := results.row(family, row["benchmark"], NO_DRAFT)) is not None
    ]
    if own:
        text += f"; against our own loop without a draft at least {min(own):.2f}"
    return min([slowest["dsr"], *own]) > 1, text + "."


def flat(results: Results, family: str, draft: str) -> Judged:
    """τ by length, beside how far the target's own captions can be trusted there."""
    found = taus(results, family, draft)
    if not found:
        return NOT_MEASURED
    right = {length: results.accuracy(family, length) or 0.0 for length in found}
    text = "τ " + ", ".join(
        f"{tau:.2f} at {length:,} (target {right[length]:.2f} right)" for length, tau in found.items()
    )
    shortest, *longer = [length for length in found if right[length] >= TRUSTED] or [0]
    if shortest != min(found) or not longer:
        return None, text + "."
    told = f"{text}; judged at {', '.join(format(length, ',') for length in longer)}."
    return all(found[length] >= 0.95 * found[shortest] for length in longer), told


def constant_cost(results: Results, family: str) -> Judged:
    """The default's draft cache and draft step by length."""
    rows = {length: row["draft_cache_rows"] for length, row in results.by_length(family, DEFAULT).items()}
    steps = {
        step["visual_tokens"]: step["per_clip"]
        for step in results.draft_steps
        if step["family"] == family and step["tree"] == "chain-5"
    }
    if not rows or not steps:
        return NOT_MEASURED
    # The lengths of one clip were timed in turns; two clips may have been timed under different load.
    clips = list(zip(*(steps[length] for length in sorted(steps)), strict=True))
    is_flat = [max(values) < 1.15 * min(values) for values in (list(rows.values()), *clips)]
    timed = "; ".join(", ".join(f"{milliseconds:.2f}" for milliseconds in clip) for clip in clips)
    return all(is_flat), (
        f"most rows in the draft's cache {', '.join(f'{row} at {length:,}' for length, row in sorted(rows.items()))}; "
        f"a chain of 5 takes, in ms at {', '.join(format(length, ',') for length in sorted(steps))} on each of "
        f"{len(clips)} clips: {timed}."
    )


def sampling(results: Results, family: str, draft: str) -> Judged:
    """Greedy against T = 1 on the same clips."""
    parts, holds = [], []
    for length in (400, 3000):
        greedy, drawn = (results.row(family, f"{kind}-{length}", draft) for kind in ("video", "sampling"))
        if greedy is not None and drawn is not None:
            # Cells are measured at different times, so their speeds differ by the machine's load; their τ does not.
            holds.append(drawn["tau"] < greedy["tau"] and drawn["dsr"] > 1)
            parts.append(
                f"τ {greedy['tau']:.2f} → {drawn['tau']:.2f}, DSR {greedy['dsr']:.2f} → {drawn['dsr']:.2f} at "
                f"{length:,}"
            )
    return (all(holds), "; ".join(parts) + ".") if holds else NOT_MEASURED


def prefill(results: Results, family: str) -> Judged:
    """What the prefill leaves of the default's speed-up."""
    found = {length: results.row(family, f"video-{length}", DEFAULT) for length in results.lengths(family)}
    rows = {length: row for length, row in found.items() if row is not None}
    if len(rows) < 2:
        return NOT_MEASURED
    parts = [
        f"{row['prefill_share']:.0%} (DSR {row['dsr']:.2f}, ESR {row['esr']:.2f}) at {length:,}"
        for length, row in rows.items()
    ]
    shares = [row["prefill_share"] for row in rows.values()]
    return shares == sorted(shares), f"prefill share of a plain call {', '.join(parts)}."


def other_prompts(results: Results, family: str, draft: str) -> Judged:
    """Pictures and text."""
    found = {cell: results.row(family, cell, draft) for cell in ("pictures", "text", "video-400")}
    rows = {cell: row for cell, row in found.items() if row is not None}
    if len(rows) < len(found):
        return NOT_MEASURED
    text = ", ".join(f"{row['tau']:.2f} / {row['dsr']:.2f} ({cell})" for cell, row in rows.items())
    return min(row["dsr"] for row in rows.values()) > 1, f"τ / DSR {text}."


def lossless(results: Results, family: str) -> Judged:
    """Identity with plain `generate()`, in fp32 and bf16, of all arms that run in this package's loop."""
    counts: dict[str, list[int]] = {"float32": [0, 0], "bfloat16": [0, 0]}
    for row in results.rows:
        if row["family"] == family and in_our_loop(row["arm"]):
            count = counts[row["provenance"]["dtype"]]
            count[0] += row["identical"]
            count[1] += row["prompts"]
    (same, total), (same_bf16, total_bf16) = counts.values()
    if not total:
        return NOT_MEASURED
    text = f"{same:,} of {total:,} answers identical in fp32"
    if total_bf16:
        text += f", {same_bf16} of {total_bf16} in bf16, where sums over several tokens round differently"
    return same == total, text + "."
