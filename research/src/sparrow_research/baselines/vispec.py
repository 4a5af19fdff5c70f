"""ViSpec-like: every visual run enters the draft as one learned row, and all later text is told one learned vector.

After Kang et al., *ViSpec: Accelerating Vision-Language Models with Vision-Aware Speculative Decoding* (2025).
"""

import dataclasses
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparrow_hf.configuration_sparrow import SparrowDraftConfig
from sparrow_hf.draft_inputs import EVERY_VISUAL_TOKEN, DraftInputs
from sparrow_hf.modeling_sparrow import SparrowDraftModel

_Inputs = TypeVar("_Inputs", bound=DraftInputs)


class ViSpecDraftConfig(SparrowDraftConfig):
    """As [`SparrowDraftConfig`]; the compressor reads every projected visual feature (layer 0)."""

    model_type = "vispec_draft"

    visual_bridge_layer: int | None = 0
    num_glimpse_tokens: int = EVERY_VISUAL_TOKEN
    position_mode: Literal["compact", "original"] = "original"


class ViSpecDraftModel(SparrowDraftModel):
    """A draft that reads each visual run as one row and one vector `g`, both by cross-attention of a learned query.

    The row stands where the run's last one stood. `g` joins the states of all text rows behind the run, drafted ones
    included: `z = FC(e ⊕ img_fc(h ⊕ g))`, where `img_fc` starts as `[I | 0]`. Behind several runs `g` is the last
    one's, before the first it is zero. Visual rows with nothing but a frame header between them are one run
    (`draft_inputs.py`).
    """

    config_class = ViSpecDraftConfig

    def __init__(self, config: ViSpecDraftConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.visual_queries = nn.Embedding(2, hidden)
        self.compressor = nn.MultiheadAttention(hidden, config.num_attention_heads, bias=False, batch_first=True)
        self.img_fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.post_init()
        with torch.no_grad():
            self.img_fc.weight.copy_(torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1))

    def read_states(self, states: Tensor, visual_summary: Tensor | None, step: int) -> Tensor:
        """`img_fc(h ⊕ g)`."""
        assert visual_summary is not None
        return self.img_fc(torch.cat((states, visual_summary.expand_as(states)), dim=-1))

    def embed_inputs(self, inputs: _Inputs) -> tuple[Tensor, _Inputs]:
        """As [`SparrowDraftModel`] does, after each visual run became one token."""
        return super().embed_inputs(self.compress_visual(inputs))

    def compress_visual(self, inputs: _Inputs) -> _Inputs:
        """Replaces each of the (at most G) runs of a sample by one row, and adds the summaries.

        visual rows     3 4 5 6 │ 9 10 11         M = 7 rows in two runs
        one per run           6 │      11         the first query's output, at the row and position of the last
        rows then       0 1 2 3   4 5  6  …       numbered anew, gaps closed
        """
        visual_states, visual_rows = _with_spare_row(inputs)
        num_rows = inputs.position_ids.shape[1]
        in_run = _runs(visual_rows, num_rows)
        outputs = self._attend(visual_states, in_run)
        last_rows = torch.where(in_run, visual_rows[:, None], -1).amax(-1)
        last_rows = last_rows.masked_fill(~in_run.any(-1), num_rows)

        # (B, T, G) runs before each text row; index 0 of the summaries is that of no run
        num_before = (last_rows[:, None] < inputs.text_positions[..., None]).sum(-1)
        summaries = F.pad(outputs[:, :, 1], (0, 0, 1, 0))
        summary = summaries.gather(1, num_before[..., None].expand(-1, -1, summaries.shape[-1]))
        return _keep_rows(inputs, last_rows, outputs[:, :, 0], summary)

    def _attend(self, visual_states: Tensor, in_run: Tensor) -> Tensor:
        """`(B, M, H)` states, `(B, G, M)` → `(B, G, 2, H)`: both queries' outputs over each run."""
        size, num_runs, _ = in_run.shape
        # A softmax over nothing is NaN: the runs that a sample has less than others see everything, and go unused.
        hidden = ~in_run & in_run.any(-1, keepdim=True)
        mask = hidden.repeat_interleave(2, dim=1).repeat_interleave(self.compressor.num_heads, dim=0)
        queries = self.visual_queries.weight.repeat(num_runs, 1).expand(size, -1, -1)
        outputs, _ = self.compressor(queries, visual_states, visual_states, attn_mask=mask, need_weights=False)
        return outputs.unflatten(1, (num_runs, 2))


def _with_spare_row(inputs: DraftInputs) -> tuple[Tensor, Tensor]:
    """Visual states and rows with one more row of padding, so that samples without any take the same way as others.

    All parameters then have a gradient in every step, be it zero: processes that train together wait for it.
    """
    spare = inputs.position_ids.shape[1]
    return F.pad(inputs.visual_states, (0, 0, 0, 1)), F.pad(inputs.visual_positions, (0, 1), value=spare)


def _runs(visual_rows: Tensor, num_rows: int) -> Tensor:
    """`(B, M)` rows, `num_rows` where padded → `(B, G, M)` bool: which of them make up each run; G is at least 1."""
    is_real = visual_rows < num_rows
    # A run goes on where the next visual row is the draft's next row.
    begins = is_real & F.pad(visual_rows.diff(dim=1) != 1, (1, 0), value=True)
    num_runs = max(int(begins.sum(1).max()), 1)
    run = begins.cumsum(1) - 1
    return is_real[:, None] & (run[:, None] == torch.arange(num_runs, device=run.device)[:, None])


def _keep_rows(inputs: _Inputs, visual_rows: Tensor, visual_states: Tensor, summary: Tensor) -> _Inputs:
    """`inputs` with `(B, G)` of the visual rows only, holding these states; the rows are numbered anew."""
    num_rows = inputs.position_ids.shape[1]
    kept = torch.zeros((len(visual_rows), num_rows + 1), dtype=torch.bool, device=visual_rows.device)
    kept = kept.scatter(1, inputs.text_positions, True).scatter(1, visual_rows, True)
    kept[:, num_rows] = False
    num_kept = int(kept.sum(1).max())
    # Old number of a row → its new one; padding and rows that are gone share the spare place at the end.
    new_rows = (kept.cumsum(1) - 1).masked_fill(~kept, num_kept)
    position_ids = inputs.position_ids.new_zeros((len(kept), num_kept + 1))
    return dataclasses.replace(
        inputs,
        text_positions=new_rows.gather(1, inputs.text_positions),
        visual_states=visual_states,
        visual_positions=new_rows.gather(1, visual_rows),
        position_ids=position_ids.scatter(1, new_rows[:, :num_rows], inputs.position_ids)[:, :num_kept],
        visual_summary=summary,
    )
