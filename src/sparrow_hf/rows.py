"""Which rows of a prompt the draft sees, and where they stand. Shared by generation and training, so that both agree.

A prompt of L tokens has *visual* rows (placeholders), and *text* rows (everything else). The draft's sequence keeps
all text rows and a fixed number of visual rows, in their original order:

    prompt       <s> Describe <vs> v v v v v v v v <ve> this . Answer :      a0 a1 …
    kept (M=2)    0     1      2       5       8    11   12  …              (indices into the prompt)
    draft rows    t     t      t       g       g    t    t   …
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: `num_glimpse_tokens` of a draft that keeps all visual rows: more than any prompt has.
EVERY_VISUAL_ROW = 2**31 - 1

#: Text between two visual runs that is no longer than this is a frame header (time stamp, "Frame 7:", delimiters), as
#: Qwen3-VL, InternVL and SmolVLM write one per frame. Headers grow with the video, so they count as visual rows that
#: are never kept; a longer stretch between two images is the user's own text.
MAX_FRAME_HEADER_TOKENS = 16


@dataclass(frozen=True)
class DraftRows:
    """The rows of one prompt that the draft's sequence keeps, in order.

    Attributes:
        indices: `(R,)` positions in the prompt, ascending.
        is_visual: `(R,)` bool, true for glimpse rows.
        prompt_positions: `(R,)` positions in the prompt without its padding.
        prompt_length: Tokens of the prompt without its padding.
    """

    indices: Tensor
    is_visual: Tensor
    prompt_positions: Tensor
    prompt_length: int

    @property
    def text(self) -> Tensor:
        """`(T,)` prompt positions of the text rows."""
        return self.indices[~self.is_visual]

    @property
    def visual(self) -> Tensor:
        """`(M,)` prompt positions of the glimpse rows."""
        return self.indices[self.is_visual]

    def positions(self, mode: str) -> Tensor:
        """`(R,)` RoPE position of each row: its index here (`"compact"`) or in the prompt (`"original"`)."""
        if mode == "original":
            return self.prompt_positions
        return torch.arange(len(self.indices), device=self.indices.device)

    def next_position(self, mode: str) -> int:
        """RoPE position of the first row after these."""
        return self.prompt_length if mode == "original" else len(self.indices)


@dataclass(kw_only=True)
class DraftInputs:
    """What the draft reads of B sequences, right-padded: T text rows, M visual rows, R = T + M rows in all.

    Attributes:
        next_ids: `(B, T)` token after each text row's own.
        text_states: `(B, T, n·H)` target states of the text rows, the feature layers side by side.
        text_rows: `(B, T)` where each text row stands among the draft's rows; R where padded.
        visual_states: `(B, M, H)` bridge states.
        visual_rows: `(B, M)` where each visual row stands; R where padded.
        positions: `(B, R)` RoPE positions.
        visual_summary: `(B, T, H)` what each text row is told of the visual rows before it, for drafts that summarise
            them (see `SparrowDraftModel.compress_visual`).
    """

    next_ids: Tensor
    text_states: Tensor
    text_rows: Tensor
    visual_states: Tensor
    visual_rows: Tensor
    positions: Tensor
    visual_summary: Tensor | None = None


def visual_mask(input_ids: Tensor, visual_token_ids: list[int]) -> Tensor:
    """`(…, L)` bool: which ids are image or video placeholders."""
    return torch.isin(input_ids, torch.tensor(visual_token_ids, dtype=input_ids.dtype, device=input_ids.device))


def frame_header_mask(is_visual: Tensor) -> Tensor:
    """`(L,)` bool: text rows that stand between two visual runs at most [`MAX_FRAME_HEADER_TOKENS`] apart."""
    visual_positions = is_visual.nonzero().squeeze(-1)
    header = torch.zeros_like(is_visual)
    gaps = visual_positions[1:] - visual_positions[:-1] - 1
    for gap in ((gaps > 0) & (gaps <= MAX_FRAME_HEADER_TOKENS)).nonzero().squeeze(-1).tolist():
        header[visual_positions[gap] + 1 : visual_positions[gap + 1]] = True
    return header


def strided(positions: Tensor, count: int) -> Tensor:
    """`count` of the `(V,)` positions, evenly strided from the middle of each of `count` equal stretches."""
    if count >= len(positions):
        return positions
    picks = (torch.arange(count, device=positions.device) + 0.5) * (len(positions) / max(count, 1))
    return positions[picks.long()]


def draft_rows(
    input_ids: Tensor,
    visual_token_ids: list[int],
    num_glimpse_tokens: int,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    visual_rows: Tensor | None = None,
) -> DraftRows:
    """Chooses the rows of one sequence that the draft keeps.

    Args:
        input_ids: `(L,)` prompt, or prompt and answer.
        visual_token_ids: The target's placeholder ids.
        num_glimpse_tokens: Visual rows to keep: evenly strided, or at random if a `generator` is given (training).
        attention_mask: `(L,)`, 0 on padding; padding is never kept.
        visual_rows: `(M,)` positions of the visual rows to keep, whatever `num_glimpse_tokens` says (analysis).
    """
    is_visual = visual_mask(input_ids, visual_token_ids)
    present = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
    is_text = present & ~is_visual & ~frame_header_mask(is_visual)
    candidates = (is_visual & present).nonzero().squeeze(-1)
    if visual_rows is not None:
        chosen = visual_rows
    elif generator is None:
        chosen = strided(candidates, num_glimpse_tokens)
    else:
        order = torch.randperm(len(candidates), generator=generator, device=generator.device)
        chosen = candidates[order[:num_glimpse_tokens].to(candidates.device)]
    keep = is_text.clone()
    keep[chosen] = True
    indices = keep.nonzero().squeeze(-1)
    prompt_positions = present.cumsum(0) - 1
    return DraftRows(indices, is_visual[indices], prompt_positions[indices], int(present.sum()))
