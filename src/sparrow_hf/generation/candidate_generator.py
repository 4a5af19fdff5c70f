"""`SparrowCandidateGenerator`: drafts for one sequence. Its chains run in transformers' own assisted loop too."""

import math
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import CandidateGenerator

from .._transformers import drop_newest
from ..configuration_sparrow import TreeShape
from ..devices import on_device
from ..draft_inputs import DraftInputs, DraftPositions, additive_mask, draft_positions
from ..modeling_sparrow import SparrowDraftModel
from .draft_forward import DraftForward, draft_forward
from .tree import CandidatePool, CandidateTree, build_chain

#: Positions of a long prompt enter the draft this many at a time, so that no mask grows with the square of its length.
PREFILL_CHUNK = 1024

#: RoPE is computed for this many positions at a time.
ROTARY_ROWS = 512


class SparrowCandidateGenerator(CandidateGenerator):
    """Drafts chains and trees for one sequence; holds the draft's cache of that sequence and nothing else.

    Between two calls the draft's cache holds committed tokens only; the nodes of a tree are dropped once it is built.

    Args:
        draft: A draft bound to its target.
        input_ids: `(1, L)` the prompt, as far as the target's states of it will be given.
        attention_mask: `(1, L)`, 0 on left padding.
        positions: Where to read the prompt; by default all text and the draft's glimpse.

    Attributes:
        cache: What the draft has read.
        hidden: `(1, H)` its prediction after the newest committed token; `None` before the prompt is read.
        visual_summary: `(1, H)`, of drafts that make one.
        next_position_id: RoPE position of the next token.
    """

    requires_model_outputs = True

    def __init__(
        self,
        draft: SparrowDraftModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: DraftPositions | None = None,
    ):
        config = draft.config
        self.draft = draft
        self.device = draft.device
        self.shape = config.tree_shape
        self.positions: DraftPositions = positions or draft_positions(
            input_ids[0],
            config.visual_token_ids or [],
            config.num_glimpse_tokens,
            config.glimpse_spacing,
            attention_mask=None if attention_mask is None else attention_mask[0],
        )
        self.max_cache_length = 0
        self.failed_drafts = 0
        self._prompt_ids = input_ids
        self.cache = DynamicCache()
        self.hidden: Tensor | None = None
        self.visual_summary: Tensor | None = None
        self._root_token = -1
        self.next_position_id = 0
        self._first_position = 0
        self._rotary = (torch.empty((0, 0)), torch.empty((0, 0)))
        # transformers' own loop requests the target's hidden states if this is set.
        self.model_kwargs_overrides = {"output_hidden_states": True}

    @cached_property
    def _reduced_head(self) -> Callable[[Tensor], Tensor] | None:
        """Cut out once for the call, when the first token is drafted."""
        return self.draft.reduced_head()

    @cached_property
    def _forward(self) -> DraftForward:
        """Made once for the call, when the first committed tokens or drafts are read."""
        return draft_forward(self.draft)

    @property
    def layers_to_collect(self) -> dict[int, Tensor]:
        """Layer id → prompt positions whose states [`~SparrowCandidateGenerator.prefill`] takes."""
        config = self.draft.config
        return self.positions.to_collect(config.feature_layer_ids, config.bridge_layer_id)

    # -- the draft's context ------------------------------------------------------------------------------------------

    def prefill(self, states: dict[int, Tensor], first_token: int) -> None:
        """Reads the prompt.

        Args:
            states: What [`~SparrowCandidateGenerator.layers_to_collect`] names: layer id → `(1, n, H)`.
            first_token: The first generated token; it completes the last text position.
        """
        self._root_token = first_token
        if self.shape.num_draft_levels == 0:
            return
        draft, config, kept = self.draft, self.draft.config, self.positions
        states = {layer: of_layer.to(device=self.device, dtype=draft.dtype) for layer, of_layer in states.items()}
        text_states, visual_states = kept.by_kind(states, config.feature_layer_ids, config.bridge_layer_id)
        # text          x0 x1 … x(T−1)                 hidden states of these
        # next tokens   x1 x2 … x(T−1) first_token     embeddings of those
        text_ids = self._prompt_ids[:, kept.text]
        is_visual = kept.is_visual.to(self.device)
        embeds, inputs = draft.embed_inputs(
            DraftInputs(
                next_ids=torch.cat((text_ids, text_ids.new_full((1, 1), first_token)), dim=1)[:, 1:],
                text_states=torch.cat([text_states[layer] for layer in config.feature_layer_ids], dim=-1),
                text_positions=(~is_visual).nonzero().T,
                visual_states=visual_states,
                visual_positions=is_visual.nonzero().T,
                position_ids=kept.position_ids(config.position_mode).to(self.device)[None],
            )
        )
        if inputs.visual_summary is not None:
            # All visual tokens are in the prompt, so every later token has the visual summary of its last token.
            self.visual_summary = inputs.visual_summary[:, -1]
        for start in range(0, embeds.shape[1], PREFILL_CHUNK):
            chunk = embeds[:, start : start + PREFILL_CHUNK]
            positions = inputs.position_ids[:, start : start + PREFILL_CHUNK]
            outputs = draft(chunk, positions, self._causal_mask(chunk[0]), self.cache)
            self.hidden = outputs.last_hidden_state[:, -1]
        self._note_length()
        self.next_position_id = kept.next_position_id(config.position_mode)

    def extend(self, features: Tensor, next_tokens: list[int]) -> None:
        """Appends committed tokens.

        Args:
            features: `(1, n, features · H)` the target's states of the newly verified tokens.
            next_tokens: The token after each of them; the last one is the root of the next tree.
        """
        self._root_token = next_tokens[-1]
        if self.shape.num_draft_levels == 0:
            return
        token_ids = on_device(next_tokens, self.device)
        states = features[0].to(device=self.device, dtype=self.draft.dtype)
        embeds = self.draft.embed_next(token_ids, states, self.visual_summary)
        positions = self._positions(embeds, self.next_position_id, len(next_tokens))
        self.hidden = self._forward(embeds, positions, self._causal_mask(embeds), self.cache)[-1:]
        self._note_length()
        self.next_position_id += len(next_tokens)

    def _positions(self, embeds: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        """RoPE of consecutive positions, `(count, head_dim)` each, cut from that of many positions."""
        offset = start - self._first_position
        if offset + count > len(self._rotary[0]):
            # From the end of the text on: after the drafts of a round, `extend` goes back to it.
            self._first_position = self.next_position_id
            offset = start - self._first_position
            end = max(start + count, self._first_position + ROTARY_ROWS)
            self._rotary = self._forward.rotary(embeds, torch.arange(self._first_position, end, device=self.device))
        cos, sin = self._rotary
        return cos[offset : offset + count], sin[offset : offset + count]

    def _causal_mask(self, embeds: Tensor) -> Tensor | None:
        """The mask of `(n, H)` committed tokens, each seeing all up to itself."""
        past, new = self.cache.get_seq_length(), len(embeds)
        if new == 1:
            return None
        lowest = torch.finfo(self.draft.dtype).min
        hidden_keys = torch.full((1, 1, new, past + new), lowest, dtype=self.draft.dtype, device=embeds.device)
        return hidden_keys.triu_(past + 1)

    def _note_length(self) -> None:
        self.max_cache_length = max(self.max_cache_length, self.cache.get_seq_length())

    # -- proposing ----------------------------------------------------------------------------------------------------

    def draft_chains(self) -> None:
        """Narrows the tree to its best path, for targets that verify sequences only."""
        self.shape = TreeShape(self.shape.num_draft_levels + 1, self.shape.num_draft_levels, beam_width=1)

    def propose(self, max_levels: int) -> CandidateTree:
        """Grows the tree of one round under the last committed token.

        Deterministic given the prefix; never touches a random generator, unless the draft is in training mode and has
        dropout (`generate()` refuses it then).

        Args:
            max_levels: No path gets longer than this, whatever the configured number of levels.
        """
        levels = min(self.shape.num_draft_levels, max_levels)
        if levels <= 0 or self.hidden is None:
            return self._root_alone()
        committed = self.cache.get_seq_length()
        if self.shape.beam_width == 1:
            tree = self._grow_chain(levels, self.hidden)
        else:
            tree = self._grow_tree(levels, self.hidden, committed)
        self._note_length()
        drop_newest(self.cache, self.cache.get_seq_length() - committed)
        if tree is None:
            self.failed_drafts += 1
            warn_of_failed_draft(self.failed_drafts)
            return self._root_alone()
        return tree

    def _grow_chain(self, levels: int, hidden: Tensor) -> CandidateTree | None:
        """The best token of every level. The tokens stay on the device until all are drafted, and are read at once."""
        tokens = [torch.full((1,), self._root_token, device=hidden.device)]
        scores: list[Tensor] = []
        positions = self._level_positions(hidden, levels)
        for level in range(levels):
            if level > 0:
                embeds = self.draft.embed_next(tokens[-1], hidden, self.visual_summary, level)
                hidden = self._forward(embeds, positions[level - 1], None, self.cache)
            score, best = self._logits(hidden).max(dim=-1)
            tokens.append(best if self.draft.draft_to_target is None else self.draft.draft_to_target[best])
            scores.append(score)
        token_ids = torch.cat(tokens)
        # Scores are in fp32, which holds whole numbers below 2^24 exactly.
        found = torch.cat((token_ids, *scores)).tolist()
        drafted, best_scores = found[1 : levels + 1], found[levels + 1 :]
        if not all(map(math.isfinite, best_scores)):
            return None
        return build_chain(token_ids.to(self.draft.target.device)[None], list(map(int, drafted)))

    def _grow_tree(self, levels: int, hidden: Tensor, committed: int) -> CandidateTree | None:
        """The most probable candidates of all levels."""
        pool = CandidatePool(self.shape.beam_width, self.draft.draft_to_target)
        tokens, origins = pool.add_level(self._logits(hidden).log_softmax(-1))
        # keys      committed | earlier frontiers | this frontier
        # node      all       | its ancestors     | itself
        beam = self.shape.beam_width
        itself = additive_mask(torch.eye(beam, dtype=torch.bool, device=hidden.device)[None], self.draft.dtype)[0, 0]
        mask = itself.new_zeros(()).expand(1, committed)
        positions = self._level_positions(hidden, levels)
        for level in range(1, levels):
            frontier = len(tokens)
            embeds = self.draft.embed_next(tokens, hidden[origins], self.visual_summary, level)
            # What the parents see, and the nodes themselves.
            mask = torch.cat((mask.expand(frontier, -1), itself[:frontier, :frontier]), dim=1)
            hidden = self._forward(embeds, positions[level - 1], mask[None, None], self.cache)
            tokens, origins = pool.add_level(self._logits(hidden).log_softmax(-1))
            mask = mask[origins]
        return pool.best_tree(self._root_token, self.shape.num_tree_nodes, self.draft.target.device)

    def _logits(self, hidden: Tensor) -> Tensor:
        """`(F, H)` states of the frontier → `(F, D)` logits of its children."""
        return self.draft.compute_logits(hidden, reduced_head=self._reduced_head)

    def _level_positions(self, hidden: Tensor, levels: int) -> list[tuple[Tensor, Tensor]]:
        """RoPE of the levels below the first, one position for the whole frontier of each."""
        cos, sin = self._positions(hidden, self.next_position_id, levels - 1)
        return list(zip(cos.split(1), sin.split(1), strict=True))

    def _root_alone(self) -> CandidateTree:
        return build_chain(torch.full((1, 1), self._root_token, device=self.draft.target.device), [])

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
            # The stock loop verifies sequences.
            self.draft_chains()
            return input_ids, None
        states = model_outputs.hidden_states
        if self.hidden is None:
            wanted = self.layers_to_collect
            self.prefill({layer: states[layer][:, at] for layer, at in wanted.items()}, int(input_ids[0, -1]))
        else:
            new = n_last_matches + 1
            features = torch.cat([states[layer][:, :new] for layer in self.draft.config.feature_layer_ids], dim=-1)
            self.extend(features, input_ids[0, -new:].tolist())
        tree = self.propose(self.shape.num_draft_levels)
        return torch.cat((input_ids, tree.token_ids[:, 1:].to(input_ids.device)), dim=1), None


def warn_of_failed_draft(times: int) -> None:
    """Warns when it has happened once."""
    if times == 1:
        warnings.warn(
            "the draft's scores are not numbers (NaN or infinite states): nothing is drafted in such rounds. "
            "The output stays the target's own.",
            stacklevel=3,
        )
