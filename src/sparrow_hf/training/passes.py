"""The passes of multi-token prediction: one padded batch of the draft's sequences, run K times on its own outputs.

Notation, for one sample (paper, section 3; `draft_inputs.py` says which positions exist). Visual tokens are left out
of the count: text tokens x0 … x(N−1), the answer starts at xA.

    text t          holds (embedding of x(t+1), state h(t) of x(t)), predicts h(t+1), hence x(t+2)
    loss j          at text A−1+j, j = 0 … J−1, J = N−A−1: predicts x(A+1+j), judged by head(h(A+j))
    not drafted     xA, the prefill's own token
    last two        N−2 and N−1 predict nothing that is known; they are left out

Pass 0 runs on the target's states. Pass s replaces the states of the answer's text by the outputs of pass s−1, one
position earlier; the prompt keeps the target's states in every pass, so pass s has losses from j = s on only.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .._transformers import attention_of
from ..draft_inputs import DraftInputs, DraftPositions, additive_mask, causal, put
from ..errors import TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from .data import TrainingStates


@dataclass(kw_only=True)
class DraftBatch(DraftInputs):
    """The draft's inputs of B samples (their text states with noise, if any), and their J losses.

    Attributes:
        first_loss: `(B,)` text index of loss 0: the last text token of the prompt, A−1.
        num_losses: `(B,)` losses of each sample.
        target_states: `(B, J, H)` post-norm state that loss j is computed against.
    """

    first_loss: Tensor
    num_losses: Tensor
    target_states: Tensor

    @property
    def loss_text(self) -> Tensor:
        """`(B, J)` text index of each loss; padding repeats the last text token."""
        offsets = torch.arange(self.target_states.shape[1], device=self.position_ids.device)
        return (self.first_loss[:, None] + offsets).clamp(max=self.text_positions.shape[1] - 1)

    def has_loss(self, step: int) -> Tensor:
        """`(B, J − step)` bool: column u is true where loss u + step exists."""
        index = torch.arange(step, self.target_states.shape[1], device=self.position_ids.device)
        return index < self.num_losses[:, None]


def make_batch(
    samples: Sequence[tuple[TrainingStates, DraftPositions]],
    position_mode: str,
    noise: Sequence[Tensor] | None = None,
) -> DraftBatch:
    """Pads samples into one batch.

    Args:
        samples: States of the target, and the positions of them that the draft reads: all text and some of the visual
            ones that the states hold.
        position_mode: `config.position_mode` of the draft.
        noise: `(N, n·H)` per sample, added to its text states.

    Raises:
        TrainingDataError: A position that the draft reads is not among the recorded ones.
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    length = max(len(kept.indices) for _, kept in samples) - 2
    for index, (states, kept) in enumerate(samples):
        text, num_text = kept.text, len(kept.text)
        # text tokens   x0 … x(A−1) │ xA … x(N−3) x(N−2) x(N−1)
        # text index    0  …  A−1   │ A  …  N−3                    the last two end the sequence: nothing visual there
        # losses               0      1  …  J−1                    judged by h(A) … h(N−2)
        first_answer = int((text < states.answer_start).sum())
        if not torch.isin(kept.visual, states.visual_rows).all():
            raise TrainingDataError(
                f"the draft reads {len(kept.visual)} visual tokens, but the recording keeps only some of them "
                f"({len(states.visual_rows)}): record visual states, or train a draft of num_glimpse_tokens=0 with "
                "num_visual_rows_max=0"
            )
        chosen = torch.searchsorted(states.visual_rows, kept.visual)
        text_states = states.text_states if noise is None else states.text_states + noise[index]
        columns["next_ids"].append(states.input_ids[text][1 : num_text - 1])
        columns["text_states"].append(text_states[: num_text - 2])
        columns["text_positions"].append((~kept.is_visual).nonzero().squeeze(-1)[: num_text - 2])
        columns["visual_states"].append(states.visual_states[chosen])
        columns["visual_positions"].append(kept.is_visual.nonzero().squeeze(-1))
        columns["position_ids"].append(kept.position_ids(position_mode)[:-2])
        columns["first_loss"].append(text.new_tensor(first_answer - 1))
        columns["num_losses"].append(text.new_tensor(num_text - first_answer - 1))
        columns["target_states"].append(states.last_states[first_answer : num_text - 1])
    scalars = ("first_loss", "num_losses")
    fill = {"text_positions": length, "visual_positions": length}
    return DraftBatch(
        **{
            name: torch.stack(parts)
            if name in scalars
            else pad_sequence(parts, batch_first=True, padding_value=fill.get(name, 0))
            for name, parts in columns.items()
        }
    )


class PassKeys:
    """The cache of one pass: the keys and values of earlier passes, followed by its own.

    A layer that is run again (gradient checkpointing does, in the backward pass) finds and leaves the same keys; a
    cache that grows in place would hold them twice.

    Args:
        earlier: The cache of the pass before.
    """

    def __init__(self, earlier: "PassKeys | None" = None):
        self.earlier = earlier
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a decoder layer calls with its `(B, heads, n, head_dim)` keys and values; returns all there are."""
        if self.earlier is not None:
            earlier_keys, earlier_values = self.earlier.layers[layer_idx]
            keys = torch.cat((earlier_keys, keys), dim=-2)
            values = torch.cat((earlier_values, values), dim=-2)
        self.layers[layer_idx] = keys, values
        return keys, values


def exact_passes(
    draft: SparrowDraftModel, batch: DraftBatch, num_passes: int, forward: nn.Module | None = None
) -> list[Tensor]:
    """Passes that attend to exactly the keys of decoding (EAGLE-3's training-time test, for any number of steps).

    Every loss u starts a chain: the draft reads the target's states up to text A−1+u and then its own outputs.
    Step s of chain u is at text A−1+u+s, and all chains take step s together, in pass s:

        keys       positions of pass 0         │ pass 1      │ pass 2      │ …
        columns    0 ………………………………………… R−1      │ chain 0 … U │ chain 0 … U │
        chain u    those ≤ its start           │ chain u     │ chain u     │     (its own column of each later pass)

    In other words: in pass s, text t sees the pass-0 keys up to t−s and the pass-j key of t−(s−j), j = 1 … s.
    The keys of earlier passes stay in the graph, so that gradients flow through them.

    Args:
        draft: A draft bound to its target.
        batch: Its inputs.
        num_passes: Passes to run, at least one; fewer where answers are shorter.
        forward: The draft as wrapped by a trainer; by default the draft itself.

    Returns:
        For each pass s, `(B, J−s, H)` predicted states; column u belongs to loss u + s.
    """
    forward = draft if forward is None else forward
    keys = PassKeys()
    embeds, batch = draft.embed_inputs(batch)
    loss_text = batch.loss_text
    starts = batch.text_positions.gather(1, loss_text)
    hidden = _gather(_run_all(draft, forward, batch, embeds, keys), starts)
    next_ids = batch.next_ids.gather(1, loss_text)
    position_ids = batch.position_ids.gather(1, starts.clamp(max=batch.position_ids.shape[1] - 1))
    summary = batch.visual_summary
    if summary is not None:
        # All visual tokens are in the prompt, so the whole answer has the same summary.
        summary = _gather(summary, batch.first_loss[:, None])

    outputs = [hidden]
    for step in range(1, min(num_passes, hidden.shape[1])):
        # A chain that has reached the end of the answer is dropped with its last column; its older keys remain.
        keys = PassKeys(keys)
        # What is wrapped for mixed precision returns fp32, whatever the draft's dtype is.
        hidden = forward(
            draft.embed_next(next_ids[:, step:], outputs[-1][:, :-1].to(draft.dtype), summary, step),
            position_ids[:, step:],
            _chain_mask(draft, batch, starts, step),
            keys,
        ).last_hidden_state
        outputs.append(hidden)
    return outputs


def reinput_passes(
    draft: SparrowDraftModel, batch: DraftBatch, num_passes: int, forward: nn.Module | None = None
) -> list[Tensor]:
    """Passes as in the paper: each runs the whole sequence anew, causally, and sees no key of another pass.

        pass 0     h(0) … h(A−1) │ h(A)      h(A+1)    …       text; visual tokens h^m in every pass
        pass s     h(0) … h(A−1) │ ĥ(A)      ĥ(A+1)    …       ĥ(t) = output of pass s−1 at text t−1

    Args and returns as [`exact_passes`].
    """
    forward = draft if forward is None else forward
    embeds, batch = draft.embed_inputs(batch)
    loss_positions = batch.text_positions.gather(1, batch.loss_text)
    # Indices of the answer's text; the prompt's states are never replaced.
    text_index = torch.arange(batch.next_ids.shape[1], device=embeds.device)
    answer = batch.text_positions.masked_fill(text_index <= batch.first_loss[:, None], embeds.shape[1])
    hidden, outputs = embeds, []
    for step in range(min(num_passes, loss_positions.shape[1])):
        if step > 0:
            predicted = _gather(hidden, batch.text_positions)
            shifted = torch.cat((predicted[:, :1], predicted[:, :-1]), dim=1).to(draft.dtype)
            embeds = put(embeds, answer, draft.embed_next(batch.next_ids, shifted, batch.visual_summary, step))
        hidden = _run_all(draft, forward, batch, embeds)
        outputs.append(_gather(hidden, loss_positions)[:, step:])
    return outputs


def _run_all(
    draft: SparrowDraftModel,
    forward: nn.Module,
    batch: DraftBatch,
    embeds: Tensor,
    cache: PassKeys | None = None,
) -> Tensor:
    """`(B, R, H)` outputs of a causal pass over everything. Padding is at the end, so nothing attends to it."""
    if attention_of(draft.config) != "eager":
        return forward(embeds, batch.position_ids, cache=cache, is_causal=True).last_hidden_state
    size, length = batch.position_ids.shape
    index = torch.arange(length, device=embeds.device).expand(size, -1)
    mask = additive_mask(causal(index, length), draft.dtype)
    return forward(embeds, batch.position_ids, mask, cache).last_hidden_state


def _chain_mask(draft: SparrowDraftModel, batch: DraftBatch, starts: Tensor, step: int) -> Tensor:
    """`(B, 1, U, R + keys of passes 1 … step)` additive mask of the chains that take `step` (see [`exact_passes`])."""
    num_losses, num_chains = starts.shape[1], starts.shape[1] - step
    visible = [causal(starts[:, :num_chains], batch.position_ids.shape[1])]
    for earlier in range(1, step + 1):
        own = torch.eye(num_chains, num_losses - earlier, dtype=torch.bool, device=starts.device)
        visible.append(own.expand(len(starts), -1, -1))
    return additive_mask(torch.cat(visible, dim=-1), draft.dtype)


def _gather(hidden: Tensor, positions: Tensor) -> Tensor:
    """`(B, R, H)`, `(B, n)` → `(B, n, H)`; padding repeats the last one."""
    index = positions.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
