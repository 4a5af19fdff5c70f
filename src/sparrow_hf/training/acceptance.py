"""Teacher-forced acceptance: how many drafted tokens the target would accept, computed from the exact passes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from .. import metrics
from .passes import DraftBatch


def count_acceptance(batch: DraftBatch, matches: Sequence[Tensor], levels: int) -> Tensor:
    """Counts that add up over batches; [`acceptance_metrics`] reads them.

    Args:
        batch: The batch the passes ran on.
        matches: Per pass s, `(B, J−s)` bool: the draft's most probable token at loss u + s is the target's. Answers
            that are shorter than a chain have fewer passes, and passes beyond the chain's D are not counted.
        levels: Tokens D of the chains, the same for all batches of an evaluation; 0 drafts nothing.

    Returns:
        `(1, 3·D + 1)`: matching losses and all losses of each pass, rounds that accepted at least 1 … D tokens, and
        all rounds.
    """
    matches = matches[:levels]
    agreed = [int((match & batch.has_loss(step)).sum()) for step, match in enumerate(matches)]
    losses = [int(batch.has_loss(step).sum()) for step in range(len(matches))]
    not_run = [0] * (levels - len(matches))
    accepted = simulate_rounds(batch, matches)
    reaching = metrics.count_reaching(accepted, levels)
    counts = (*agreed, *not_run, *losses, *not_run, *reaching, len(accepted))
    return torch.tensor([counts], device=batch.num_losses.device)


def simulate_rounds(batch: DraftBatch, matches: Sequence[Tensor]) -> list[int]:
    """Accepted tokens of each round, were the answers of the batch decoded with chains of D tokens.

    A chain that starts at loss u and accepts k tokens is followed by the target's own token, so the next one
    starts at u + k + 1. On greedy answers of the target this equals decoding.
    """
    # (B, J) leading matches of the chain that starts at each loss
    lengths = torch.zeros_like(batch.has_loss(0), dtype=torch.long)
    alive = batch.has_loss(0).clone()
    for step, match in enumerate(matches):
        alive[:, match.shape[1] :] = False
        alive[:, : match.shape[1]] &= match & batch.has_loss(step)
        lengths += alive
    rounds = []
    for sample, num_losses in zip(lengths.tolist(), batch.num_losses.tolist(), strict=True):
        start = 0
        while start < num_losses:
            rounds.append(sample[start])
            start += sample[start] + 1
    return rounds


def acceptance_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a [`SparrowTrainer`]: figures of an evaluation set, pooled over its rounds.

    Returns:
        `k` accepted drafts per round, `tau` = k + 1 tokens per target forward, `accepted_j` = P(k ≥ j), and
        `agreement_s`, the share of all losses of pass s (from 1) whose token is the target's. Without a round, because
        all rows were left out, they are no numbers, so that no checkpoint is the best by them.
    """
    *counts, rounds = np.asarray(prediction.predictions).sum(axis=0).tolist()
    passes = len(counts) // 3
    agreed, losses, reaching = counts[:passes], counts[passes : 2 * passes], counts[2 * passes :]
    # A round of k tokens was counted k times: as one of at least 1, of at least 2, … of at least k.
    accepted = sum(reaching)
    shares = metrics.per_position(reaching, rounds)
    figures = {
        "k": metrics.accepted_per_round(accepted, rounds),
        "tau": metrics.tau(accepted + rounds, rounds),
        **{f"accepted_{step}": share for step, share in enumerate(shares, start=1)},
    }
    return summarize(agreed, losses) | (figures if rounds else dict.fromkeys(figures, math.nan))


def accepted(metrics: Mapping[str, float]) -> list[float]:
    """`a_1`, `a_2` … of an evaluation's metrics."""
    shares: list[float] = []
    while (share := metrics.get(f"eval_accepted_{len(shares) + 1}")) is not None:
        shares.append(share)
    return shares


def summarize(agreed: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """`agreement_s` per pass, from counts; passes that had no loss are left out."""
    return {
        f"agreement_{step}": float(match / total)
        for step, (match, total) in enumerate(zip(agreed, losses, strict=True), start=1)
        if total
    }
