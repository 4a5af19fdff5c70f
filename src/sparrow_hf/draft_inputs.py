"""Which positions of a sequence the draft reads, and their order. Shared by generation and training.

A prompt of L tokens has *visual* positions (placeholders), and *text* positions (everything else). The draft's
sequence keeps all text positions and a fixed number of visual ones, in their original order:

    prompt       <s> Describe <vs> v v v v v v v v <ve> this . Answer :      a0 a1 …
    kept (M=2)    0     1      2       5       8    11   12  …              (positions in the prompt)
    kind          t     t      t       g       g    t    t   …              (text, glimpse)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count as count_up
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

#: `num_glimpse_tokens` of a draft that keeps all visual positions: more than any prompt has.
EVERY_VISUAL_TOKEN = 2**31 - 1

#: Text between two visual runs that is no longer than this is a frame header (time stamp, "Frame 7:", delimiters), as
#: Qwen3-VL, InternVL and SmolVLM write one per frame. Headers grow with the video, so they count as visual positions
#: that are never kept; a longer stretch between two images is the user's own text.
MAX_FRAME_HEADER_TOKENS = 16


@dataclass(frozen=True)
class DraftPositions:
    """The positions of one prompt that the draft's sequence keeps, in order.

    Attributes:
        indices: `(R,)` positions in the prompt, ascending.
        is_visual: `(R,)` bool, true for glimpse positions.
        without_padding: `(R,)` positions in the prompt without its padding.
        prompt_length: Tokens of the prompt without its padding.
    """

    indices: Tensor
    is_visual: Tensor
    without_padding: Tensor
    prompt_length: int

    @property
    def text(self) -> Tensor:
        """`(T,)` text positions in the prompt."""
        return self.indices[~self.is_visual]

    @property
    def visual(self) -> Tensor:
        """`(M,)` glimpse positions in the prompt."""
        return self.indices[self.is_visual]

    def position_ids(self, mode: str) -> Tensor:
        """`(R,)` RoPE position of each: its index here (`"compact"`) or in the prompt (`"original"`)."""
        if mode == "original":
            return self.without_padding
        return torch.arange(len(self.indices), device=self.indices.device)

    def next_position_id(self, mode: str) -> int:
        """RoPE position of the first token after these."""
        return self.prompt_length if mode == "original" else len(self.indices)

    def to_collect(self, text_layers: Iterable[int], bridge_layer: int) -> dict[int, Tensor]:
        """Layer id → positions in the prompt where its states are read."""
        wanted = dict.fromkeys(text_layers, self.text)
        wanted[bridge_layer] = self.indices if bridge_layer in wanted else self.visual
        return wanted

    def by_kind(
        self, states: Mapping[int, Tensor], text_layers: Iterable[int], bridge_layer: int
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Splits the states of [`~DraftPositions.to_collect`] into text and visual ones.

        Args:
            states: Layer id → `(B, n, H)`.

        Returns:
            text: Text layer → `(B, T, H)`.
            visual: `(B, M, H)` states of the bridge layer.
        """
        text, visual = {layer: states[layer] for layer in text_layers}, states[bridge_layer]
        if bridge_layer in text:
            is_visual = self.is_visual.to(visual.device)
            text[bridge_layer], visual = visual[:, ~is_visual], visual[:, is_visual]
        return text, visual


@dataclass(kw_only=True)
class DraftInputs:
    """What the draft reads of B sequences, right-padded: T text tokens, M visual ones, R = T + M in all.

    Attributes:
        next_ids: `(B, T)` token after each text token.
        text_states: `(B, T, n·H)` target states of the text tokens, the feature layers side by side.
        text_positions: `(B, T)` index of each text token in the draft's sequence; R where padded.
        visual_states: `(B, M, H)` bridge states.
        visual_positions: `(B, M)` index of each visual token in it; R where padded.
        position_ids: `(B, R)` RoPE positions.
        visual_summary: `(B, T, H)` summary of the visual tokens before each text token, for drafts that
            summarise them (see `SparrowDraftModel.embed_inputs`).
    """

    next_ids: Tensor
    text_states: Tensor
    text_positions: Tensor
    visual_states: Tensor
    visual_positions: Tensor
    position_ids: Tensor
    visual_summary: Tensor | None = None


def visual_mask(input_ids: Tensor, visual_token_ids: list[int]) -> Tensor:
    """`(…, L)` bool: which ids are image or video placeholders."""
    return torch.isin(input_ids, torch.tensor(visual_token_ids, dtype=input_ids.dtype, device=input_ids.device))


def frame_header_mask(is_visual: Tensor) -> Tensor:
    """`(L,)` bool: text positions between two visual runs at most [`MAX_FRAME_HEADER_TOKENS`] apart."""
    at, far = torch.arange(len(is_visual), device=is_visual.device), 2 * len(is_visual) + MAX_FRAME_HEADER_TOKENS
    # The nearest visual position on either side of each.
    before = at.where(is_visual, -far).cummax(0).values
    after = at.where(is_visual, far).flip(0).cummin(0).values.flip(0)
    return ~is_visual & (after - before <= MAX_FRAME_HEADER_TOKENS + 1)


def strided(positions: Tensor, count: int) -> Tensor:
    """`count` of the `(V,)` positions, evenly strided from the middle of each of `count` equal intervals."""
    if count >= len(positions):
        return positions
    picks = (torch.arange(count, device=positions.device) + 0.5) * (len(positions) / max(count, 1))
    return positions[picks.long()]


def logarithmic(positions: Tensor, count: int) -> Tensor:
    """Those of the `(V,)` positions that have the index ⌊c·(e^(k/c) − 1)⌋, k = 0, 1, 2, …, where c = `count` / 5.

    The distance of two neighbours grows by a constant factor, so ⌈c·ln(1 + V/c)⌉ positions are kept: `count` of
    them at about 30·`count` visual tokens, `count` / 7 more whenever V doubles. An index is kept or not whatever
    comes after it, so the choice among the first tokens of a video is the beginning of the choice among all.
    """
    if count in (0, EVERY_VISUAL_TOKEN):
        return positions[:count]
    c = count / 5
    picks = takewhile(lambda pick: pick < len(positions), (int(c * math.expm1(k / c)) for k in count_up()))
    return positions[list(picks)]


def draft_positions(
    input_ids: Tensor,
    visual_token_ids: list[int],
    num_glimpse_tokens: int,
    glimpse_spacing: str = "even",
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    visual_positions: Tensor | None = None,
) -> DraftPositions:
    """Chooses the positions of one sequence that the draft keeps.

    Args:
        input_ids: `(L,)` prompt, or prompt and answer.
        visual_token_ids: The target's placeholder ids.
        num_glimpse_tokens: Visual positions to keep: spaced as `glimpse_spacing` says, or at random with a `generator`
            (training).
        glimpse_spacing: `"even"` ([`strided`]) or `"logarithmic"` ([`logarithmic`]).
        attention_mask: `(L,)`, 0 on padding; padding is never kept.
        visual_positions: `(M,)` visual positions to keep, whatever `num_glimpse_tokens` says (analysis).
    """
    is_visual = visual_mask(input_ids, visual_token_ids)
    present = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
    is_text = present & ~is_visual & ~frame_header_mask(is_visual)
    candidates = (is_visual & present).nonzero().squeeze(-1)
    if visual_positions is not None:
        chosen = visual_positions
    elif generator is None:
        spaced = logarithmic if glimpse_spacing == "logarithmic" else strided
        chosen = spaced(candidates, num_glimpse_tokens)
    else:
        order = torch.randperm(len(candidates), generator=generator, device=generator.device)
        chosen = candidates[order[:num_glimpse_tokens].to(candidates.device)]
    keep = is_text.clone()
    keep[chosen] = True
    indices = keep.nonzero().squeeze(-1)
    without_padding = present.cumsum(0) - 1
    return DraftPositions(indices, is_visual[indices], without_padding[indices], int(present.sum()))


def put(sequence: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """`(B, R, H)` with the `(B, n, H)` values at `(B, n)` positions; values at position R (padding) are dropped.

    The values take the sequence's dtype: under autocast they come out of layers and caches in different ones.
    """
    padded = F.pad(sequence, (0, 0, 0, 1))
    return padded.scatter_(1, positions[..., None].expand_as(values), values.to(padded.dtype))[:, :-1]


def causal(last: Tensor, num_keys: int) -> Tensor:
    """`(…, Q, num_keys)` bool: each query sees the keys up to its `(…, Q)` last one."""
    return torch.arange(num_keys, device=last.device) <= last[..., None]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, Q, K)` bool → `(B, 1, Q, K)`: 0 where a query sees a key, else the lowest number.

    Every mask of the package is additive, since eager attention silently misreads a boolean one.
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
