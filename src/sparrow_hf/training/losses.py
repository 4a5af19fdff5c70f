"""The losses of the draft: each compares its predictions with the target's, position by position.

All take only positions with a loss: the draft's logits and the target's log-probabilities of the tokens that the
draft can propose, `(n, D)`, or states `(n, H)`, and return `(n,)`. Visual placeholders score −∞ on both sides. With a
reduced draft vocabulary, the target's probabilities of that part sum to less than one, so a position counts as much as
the draft can gain there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: How many of the target's most probable tokens ListMLE puts in order (ViSpec).
LIST_MLE_TOKENS = 10


def soft_cross_entropy(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """Cross-entropy of the draft's distribution against the target's (EAGLE): `(n, D)`, `(n, D)` → `(n,)`."""
    target = target_log_probs.exp()
    # 0 · −∞ is NaN, 0 · (lowest finite number) is 0: tokens the target excludes contribute nothing.
    log_probs = draft_logits.log_softmax(-1)
    return -(target * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def probability_l1(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """L1 distance of the two distributions, summed over the vocabulary (ViSpec): `(n, D)`, `(n, D)` → `(n,)`.

    Half of it is the probability that speculative sampling rejects the draft's token.
    """
    return (draft_logits.softmax(-1) - target_log_probs.exp()).abs().sum(-1)


def list_mle(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """Negative log-likelihood, under the draft, of the order of the target's top tokens (ViSpec): → `(n,)`.

    Plackett–Luce over the list: token i competes with those from i on, −Σᵢ (sᵢ − logsumexp(sᵢ, sᵢ₊₁, …)).
    """
    tokens = target_log_probs.topk(min(LIST_MLE_TOKENS, target_log_probs.shape[-1]), dim=-1)
    listed = tokens.values.isfinite()
    scores = draft_logits.gather(-1, tokens.indices).masked_fill(~listed, torch.finfo(draft_logits.dtype).min)
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - scores).masked_fill(~listed, 0.0).sum(-1)


def feature_smooth_l1(draft_states: Tensor, target_states: Tensor) -> Tensor:
    """Smooth L1 distance to the target's post-norm state (EAGLE, MSD): `(n, H)`, `(n, H)` → `(n,)`, mean over H."""
    return F.smooth_l1_loss(draft_states, target_states, reduction="none").mean(-1)


#: What compares scores, and what compares states. A loss that is added here gets its weight as the field
#: `<name>_weight` of `SparrowTrainingArguments`.
SCORE_LOSSES = {
    "soft_cross_entropy": soft_cross_entropy,
    "probability_l1": probability_l1,
    "list_mle": list_mle,
}
STATE_LOSSES = {"feature_smooth_l1": feature_smooth_l1}


def mixed_loss(
    weights: dict[str, float],
    draft_states: Tensor,
    target_states: Tensor,
    draft_logits: Tensor,
    target_log_probs: Tensor,
) -> Tensor:
    """Weighted sum of the losses above, by name: `(n,)`."""
    loss = draft_logits.new_zeros(len(draft_logits))
    for name, on_scores in SCORE_LOSSES.items():
        if weights[name]:
            loss = loss + weights[name] * on_scores(draft_logits, target_log_probs)
    for name, on_states in STATE_LOSSES.items():
        if weights[name]:
            loss = loss + weights[name] * on_states(draft_states.float(), target_states.float())
    return loss
