"""The passes of multi-token prediction: one padded batch of the draft's rows, run K times on its own outputs.

Notation, for one sample (paper, section 3; `rows.py` says which rows exist). Visual rows are left out of the count:
text tokens x0 … x(N−1), the answer starts at xA.

    text row t      holds (embedding of x(t+1), state h(t) of x(t)), predicts h(t+1), hence x(t+2)
    loss row j      = text row A−1+j, j = 0 … J−1, J = N−A−1: predicts x(A+1+j), judged by head(h(A+j))
    not drafted     xA, the prefill's own token
    last rows       N−2 and N−1 predict nothing that is known; they are left out

Pass 0 runs on the target's states. Pass s replaces the states of answer rows by the outputs of pass s−1, one row
earlier; prompt rows keep the target's states in every pass, so pass s has a loss from j = s on only.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from .._transformers import attention_of
from ..errors import TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from ..rows import DraftInputs, DraftRows
from .data import TrainingStates


@dataclass(kw_only=True)
class DraftBatch(DraftInputs):
    """B samples as the draft sees them (their text states with noise, if any), and their J loss rows.

    Attributes:
        first_loss_row: `(B,)` text row of loss row 0: the last one of the prompt, A−1.
        num_loss_rows: `(B,)` loss rows of each sample.
        target_states: `(B, J, H)` post-norm state that loss row j should have predicted.
    """

    first_loss_row: Tensor
    num_loss_rows: Tensor
    target_states: Tensor

    @property
    def loss_text_rows(self) -> Tensor:
        """`(B, J)` text row of each loss row; a padded one repeats the last text row."""
        offsets = torch.arange(self.target_states.shape[1], device=self.positions.device)
        return (self.first_loss_row[:, None] + offsets).clamp(max=self.text_rows.shape[1] - 1)

    def has_loss(self, step: int) -> Tensor:
        """`(B, J − step)` bool: column u is true where loss row u + step exists."""
        rows = torch.arange(step, self.target_states.shape[1], device=self.positions.device)
        return rows < self.num_loss_rows[:, None]


def make_batch(
    samples: Sequence[tuple[TrainingStates, DraftRows]], position_mode: str, noise: Sequence[Tensor] | None = None
) -> DraftBatch:
    """Pads samples into one batch.

    Args:
        samples: States of the target and the rows of them that the draft shall see. Rows are all text rows and some of
            the visual rows that the states hold.
        position_mode: `config.position_mode` of the draft.
        noise: `(N, n·H)` per sample, added to its text states.

    Raises:
        TrainingDataError: A row that the draft shall see is not among the recorded ones.
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    num_rows = max(len(rows.indices) for _, rows in samples) - 2
    for index, (states, rows) in enumerate(samples):
        text, num_text = rows.text, len(rows.text)
        # text tokens   x0 … x(A−1) │ xA … x(N−3) x(N−2) x(N−1)
        # text rows     0  …  A−1   │ A  …  N−3                    the last two end the sequence: no visual row there
        # loss rows            0      1  …  J−1                    judged by h(A) … h(N−2)
        first_answer = int((text < states.answer_start).sum())
        text_rows = (~rows.is_visual).nonzero().squeeze(-1)[: num_text - 2]
        visual_rows = rows.is_visual.nonzero().squeeze(-1)
        if not torch.isin(rows.visual, states.visual_rows).all():
            raise TrainingDataError(
                f"the draft is to see {len(rows.visual)} visual rows, but the recording keeps only some of them "
                f"({len(states.visual_rows)}): record with visual rows, or train a draft of num_glimpse_tokens=0 with "
                "num_visual_rows_max=0"
            )
        chosen = torch.searchsorted(states.visual_rows, rows.visual)
        text_states = states.text_states if noise is None else states.text_states + noise[index]
        columns["next_ids"].append(states.input_ids[text][1 : num_text - 1])
        columns["text_states"].append(text_states[: num_text - 2])
        columns["text_rows"].append(text_rows)
        columns["visual_states"].append(states.visual_states[chosen])
        columns["visual_rows"].append(visual_rows)
        columns["positions"].append(rows.positions(position_mode)[:-2])
        columns["first_loss_row"].append(text.new_tensor(first_answer - 1))
        columns["num_loss_rows"].append(text.new_tensor(num_text - first_answer - 1))
        columns["target_states"].append(states.last_states[first_answer : num_text - 1])
    scalars = ("first_loss_row", "num_loss_rows")
    fill = {"text_rows": num_rows, "visual_rows": num_rows}
    return DraftBatch(
        **{
            name: torch.stack(parts)
            if name in scalars
            else pad_sequence(parts, batch_first=True, padding_value=fill.get(name, 0))
            for name, parts in columns.items()
        }
    )


def exact_passes(
    draft: SparrowDraftModel, batch: DraftBatch, num_passes: int, forward: nn.Module | None = None
) -> list[Tensor]:
    """Passes that see exactly what decoding sees (EAGLE-3's training-time test, for any number of steps).

    Every loss row u starts a chain: the draft knows the target's states up to text row A−1+u and then feeds itself.
    Step s of chain u stands on text row A−1+u+s, and all chains take step s together, in pass s:

        keys       rows of pass 0              │ pass 1      │ pass 2      │ …
        columns    0 ………………………………………… R−1      │ chain 0 … U │ chain 0 … U │
        chain u    rows ≤ its start            │ chain u     │ chain u     │     (its own column of each later pass)

    In terms of rows: pass s, row t sees the pass-0 keys of rows ≤ t−s and the pass-j key of row t−(s−j), j = 1 … s.
    The keys stay in one growing cache, so that gradients flow through the earlier passes.

    Args:
        draft: A draft bound to its target.
        batch: What it sees.
        num_passes: Passes to run; fewer where answers are shorter.
        forward: The draft as a trainer has wrapped it, if it has.

    Returns:
        For each pass s, `(B, J−s, H)` predicted states; column u belongs to loss row u + s.
    """
    forward = forward or draft
    cache = DynamicCache()
    batch = draft.compress_visual(batch)
    rows = draft.make_rows(batch, draft.read_states(draft.reduce_features(batch.text_states), batch.visual_summary))
    loss_text_rows = batch.loss_text_rows
    starts = batch.text_rows.gather(1, loss_text_rows)
    hidden = _gather_rows(_run_rows(draft, forward, batch, rows, cache), starts)
    next_embeds = draft.embed(batch.next_ids.gather(1, loss_text_rows))
    positions = batch.positions.gather(1, starts.clamp(max=batch.positions.shape[1] - 1))
    summary = batch.visual_summary
    if summary is not None:
        # All visual rows stand in the prompt, so the whole answer is told the same.
        summary = _gather_rows(summary, batch.first_loss_row[:, None])

    outputs = [hidden]
    for step in range(1, min(num_passes, hidden.shape[1])):
        # A chain that ran off the end of the answer drops out with its last column; its older keys remain.
        hidden = forward(
            draft.fuse(next_embeds[:, step:], draft.read_states(outputs[-1][:, :-1], summary, step)),
            positions[:, step:],
            _chain_mask(draft, batch, starts, step),
            cache,
        ).last_hidden_state
        outputs.append(hidden)
    return outputs


def reinput_passes(
    draft: SparrowDraftModel, batch: DraftBatch, num_passes: int, forward: nn.Module | None = None
) -> list[Tensor]:
    """Passes as in the paper: each runs all rows anew, causally, and sees no key of another pass.

        pass 0     h(0) … h(A−1) │ h(A)      h(A+1)    …       text rows; visual rows h^m in every pass
        pass s     h(0) … h(A−1) │ ĥ(A)      ĥ(A+1)    …       ĥ(t) = output of pass s−1 in text row t−1

    Args and returns as [`exact_passes`].
    """
    forward = forward or draft
    batch = draft.compress_visual(batch)
    true_states = draft.read_states(draft.reduce_features(batch.text_states), batch.visual_summary)
    text_index = torch.arange(true_states.shape[1], device=true_states.device)
    is_answer = (text_index > batch.first_loss_row[:, None])[..., None]
    loss_rows = batch.text_rows.gather(1, batch.loss_text_rows)
    states, outputs = true_states, []
    for step in range(min(num_passes, loss_rows.shape[1])):
        hidden = _run_rows(draft, forward, batch, draft.make_rows(batch, states))
        outputs.append(_gather_rows(hidden, loss_rows)[:, step:])
        predicted = _gather_rows(hidden, batch.text_rows)
        shifted = torch.cat((predicted[:, :1], predicted[:, :-1]), dim=1)
        states = torch.where(is_answer, draft.read_states(shifted, batch.visual_summary, step + 1), true_states)
    return outputs


def _run_rows(
    draft: SparrowDraftModel,
    forward: nn.Module,
    batch: DraftBatch,
    rows: Tensor,
    cache: DynamicCache | None = None,
) -> Tensor:
    """`(B, R, H)` outputs of a causal pass over all rows. Padding stands at the end: no row before it sees it."""
    needs_mask = draft.config.sliding_window is not None or attention_of(draft.config) == "eager"
    if not needs_mask:
        return forward(rows, batch.positions, cache=cache, is_causal=True).last_hidden_state
    index = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
    visible = _visible(draft, batch, index, _is_text(batch).cumsum(1) - 1)
    return forward(rows, batch.positions, _additive(draft, visible), cache).last_hidden_state


def _chain_mask(draft: SparrowDraftModel, batch: DraftBatch, starts: Tensor, step: int) -> Tensor:
    """`(B, 1, U, R + keys of passes 1 … step)` additive mask of the chains that take `step` (see [`exact_passes`])."""
    num_loss_rows, num_chains = starts.shape[1], starts.shape[1] - step
    visible = [_visible(draft, batch, starts[:, :num_chains], batch.loss_text_rows[:, step:])]
    for earlier in range(1, step + 1):
        own = torch.eye(num_chains, num_loss_rows - earlier, dtype=torch.bool, device=starts.device)
        visible.append(own.expand(len(starts), -1, -1))
    return _additive(draft, torch.cat(visible, dim=-1))


def _visible(draft: SparrowDraftModel, batch: DraftBatch, last_rows: Tensor, query_text_index: Tensor) -> Tensor:
    """`(B, Q, R)` bool: pass-0 rows up to `last_rows` `(B, Q)` that are in the window of a text row.

    Visual rows never leave the window, as in decoding.
    """
    rows = torch.arange(batch.positions.shape[1], device=last_rows.device)
    visible = rows <= last_rows[..., None]
    if draft.config.sliding_window is not None:
        is_text = _is_text(batch)[:, None]
        distance = query_text_index[..., None] - (is_text.cumsum(-1) - 1)
        visible = visible & (~is_text | (distance < draft.config.sliding_window))
    return visible


def _is_text(batch: DraftBatch) -> Tensor:
    """`(B, R)` bool: which of the draft's rows are text rows."""
    size, num_rows = batch.positions.shape
    marks = torch.zeros((size, num_rows + 1), dtype=torch.bool, device=batch.positions.device)
    return marks.scatter(1, batch.text_rows, True)[:, :num_rows]


def _additive(draft: SparrowDraftModel, visible: Tensor) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=draft.dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(draft.dtype).min)[:, None]


def _gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """`(B, R, H)`, `(B, n)` → `(B, n, H)`; padded rows repeat the last one."""
    index = rows.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
