"""Drafting in fixed shapes: the draft's cache lies in slabs, and a round's extension and its tree are a step each."""

from typing import Any

import torch
from torch import Tensor

from .._transformers import empty, slab_cache, slab_layers
from ..configuration_sparrow import TreeShape
from ..draft_inputs import additive_mask
from ..modeling_sparrow import SparrowDraftModel
from .candidate_generator import SparrowCandidateGenerator, warn_of_failed_draft
from .fixed_steps import FixedStep
from .tree import CandidatePool, CandidateTree, build_tree, tree_of_nodes


class StaticDrafting:
    """The buffers and steps of one draft and tree shape. Serves one call after the other.

    Between two steps, the slab holds the committed rows; a step writes its own behind them:

        extend     committed | the newest tokens, up to `max_path` | free
        propose    committed | level 1 | level 2 | …               | free

    Args:
        num_rows: Rows of the slab; at least prompt, new tokens, `max_path` and the nodes of all levels.
        max_path: Tokens that a round commits at most.
        compile_config: Arguments of `torch.compile`; `None`: run as it is.
    """

    def __init__(
        self,
        draft: SparrowDraftModel,
        num_rows: int,
        shape: TreeShape,
        max_path: int,
        compile_config: dict[str, Any] | None,
    ):
        self.shape = shape
        self.cache = slab_cache(draft.config, num_rows)
        self._draft = draft
        self._max_path = max_path
        hidden, num_features = draft.config.hidden_size, len(draft.config.feature_layer_ids)
        with torch.inference_mode(False), torch.no_grad():
            # the newest tokens | how many they are | committed rows | RoPE position of the first row behind them
            self._state = torch.zeros(max_path + 3, dtype=torch.long, device=draft.device)
            self.features = draft.fc.weight.new_zeros((1, max_path, num_features * hidden))
            self.hidden = draft.fc.weight.new_zeros((1, 1, hidden))
            self.visual_summary: Tensor | None = None
            self._columns = torch.arange(num_rows, device=draft.device)
            self._head_rows = self._head_rows_now()
            # What the draft looks up once and keeps must not be looked up in a step.
            self._logits(self.hidden)
        self._extend = FixedStep(self._extended, draft.device, compile_config)
        self._propose = FixedStep(self._proposed, draft.device, compile_config)

    def start(self, visual_summary: Tensor | None) -> None:
        """After the prefill: everything of this call that the steps read."""
        if visual_summary is not None and self.visual_summary is not None:
            # A captured step reads it where the first call's was.
            self.visual_summary.copy_(visual_summary)
        elif visual_summary is not None:
            with torch.inference_mode(False):
                self.visual_summary = visual_summary.clone()
        if self._head_rows is not None:
            for rows, now in zip(self._head_rows, self._head_rows_now() or (), strict=True):
                rows.copy_(now)

    def end(self) -> None:
        """After a call: the memory stays, its rows are forgotten."""
        empty(self.cache)

    def place(self, at: Tensor | None) -> None:
        """Where the next forward writes its rows; `None`: behind those that the cache holds."""
        for layer in slab_layers(self.cache):
            layer.at = at

    def _head_rows_now(self) -> tuple[Tensor, ...] | None:
        ids = self._draft.draft_to_target
        return None if ids is None else self._draft.target.head_rows(ids)

    def extend(self, tokens: list[int], committed: int, position_id: int) -> None:
        """Appends the newest tokens, whose states lie in `features`; `hidden` becomes the output of the last."""
        fill = [0] * (self._max_path - len(tokens))
        self._state.copy_(torch.tensor([*tokens, *fill, len(tokens), committed, position_id]), non_blocking=True)
        self._extend()

    def _extended(self) -> None:
        tokens, count = self._state[None, : self._max_path], self._state[-3]
        embeds = self._draft.embed_next(tokens, self.features, self.visual_summary)
        new = torch.arange(self._max_path, device=tokens.device)
        rows = self._state[-2] + new
        outputs = self._run(embeds, self._state[-1] + new, rows, self._columns <= rows[:, None])
        self.hidden.copy_(outputs.index_select(1, (count - 1)[None]))

    def _run(self, embeds: Tensor, position_ids: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        """`(1, n, H)` outputs of new rows of the slab, each seeing the columns of its `(n, W)` line."""
        self.place(rows)
        mask = additive_mask(visible[None], self._draft.dtype)
        outputs = self._draft(embeds, position_ids[None], mask, self.cache).last_hidden_state
        self.place(None)
        return outputs

    def propose(self, committed: int, position_id: int) -> list[list[float]]:
        """Tokens, parents, places and scores of the best nodes, each a row, as [`~CandidatePool.best`] gives them."""
        self._state[-2:].copy_(torch.tensor([committed, position_id]), non_blocking=True)
        return self._propose().tolist()

    def _proposed(self) -> Tensor:
        return self._chain() if self.shape.beam_width == 1 else self._tree()

    def _logits(self, hidden: Tensor) -> Tensor:
        """`(1, F, H)` states of the frontier → `(F, D)` logits of its children."""
        head = None if self._head_rows is None else self._reduced_head
        return self._draft.compute_logits(hidden, reduced_head=head)[0]

    def _reduced_head(self, states: Tensor) -> Tensor:
        assert self._head_rows is not None
        return torch.nn.functional.linear(states, *self._head_rows)

    def _chain(self) -> Tensor:
        committed, position_id = self._state[-2:].split(1)
        hidden = self.hidden
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        for level in range(self.shape.num_draft_levels):
            score, token = self._logits(hidden).max(dim=-1)
            if self._draft.draft_to_target is not None:
                token = self._draft.draft_to_target[token]
            tokens.append(token)
            scores.append(score)
            if level + 1 < self.shape.num_draft_levels:
                embeds = self._draft.embed_next(token[None], hidden, self.visual_summary, level + 1)
                row = committed + level
                hidden = self._run(embeds, position_id + level, row, self._columns <= row[:, None])
        order = torch.arange(len(tokens), device=self._columns.device)
        return torch.cat((torch.cat(tokens), order - 1, order, torch.cat(scores))).reshape(4, -1)

    def _tree(self) -> Tensor:
        committed, position_id = self._state[-2:].split(1)
        pool = CandidatePool(self.shape.beam_width, self._draft.draft_to_target)
        hidden = self.hidden
        tokens, origins = pool.add_level(self._logits(hidden).log_softmax(-1))
        # (F, A) bool: which nodes in the cache are ancestors of each frontier node
        ancestors = torch.zeros((len(tokens), 0), dtype=torch.bool, device=tokens.device)
        for level in range(1, self.shape.num_draft_levels):
            frontier, past = ancestors.shape
            embeds = self._draft.embed_next(tokens[None], hidden[:, origins], self.visual_summary, level)
            rows = committed + past + torch.arange(frontier, device=tokens.device)
            # columns     committed | earlier frontiers | this frontier | stale
            # node        all       | its ancestors     | itself        | none
            seen = torch.cat((ancestors, torch.eye(frontier, dtype=torch.bool, device=tokens.device)), dim=1)
            node = (self._columns - committed).clamp(0, past + frontier - 1)
            is_node = (self._columns >= committed) & (self._columns < committed + past + frontier)
            visible = (self._columns < committed) | (is_node & seen[:, node])
            positions = (position_id + level - 1).expand(frontier)
            hidden = self._run(embeds, positions, rows, visible)
            tokens, origins = pool.add_level(self._logits(hidden).log_softmax(-1))
            ancestors = seen[origins]
        return pool.best(self.shape.num_tree_nodes)


class StaticCandidateGenerator(SparrowCandidateGenerator):
    """Drafts for one sequence like its parent, in fixed shapes; nothing if the draft reads nothing of the prompt.

    Args:
        drafting: The buffers and steps; this call's alone.
    """

    def __init__(self, drafting: StaticDrafting, *args: Any):
        super().__init__(*args)
        self._drafting = drafting
        self.shape = drafting.shape
        self.cache = drafting.cache
        self._committed = 0

    def prefill(self, states: dict[int, Tensor], first_token: int) -> None:
        super().prefill(states, first_token)
        if self.hidden is not None:
            self._committed = self.cache.get_seq_length()
            self._drafting.start(None if self.visual_summary is None else self.visual_summary[None])
            self._drafting.hidden.copy_(self.hidden)

    def extend(self, features: Tensor, next_tokens: list[int]) -> None:
        self._root_token = next_tokens[-1]
        if self.hidden is None:
            return
        self._drafting.features[:, : len(next_tokens)] = features
        self._drafting.extend(next_tokens, self._committed, self.next_position_id)
        self._committed += len(next_tokens)
        self.next_position_id += len(next_tokens)

    def propose(self, max_levels: int) -> CandidateTree:
        if self.hidden is None or max_levels <= 0:
            return build_tree([self._root_token], [-1])
        picked = self._drafting.propose(self._committed, self.next_position_id)
        drafted = self.shape.beam_width * (self.shape.num_draft_levels - 1)
        self.max_cache_length = max(self.max_cache_length, self._committed + drafted)
        tree = tree_of_nodes(self._root_token, picked, max_levels)
        if tree is None:
            self.failed_drafts += 1
            warn_of_failed_draft(self.failed_drafts)
            return build_tree([self._root_token], [-1])
        return tree
