"""Judging rows chunk by chunk, each target state once, changes nothing but the memory and time it takes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparrow_hf.training import chunked_loss as module
from sparrow_hf.training.chunked_loss import chunked_loss

WEIGHTS = {"soft_cross_entropy": 1.0, "probability_l1": 0.5, "list_mle": 0.1, "feature_smooth_l1": 0.2}
ROWS = 11


def judged(draft, chunk_rows, monkeypatch):
    """Losses, matches and the gradient of the predicted states."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", chunk_rows * draft.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    predicted, target_states = torch.randn(2, ROWS, draft.config.hidden_size, generator=generator)
    # Near the target in every other row, but not on it: there the L1 distance has no gradient.
    predicted[::2] = target_states[::2] + 0.01 * predicted[::2]
    predicted.requires_grad_()
    losses, matches = chunked_loss(draft, WEIGHTS, predicted, target_states)
    losses.sum().backward()
    return losses.detach(), matches, predicted.grad


@pytest.mark.parametrize("reduced", [False, True])
def test_chunks_give_the_same_losses_and_gradients(make_draft, reduced, monkeypatch) -> None:
    draft = make_draft()
    if reduced:
        draft.set_vocabulary(torch.arange(0, 60, 2))
    whole = judged(draft, ROWS, monkeypatch)
    assert whole[0].shape == whole[1].shape == (ROWS,)
    assert not whole[1].all() and (reduced or whole[1][::2].all())
    for chunk_rows in (1, 4):
        for expected, found in zip(whole, judged(draft, chunk_rows, monkeypatch), strict=True):
            torch.testing.assert_close(found, expected)


def test_no_chunk_holds_more_logits_than_allowed(make_draft, monkeypatch) -> None:
    draft = make_draft()
    sizes = []
    compute_logits = type(draft).compute_logits

    def spy(self, hidden_states, *args, **kwargs):
        logits = compute_logits(self, hidden_states, *args, **kwargs)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(type(draft), "compute_logits", spy)
    judged(draft, 4, monkeypatch)
    assert max(sizes) == 4 * draft.config.vocab_size
    # Target and draft, once each.
    assert sum(sizes) == 2 * ROWS * draft.config.vocab_size


def test_a_row_weighs_what_the_part_of_the_vocabulary_can_gain(make_draft, monkeypatch) -> None:
    draft = make_draft()
    states = torch.randn(5, draft.config.hidden_size)
    part = torch.arange(0, 60, 2)
    target_probs = draft.compute_logits(states).softmax(-1)[:, part]
    draft.set_vocabulary(part)
    losses, matches = chunked_loss(draft, WEIGHTS | dict.fromkeys(list(WEIGHTS)[1:], 0.0), states, states)
    expected = -(target_probs * draft.compute_logits(states).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses, expected)
    best = draft.compute_logits(states, full_vocabulary=True).argmax(-1)
    assert torch.equal(matches, torch.isin(best, part))


@pytest.mark.parametrize("chunk_rows", [1, 4, ROWS])
@pytest.mark.parametrize("reduced", [False, True])
def test_predictions_of_one_state_share_what_the_target_says(make_draft, reduced, chunk_rows, monkeypatch) -> None:
    draft = make_draft()
    if reduced:
        draft.set_vocabulary(torch.arange(0, 60, 2))
    generator = torch.Generator().manual_seed(1)
    target_states = torch.randn(ROWS, draft.config.hidden_size, generator=generator)
    # Two passes: all states in order, then those from the third on; and one state twice more.
    judged_by = torch.tensor([*range(ROWS), *range(3, ROWS), 5, 0])
    predicted = torch.randn(len(judged_by), draft.config.hidden_size, generator=generator, requires_grad=True)
    weighted = torch.rand(len(judged_by), generator=generator)

    expected_losses, expected_matches = zip(
        *(
            chunked_loss(draft, WEIGHTS, predicted[row : row + 1], target_states[state : state + 1])
            for row, state in enumerate(judged_by.tolist())
        ),
        strict=True,
    )
    torch.cat(expected_losses).sum().backward()
    expected_gradient, predicted.grad = predicted.grad, None

    calls = []
    head = type(draft.target.head).forward
    monkeypatch.setattr(type(draft.target.head), "forward", lambda self, x: calls.append(len(x)) or head(self, x))
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", chunk_rows * draft.config.vocab_size)
    losses, matches = chunked_loss(draft, WEIGHTS, predicted, target_states, judged_by)
    if reduced:
        assert sum(calls) == ROWS
    (losses * weighted).sum().backward()
    torch.testing.assert_close(losses, torch.cat(expected_losses))
    assert torch.equal(matches, torch.cat(expected_matches))
    torch.testing.assert_close(predicted.grad, weighted[:, None] * expected_gradient)


def test_gradients_are_those_of_autograd(make_draft) -> None:
    draft = make_draft()
    generator = torch.Generator().manual_seed(2)
    predicted, target_states = torch.randn(2, ROWS, draft.config.hidden_size, generator=generator)
    predicted.requires_grad_()
    weights = dict.fromkeys(WEIGHTS, 0.0) | {"soft_cross_entropy": 1.0}
    chunked_loss(draft, weights, predicted, target_states)[0].sum().backward()
    found, predicted.grad = predicted.grad, None
    expected = -(draft.compute_logits(target_states).softmax(-1) * draft.compute_logits(predicted).log_softmax(-1))
    # Placeholders have probability 0 and log-probability −inf.
    expected.masked_fill(expected.isnan(), 0.0).sum().backward()
    assert predicted.grad.isfinite().all()
    torch.testing.assert_close(found, predicted.grad)


def test_without_gradients_nothing_is_differentiated(make_draft) -> None:
    draft = make_draft()
    with torch.no_grad():
        losses, _ = chunked_loss(draft, WEIGHTS, *torch.randn(2, ROWS, draft.config.hidden_size))
    assert not losses.requires_grad


def test_what_the_target_says_about_a_part_of_the_vocabulary_needs_one_tensor_of_the_whole(make_draft) -> None:
    draft = make_draft()
    states = 3 * torch.randn(7, draft.config.hidden_size, generator=torch.Generator().manual_seed(3))
    part = torch.arange(0, 60, 2)
    expected = draft.compute_logits(states).log_softmax(-1)
    draft.set_vocabulary(part)
    whole: dict[int, torch.Tensor] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.numel() == expected.numel():
                # Held, so that no other one gets the same memory.
                whole[made.untyped_storage().data_ptr()] = made
            return made

    with Watch():
        log_probs, tokens = module._target(draft, states)
    assert len(whole) == 1
    torch.testing.assert_close(log_probs, expected[:, part], atol=1e-6, rtol=1e-6)
    assert torch.equal(tokens, expected.argmax(-1))
