"""`SparrowCandidateGenerator`: the draft at work on one sequence. Its chains run in the stock assisted loop too."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import CandidateGenerator

from .._transformers import drop_newest
from ..configuration_sparrow import TreeShape
from ..modeling_sparrow import SparrowDraftModel
from ..rows import DraftInputs, DraftRows, draft_rows
from .tree import CandidatePool, CandidateTree, build_tree

#: Rows of a long prompt enter the draft this many at a time, so that no mask grows with the square of its length.
PREFILL_CHUNK_ROWS = 1024

#: Text index of glimpse rows: no sliding window ever moves past them.
_ALWAYS_IN_WINDOW = torch.iinfo(torch.long).max // 2


class SparrowCandidateGenerator(CandidateGenerator):
    """Drafts chains and trees for one sequence; holds the draft's cache of that sequence and nothing else.

    The draft's cache holds committed rows only between two calls; the rows of a tree are dropped once it is built.

    Args:
        draft: A draft bound to its target.
        input_ids: `(1, L)` the prompt, as far as the target's states of it will be given.
        attention_mask: `(1, L)`, 0 on left padding.
        rows: The rows of the prompt to read; by default all text rows and the draft's `num_glimpse_tokens`.
    """

    requires_model_outputs = True

    def __init__(
        self,
        draft: SparrowDraftModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows: DraftRows | None = None,
    ):
        config = draft.config
        self.draft = draft
        self.device, self._dtype = draft.device, draft.dtype
        self.shape = config.tree_shape
        self.rows: DraftRows = rows or draft_rows(
            input_ids[0],
            config.visual_token_ids or [],
            config.num_glimpse_tokens,
            attention_mask=None if attention_mask is None else attention_mask[0],
        )
        self.max_cache_length = 0
        self.failed_drafts = 0
        self._prompt_ids = input_ids
        self._cache = DynamicCache()
        self._hidden: Tensor | None = None  # (1, 1, H) prediction of the newest committed row
        self._visual_summary: Tensor | None = None  # (1, 1, H), of drafts that make one
        self._root_token = -1
        self._next_position = 0
        self._num_text_rows = 0
        self._text_index = torch.empty(0, dtype=torch.long, device=self.device)  # (C,) of the committed rows
        # The stock loop asks the target for its states through this.
        self.model_kwargs_overrides = {"output_hidden_states": True}

    @property
    def layers_to_collect(self) -> dict[int, Tensor | None]:
        """Layer id → prompt rows whose states [`~SparrowCandidateGenerator.prefill`] wants."""
        wanted: dict[int, Tensor | None] = dict.fromkeys(self.draft.config.feature_layer_ids, self.rows.text)
        bridge = int(self.draft.config.visual_bridge_layer or 0)
        if bridge in wanted and len(self.rows.visual):
            wanted[bridge] = self.rows.indices
        elif len(self.rows.visual):
            wanted[bridge] = self.rows.visual
        return wanted

    # -- the draft's context ------------------------------------------------------------------------------------------

    def prefill(self, states: dict[int, Tensor], first_token: int) -> None:
        """Reads the prompt.

        Args:
            states: What [`~SparrowCandidateGenerator.layers_to_collect`] names: layer id → `(1, n, H)`.
            first_token: The first generated token; it completes the last text row.
        """
        self._root_token = first_token
        if self.shape.num_draft_levels == 0:
            return
        draft, rows = self.draft, self.rows
        device = self.device
        kept_visual = rows.is_visual.to(device)
        bridge = int(draft.config.visual_bridge_layer or 0)

        def of_kind(layer: int, visual: bool) -> Tensor:
            states_of_layer = states[layer].to(device=device, dtype=draft.dtype)
            # A layer that serves as feature and as bridge was collected for both kinds of rows.
            both = states_of_layer.shape[1] == len(rows.indices)
            return states_of_layer[:, kept_visual == visual] if both else states_of_layer

        text_states = torch.cat([of_kind(layer, False) for layer in draft.config.feature_layer_ids], dim=-1)
        # text rows     x0 x1 … x(T−1)                 hidden states of these
        # next tokens   x1 x2 … x(T−1) first_token     embeddings of those
        text_ids = self._prompt_ids[:, rows.text]
        next_ids = torch.cat((text_ids, text_ids.new_full((1, 1), first_token)), dim=1)[:, 1:]
        no_visual_states = text_states.new_empty((1, 0, draft.config.hidden_size))
        inputs = draft.compress_visual(
            DraftInputs(
                next_ids=next_ids,
                text_states=text_states,
                text_rows=(~kept_visual).nonzero().T,
                visual_states=of_kind(bridge, True) if len(rows.visual) else no_visual_states,
                visual_rows=kept_visual.nonzero().T,
                positions=rows.positions(draft.config.position_mode).to(device)[None],
            )
        )
        summary = inputs.visual_summary
        embeds = draft.make_rows(inputs, draft.read_states(draft.reduce_features(text_states), summary))
        # All visual rows stand in the prompt: what its last row is told of them, every later row is told.
        self._visual_summary = None if summary is None else summary[:, -1:]

        positions = inputs.positions[0]
        is_visual = torch.ones_like(positions, dtype=torch.bool)
        is_visual[inputs.text_rows[0]] = False
        text_index = (~is_visual).cumsum(0) - 1
        for start in range(0, embeds.shape[1], PREFILL_CHUNK_ROWS):
            chunk = slice(start, start + PREFILL_CHUNK_ROWS)
            self._append(embeds[:, chunk], positions[chunk], text_index[chunk], is_visual[chunk])
        self._num_text_rows = len(rows.text)
        self._next_position = rows.next_position(draft.config.position_mode)

    def extend(self, features: Tensor, next_tokens: list[int]) -> None:
        """Appends committed rows.

        Args:
            features: `(1, n, features · H)` the target's states of the newly verified tokens.
            next_tokens: The token after each of them; the last one is the root of the next tree.
        """
        self._root_token = next_tokens[-1]
        if self.shape.num_draft_levels == 0:
            return
        draft = self.draft
        hidden = draft.reduce_features(features.to(device=self.device, dtype=draft.dtype))
        hidden = draft.read_states(hidden, self._visual_summary)
        embeds = draft.fuse(draft.embed(torch.tensor([next_tokens], device=self.device)), hidden)
        offsets = torch.arange(len(next_tokens), device=self.device)
        text_index = self._num_text_rows + offsets
        self._append(embeds, self._next_position + offsets, text_index, torch.zeros_like(offsets, dtype=torch.bool))
        self._num_text_rows += len(next_tokens)
        self._next_position += len(next_tokens)

    def _append(self, embeds: Tensor, positions: Tensor, text_index: Tensor, is_visual: Tensor) -> None:
        """Runs committed rows through the draft, each seeing all rows up to itself; keeps the last one's output."""
        past, new = self._cache.get_seq_length(), embeds.shape[1]
        self._text_index = torch.cat((self._text_index, text_index.masked_fill(is_visual, _ALWAYS_IN_WINDOW)))
        mask = None
        if new > 1 or self.draft.config.sliding_window is not None:
            keys = torch.arange(past + new, device=embeds.device)
            visible = keys[None, :] <= keys[past:, None]
            mask = self._additive(visible & self._in_window(text_index, past + new))
        hidden = self._forward(embeds, positions, mask)
        self._hidden = hidden[:, -1:]

    def _in_window(self, query_text_index: Tensor, num_keys: int) -> Tensor:
        """`(q, keys)` bool: committed rows inside the sliding window of each query."""
        window = self.draft.config.sliding_window
        if window is None:
            return torch.ones((len(query_text_index), num_keys), dtype=torch.bool, device=query_text_index.device)
        return query_text_index[:, None] - self._text_index[None, :num_keys] < window

    def _forward(self, embeds: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.draft(embeds, positions[None], mask, self._cache).last_hidden_state
        self.max_cache_length = max(self.max_cache_length, self._cache.get_seq_length())
        return hidden

    def _additive(self, visible: Tensor) -> Tensor:
        mask = torch.zeros((1, 1, *visible.shape), dtype=self._dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self._dtype).min)

    # -- proposing ----------------------------------------------------------------------------------------------------

    def propose(self, max_levels: int) -> CandidateTree:
        """Grows the tree of one round under the last committed token.

        Deterministic given the prefix; never touches a random generator.

        Args:
            max_levels: No path gets longer than this, whatever the configured number of levels.
        """
        levels = min(self.shape.num_draft_levels, max_levels)
        pool = CandidatePool(self.shape.beam_width, self.draft.draft_to_target)
        committed = self._cache.get_seq_length()
        hidden = self._hidden
        if levels > 0 and hidden is not None:
            tokens, origins = pool.add_level(self.draft.compute_logits(hidden)[0].log_softmax(-1))
            # (F, A) bool: which tree rows in the cache are ancestors of each frontier node
            ancestors = torch.zeros((len(tokens), 0), dtype=torch.bool, device=tokens.device)
            for level in range(1, levels):
                states = self.draft.read_states(hidden[:, origins], self._visual_summary, level)
                embeds = self.draft.fuse(self.draft.embed(tokens[None]), states)
                own_rows = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
                hidden = self._forward(embeds, *self._level_layout(level, ancestors, own_rows))
                logits = self.draft.compute_logits(hidden)[0]
                tokens, origins = pool.add_level(logits.log_softmax(-1))
                ancestors = torch.cat((ancestors, own_rows), dim=1)[origins]
            if self._cache.get_seq_length() > committed:
                drop_newest(self._cache, self._cache.get_seq_length() - committed)
        tree = pool.best_tree(self._root_token, self.shape.num_tree_nodes, self.draft.target.device)
        return self._draft_nothing() if tree is None else tree

    def _level_layout(self, level: int, ancestors: Tensor, own_rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions and mask of one level's frontier.

        keys      committed rows | earlier frontiers | this frontier
        node      in the window  | its ancestors     | itself
        """
        frontier = len(own_rows)
        positions = torch.full((frontier,), self._next_position + level - 1, device=own_rows.device)
        window = self.draft.config.sliding_window
        if frontier == 1 and window is None:
            return positions, None
        query_text_index = torch.full((frontier,), self._num_text_rows + level - 1, device=own_rows.device)
        committed = self._in_window(query_text_index, len(self._text_index))
        return positions, self._additive(torch.cat((committed, ancestors, own_rows), dim=1))

    def _draft_nothing(self) -> CandidateTree:
        self.failed_drafts += 1
        if self.failed_drafts == 1:
            warnings.warn(
                "the draft's scores are not numbers (NaN or infinite states): nothing is drafted where that happens. "
                "The output stays the target's own.",
                stacklevel=2,
            )
        return build_tree([self._root_token], [-1], self.draft.target.device)

    # -- the contract of transformers' own assisted loop --------------------------------------------------------------

    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """One chain for the stock loop, which runs the prefill itself in the first iteration.

        Args:
            input_ids: `(1, t)` all committed tokens, the prompt included.
            model_outputs: The target's last outputs, all hidden states included.
            n_last_matches: Candidates of the last round that were accepted.

        Returns:
            `(1, t + n)` committed and drafted tokens; no logits, so the loop compares tokens.
        """
        if is_first_iteration:
            # The stock loop verifies sequences, so the tree is narrowed to its best path.
            self.shape = TreeShape(self.shape.num_draft_levels + 1, self.shape.num_draft_levels, beam_width=1)
            return input_ids, None
        states = model_outputs.hidden_states
        if self._hidden is None:
            wanted = self.layers_to_collect
            rows = {layer: states[layer] if at is None else states[layer][:, at] for layer, at in wanted.items()}
            self.prefill(rows, int(input_ids[0, -1]))
        else:
            new = n_last_matches + 1
            features = torch.cat([states[layer][:, :new] for layer in self.draft.config.feature_layer_ids], dim=-1)
            self.extend(features, input_ids[0, -new:].tolist())
        tree = self.propose(self.shape.num_draft_levels)
        return torch.cat((input_ids, tree.token_ids[:, 1:].to(input_ids.device)), dim=1), None
