"""Summary over the records of single prompts, and the recommended layers of a draft."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import metrics

#: The target needs no visual tokens from a layer on if it still predicts this share of its own answer,
AGREEMENT_KEPT = 0.98
#: and, where answers are scored, still reaches this share of its score.
SCORE_KEPT = 0.95

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Recommendation:
    """Layers of a draft for this target; see [`recommend`].

    Attributes:
        needed_layers: Number of layers that need visual tokens.
        visual_bridge_layer, feature_layers: Fields of [`~sparrow_hf.SparrowDraftConfig`].
    """

    needed_layers: int
    visual_bridge_layer: int
    feature_layers: list[int]


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Figures over all prompts (`"all"`), over those of about one length (`"lengths"`, shortest first), and the
    recommendation.

    Lengths are grouped by powers of two: 256 … 511 visual tokens are one group.
    """
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(int(record["visual_tokens"]).bit_length(), []).append(record)
    everything = pool(records)
    return {
        "recommendation": vars(recommend(everything)),
        "all": everything,
        "lengths": [pool(groups[length]) for length in sorted(groups)],
    }


def pool(records: Sequence[Record]) -> dict[str, Any]:
    """Figures over several prompts, in the layout of a record.

    Attention and similarity are means over prompts; agreement and acceptance are totals over totals.

    Returns:
        `prompts`; `visual_tokens` (`min`, `mean`, `max`); `attention`: query → `(layers, heads, 3)`; `similarity`:
        kind → `(layers,)`; `agreement`: x → share of the answers' tokens; `score` (if scored): x → mean;
        `retention` (with a draft): scores → share → `tau`, `k` and `rounds`.
    """
    lengths = [record["visual_tokens"] for record in records]
    pooled: dict[str, Any] = {
        "prompts": len(records),
        "visual_tokens": {"min": min(lengths), "mean": float(np.mean(lengths)), "max": max(lengths)},
        "attention": _means(records, "attention"),
        "similarity": _means(records, "similarity"),
    }
    tokens = sum(record["answer_tokens"] for record in records)
    pooled["agreement"] = {
        layer: sum(record["agreed"][layer] for record in records) / tokens for layer in records[0]["agreed"]
    }
    if "score" in records[0]:
        pooled["score"] = _means(records, "score")
    if "retention" in records[0]:
        pooled["retention"] = {
            name: {share: _acceptance([record["retention"][name][share] for record in records]) for share in shares}
            for name, shares in records[0]["retention"].items()
        }
    return pooled


def _means(records: Sequence[Record], figure: str) -> dict[str, Any]:
    return {
        name: np.mean([record[figure][name] for record in records], axis=0).tolist() for name in records[0][figure]
    }


def _acceptance(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accepted = [count for run in runs for count in run["accepted"]]
    rounds = len(accepted)
    return {
        "tau": metrics.tau(sum(run["tokens"] for run in runs), rounds),
        "k": metrics.accepted_per_round(sum(accepted), rounds),
        "rounds": rounds,
    }


def recommend(pooled: Mapping[str, Any]) -> Recommendation:
    """Recommends the layers of this target that a draft should read. A heuristic; training decides.

    1. *Needed layers*: the smallest measured x such that with visual tokens hidden from layer x or any later one on,
       at least [`AGREEMENT_KEPT`] of the answers' tokens stay the same, and [`SCORE_KEPT`] of the score where answers
       are scored (most tokens are wording, which can stay while facts are lost).
    2. *Bridge*: among the visual states that needed layers read (after 1 … x − 1 layers), the one least similar to the
       decoder's input: it has been processed most and is still in use.
    3. *Features*: the text states after the needed layer in which the answer attends to visual tokens most; those
       after the last needed layer, when all visual information is in the text states; and the last layer's (−1),
       which the head reads. Each is listed once.

    Args:
        pooled: What [`pool`] returns.
    """
    depth = len(pooled["similarity"]["visual"])
    agreement, score = pooled["agreement"], pooled.get("score")
    needed = depth
    for layer in map(str, sorted(map(int, agreement), reverse=True)):
        # Scores may be negative (log-likelihoods, for example), so the loss counts and not the quotient.
        lost = score[str(depth)] - score[layer] if score else 0.0
        if agreement[layer] < AGREEMENT_KEPT or (score and lost > (1 - SCORE_KEPT) * abs(score[str(depth)]) + 1e-9):
            break
        needed = int(layer)
    bridge = 1 + int(np.argmin(pooled["similarity"]["visual"][: max(1, needed - 1)]))
    # (layers,) mean over heads, visual rows being the second group
    looked = np.asarray(pooled["attention"]["answer"])[..., 1].mean(axis=1)
    features = {1 + int(np.argmax(looked[: max(1, needed)])), max(1, needed)} - {depth}
    return Recommendation(needed, bridge, [*sorted(features), -1])
