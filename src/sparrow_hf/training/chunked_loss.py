"""The loss of predicted states over the vocabulary, a bounded number of logits at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modeling_sparrow import SparrowDraftModel
from .losses import mixed_loss

#: Logits held at a time (256 MiB in fp32). A real target has 150,000 per position: the logits of an answer of a
#: thousand tokens, in five passes, would take gigabytes, more than everything else that a draft needs.
LOGITS_PER_CHUNK = 2**26


def chunked_loss(
    draft: SparrowDraftModel, weights: dict[str, float], predicted: Tensor, target_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss at every position, and whether the draft's most probable token is the target's.

    Where more than one chunk is needed, the logits of a chunk are computed again in the backward pass instead of being
    kept: the same numbers for a little more time in the head.

    Args:
        draft: A draft bound to its target.
        weights: Weight of each loss, see [`mixed_loss`].
        predicted: `(n, H)` states the draft predicts.
        target_states: `(n, H)` the target's states at the same positions.

    Returns:
        `(n,)` losses and `(n,)` bool.
    """
    rows = max(1, LOGITS_PER_CHUNK // draft.config.vocab_size)
    head = draft.reduced_head()
    if len(predicted) <= rows:
        return _loss(draft, head, weights, predicted, target_states)
    chunks = [
        checkpoint(_loss, draft, head, weights, *chunk, use_reentrant=False)
        for chunk in zip(predicted.split(rows), target_states.split(rows), strict=True)
    ]
    losses, matches = zip(*chunks, strict=True)
    return torch.cat(losses), torch.cat(matches)


def _loss(
    draft: SparrowDraftModel,
    reduced_head: Callable[[Tensor], Tensor] | None,
    weights: dict[str, float],
    predicted: Tensor,
    target_states: Tensor,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        target_log_probs = draft.compute_logits(target_states, full_vocabulary=True).log_softmax(-1)
        target_tokens = target_log_probs.argmax(-1)
    logits = draft.compute_logits(predicted, reduced_head=reduced_head)
    tokens = logits.detach().argmax(-1)
    if draft.draft_to_target is not None:
        tokens = draft.draft_to_target[tokens]
        target_log_probs = target_log_probs[:, draft.draft_to_target]
    losses = mixed_loss(weights, predicted, target_states, logits, target_log_probs)
    return losses, tokens == target_tokens
