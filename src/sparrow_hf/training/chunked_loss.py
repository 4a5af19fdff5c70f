"""The loss of predicted states over the vocabulary, a bounded number of logits at a time, each computed once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..modeling_sparrow import SparrowDraftModel
from .losses import mixed_loss

#: Logits held at a time (256 MiB in fp32). A real target has 150,000 per position: the logits of an answer of a
#: thousand tokens, in five passes, would take gigabytes, more than everything else that a draft needs.
LOGITS_PER_CHUNK = 2**26


def chunked_loss(
    draft: SparrowDraftModel,
    weights: dict[str, float],
    predicted: Tensor,
    target_states: Tensor,
    judged_by: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of every prediction, and whether the draft's most probable token is the target's.

    The target's head runs once over each of its states, however many passes predict it. No logits are kept for the
    backward pass: a loss depends on its own prediction only, so its gradient is taken at once, `(m, H)` in all.

    Args:
        draft: A draft bound to its target.
        weights: Weight of each loss, see [`mixed_loss`].
        predicted: `(m, H)` states the draft predicts.
        target_states: `(n, H)` the target's states.
        judged_by: `(m,)` index of the target's state that each prediction is compared with; by default the same index.

    Returns:
        `(m,)` losses and `(m,)` bool.
    """
    if judged_by is None:
        judged_by = torch.arange(len(predicted), device=predicted.device)
    rows = max(1, LOGITS_PER_CHUNK // draft.config.vocab_size)
    head = draft.reduced_head()

    def chunks() -> Iterator[tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]]:
        # target states   0 … rows−1 │ rows … 2·rows−1 │ …       judged_by, in order    0 0 0 1 1 … │ … │ …
        order = judged_by.argsort(stable=True)
        borders = torch.arange(rows, len(target_states) + rows, rows, device=judged_by.device)
        ends = torch.searchsorted(judged_by[order], borders).tolist()
        for first, start, end in zip(range(0, len(target_states), rows), [0, *ends], ends, strict=False):
            states = target_states[first : first + rows]
            log_probs, tokens = _target(draft, states)
            for part in order[start:end].split(rows):
                own = judged_by[part] - first
                yield part, _Judge(draft, head, weights, states[own], log_probs[own], tokens[own])

    losses, matches = _LossOfRows.apply(predicted, chunks)
    return losses, matches


class _LossOfRows(torch.autograd.Function):
    """Losses that each depend on one row of the predictions, with gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, chunks: Callable[[], Iterator[Any]]) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        losses = torch.empty(len(predicted), device=predicted.device)
        matches = torch.empty(len(predicted), dtype=torch.bool, device=predicted.device)
        gradients = torch.empty_like(predicted) if needs_gradient else None
        for part, judge in chunks():
            own = predicted[part].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                found, matches[part] = judge(own)
            losses[part] = found.detach()
            if gradients is not None:
                (gradients[part],) = torch.autograd.grad(found, own, torch.ones_like(found))
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(matches)
        return losses, matches

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor, of_matches: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return of_losses[:, None].to(gradients) * gradients, None


@torch.no_grad()
def _target(draft: SparrowDraftModel, states: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens that the draft can propose, and the target's most probable token of all."""
    logits = draft.compute_logits(states, full_vocabulary=True)
    tokens = _most_probable(logits)
    if draft.draft_to_target is None:
        return logits.log_softmax(-1), tokens
    highest = logits.gather(-1, tokens[:, None])
    kept = logits[:, draft.draft_to_target] - highest
    # In place: the logits of the whole vocabulary are held once.
    return kept - logits.sub_(highest).exp_().sum(-1, keepdim=True).log_(), tokens


def _most_probable(logits: Tensor) -> Tensor:
    """`(n, D)` → `(n,)`; of equals the first. On a CPU, `argmax` takes twice as long."""
    return logits.max(-1).indices


class _Judge:
    """Compares predictions with what the target says at their positions."""

    def __init__(
        self,
        draft: SparrowDraftModel,
        reduced_head: Callable[[Tensor], Tensor] | None,
        weights: dict[str, float],
        states: Tensor,
        log_probs: Tensor,
        tokens: Tensor,
    ):
        self.draft, self.reduced_head, self.weights = draft, reduced_head, weights
        self.states, self.log_probs, self.tokens = states, log_probs, tokens

    def __call__(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """`(n, H)` predictions → `(n,)` losses and `(n,)` bool."""
        logits = self.draft.compute_logits(predicted, reduced_head=self.reduced_head)
        tokens = _most_probable(logits.detach())
        if self.draft.draft_to_target is not None:
            tokens = self.draft.draft_to_target[tokens]
        losses = mixed_loss(self.weights, predicted, self.states, logits, self.log_probs)
        return losses, tokens == self.tokens
