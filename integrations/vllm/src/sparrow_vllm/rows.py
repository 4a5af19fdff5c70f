"""Which rows of a forward the draft sees, at which positions, with which tokens. Pure torch: nothing of vLLM.

A row is one token of one request. The draft of a Sparrow model reads text rows and a few visual ones, the *glimpse*:

    prompt        <s> Describe <vs> v v v v v v <ve> this .
    kept           0     1      2     3     4    5    6   7   (compact positions)
    hidden                        v   v v   v

In vLLM a prompt comes in pieces (chunked prefill), its beginning may be cached, and it is computed again after a
preemption. So what is known of a row must be a function of the tokens up to it and the one after it. It is kept in one
integer per KV slot, beside the KV cache: whoever has the slot of the row before has all that is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Text between two visual runs that is no longer than this is a frame header, hidden like visual rows (the rule of
#: `sparrow_hf.draft_inputs`).
MAX_FRAME_HEADER_TOKENS = 16

#: One slot of the memory, low bits first: next token is visual (1) · distance to the last visual row (5; FAR: none
#: near) · visual rows up to this one (28) · kept rows up to this one (28).
FAR = 31
_DISTANCE, _VISUAL, _KEPT, _COUNT = 1, 6, 34, (1 << 28) - 1


@dataclass(frozen=True)
class Batch:
    """Where the rows of one forward belong. Tensors only, of shapes that the batch's size alone decides."""

    num_rows: int  # n, padding included
    starts: Tensor  # (R + 1,) first row of each request; those behind the last start are padding
    lengths: Tensor  # (R,) tokens of each request, the rows of this forward included
    blocks: Tensor  # (R, B) its KV blocks
    block_size: int  # slots of a block
    max_length: int  # tokens that a request can have

    def slot(self, request: Tensor, index: Tensor) -> Tensor:
        """KV slot of the token `index` of a request."""
        index = index.clamp(0, self.blocks.shape[1] * self.block_size - 1)
        return self.blocks[request, index // self.block_size].long() * self.block_size + index % self.block_size


@dataclass(frozen=True)
class Rows:
    """What the draft needs of each of the n rows."""

    hidden: Tensor  # no row attends to it
    is_visual: Tensor  # it enters as a visual state
    positions: Tensor  # its RoPE position
    next_ids: Tensor  # the token whose embedding it joins
    slots: Tensor  # its KV slot, −1 for padding


def describe(
    batch: Batch,
    next_ids: Tensor,
    next_is_visual: Tensor,
    memory: Tensor,
    glimpse: Tensor,
    after_visual: int | None,
    compact: bool,
) -> Rows:
    """Works out the rows of one forward, and remembers them.

    Nothing here waits for the device or depends on values, so it can be captured in a CUDA graph.

    Args:
        next_ids: `(n,)` token after each row.
        next_is_visual: `(n,)` bool: that token is a visual one.
        memory: `(slots + 1,)` int64, zero at first, read and written; the last one is for padding.
        glimpse: `(V,)` bool: whether a prompt's visual row 0, 1, … is kept; V is the most that one can have.
        after_visual: Token behind a visual run, for a row before one whose end is not in this forward.
        compact: Positions count kept rows; else all rows.
    """
    n, device = batch.num_rows, next_ids.device
    rows = torch.arange(n, device=device)
    starts = batch.starts.long()
    request = torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp_max(len(starts) - 2)
    start, end = starts[:-1][request], starts[1:][request]
    first = (batch.lengths.long() - starts.diff())[request]
    index = first + rows - start
    usable = (rows < end) & (index < batch.max_length)
    slots = torch.where(usable, batch.slot(request, index), -1)

    before = torch.where(first > 0, memory[batch.slot(request, first - 1)], FAR << _DISTANCE)
    visual_before, kept_before = (before >> _VISUAL) & _COUNT, before >> _KEPT

    #             row r:   v  t  t  v        is_visual[r] = next_is_visual[r − 1]; of a request's first row, the memory
    #  next_is_visual[r]:  0  0  1  …
    is_visual = torch.where(rows == start, (before & 1).bool(), next_is_visual.roll(1))
    visual_count = _running(is_visual, start) + visual_before

    # Frame headers: the text between two visual rows that are near each other.
    last = torch.where(is_visual, rows, -1).cummax(0).values
    since = torch.where(last >= start, rows - last, rows - start + 1 + ((before >> _DISTANCE) & FAR)).clamp_max(FAR)
    until = _next(next_is_visual, rows, end) + 1 - rows
    is_header = ~is_visual & (since + until - 1 <= MAX_FRAME_HEADER_TOKENS)

    # What padding counts is beyond any prompt.
    in_glimpse = glimpse[(visual_count - 1).clamp(0, len(glimpse) - 1)]
    kept = torch.where(is_visual, in_glimpse, ~is_header)
    kept_count = _running(kept, start) + kept_before

    remembered = (kept_count << _KEPT) | (visual_count << _VISUAL) | (since << _DISTANCE) | next_is_visual
    memory[torch.where(usable, slots, len(memory) - 1)] = remembered

    # Sparrow deletes rows first and shifts embeddings then: a row before a visual run or a header joins the embedding
    # of the first text token after it.
    next_is_header = is_header.roll(-1) & (rows + 1 < end)
    next_is_text = ~next_is_visual & ~next_is_header
    following = _next(next_is_text, rows, end)
    joined = next_ids[following.clamp_max(n - 1)]
    unknown = next_ids if after_visual is None else torch.full_like(next_ids, after_visual)
    return Rows(
        hidden=~kept & usable,
        is_visual=is_visual & usable,
        positions=(kept_count - 1).clamp_min(0) if compact else index,
        next_ids=torch.where(following < end, joined, unknown),
        slots=slots,
    )


def _running(flags: Tensor, start: Tensor) -> Tensor:
    """How many flags there are from a request's first row up to and with each row."""
    total = torch.nn.functional.pad(flags.long().cumsum(0), (1, 0))
    return total[1:] - total[start]


def _next(flags: Tensor, rows: Tensor, end: Tensor) -> Tensor:
    """First row with a flag from each row on, in the same request; a number no forward reaches if there is none."""
    none = 1 << 40
    found = torch.where(flags, rows, none).flip(0).cummin(0).values.flip(0)
    return torch.where(found < end, found, none)
