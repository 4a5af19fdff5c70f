"""`BatchDrafter`: the chains of a batch. Its sequences read their prompts one by one and are drafted for together."""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .._transformers import cache_tensors, drop_newest
from ..devices import index_of, on_device
from ..draft_inputs import additive_mask, causal
from ..modeling_sparrow import SparrowDraftModel
from .caches import pack_rows
from .candidate_generator import SparrowCandidateGenerator, warn_of_failed_draft


class BatchDrafter:
    """Drafts one chain for every sequence of a batch; holds the draft's cache of those it still drafts for.

    A sequence of which the draft has read `ends[r]` positions has them at the beginning of its cache row. What lies
    behind is masked.

    Args:
        draft: A draft bound to its target.
        readers: One for each sequence. They have read the prompts, and give up their caches.

    Attributes:
        rows: Indices in the batch of the sequences it drafts for. A prompt of which the draft reads nothing leaves no
            state to draft from.
    """

    def __init__(self, draft: SparrowDraftModel, readers: Sequence[SparrowCandidateGenerator]):
        self.rows = [row for row, reader in enumerate(readers) if reader.hidden is not None]
        self.failed_drafts = 0
        self.max_cache_length = max(reader.max_cache_length for reader in readers)
        self._draft = draft
        self._num_levels = readers[0].shape.num_draft_levels
        if not self.rows:
            return
        readers = [readers[row] for row in self.rows]
        hidden = [reader.hidden for reader in readers if reader.hidden is not None]
        self._reduced_head = draft.reduced_head()
        self._cache = _joined([reader.cache for reader in readers])
        self._ends = [reader.cache.get_seq_length() for reader in readers]
        self._hidden = torch.cat(hidden)[:, None]
        summaries = [reader.visual_summary for reader in readers if reader.visual_summary is not None]
        self._visual_summary = torch.cat(summaries)[:, None] if summaries else None
        self._next_position_ids = on_device([[reader.next_position_id] for reader in readers], draft.device)

    def keep(self, rows: Collection[int]) -> None:
        """Drops every sequence that is not one of `rows`, indices in the batch."""
        kept = [index for index, row in enumerate(self.rows) if row in rows]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            return
        self._ends = [self._ends[index] for index in kept]
        indices = on_device(kept, self._hidden.device)
        self._cache.batch_select_indices(indices)
        drop_newest(self._cache, self._cache.get_seq_length() - max(self._ends))
        self._hidden, self._next_position_ids = self._hidden[indices], self._next_position_ids[indices]
        if self._visual_summary is not None:
            self._visual_summary = self._visual_summary[indices]

    def extend(self, features: Tensor, next_tokens: Sequence[list[int]]) -> None:
        """Appends committed tokens.

        Args:
            features: `(B, n, features · H)` the target's states of the newly verified tokens of the whole batch.
            next_tokens: For each sequence of the batch, the token after each of them, n at most.
        """
        if not self.rows:
            return
        device = self._hidden.device
        new = [next_tokens[row] for row in self.rows]
        counts, most = [len(tokens) for tokens in new], max(map(len, new))
        token_ids = on_device([tokens + tokens[-1:] * (most - len(tokens)) for tokens in new], device)
        states = features[index_of(self.rows, features.device), :most].to(device=device, dtype=self._draft.dtype)
        # keys     those of the text so far | n0 n1 n2      each sees all up to itself; those that a sequence has not
        # queries                             n0 n1 n2      come last, and are dropped
        among_new = causal(torch.arange(most, device=device), most).expand(len(new), -1, -1)
        hidden = self._forward(
            self._draft.embed_next(token_ids, states, self._visual_summary),
            self._next_position_ids + torch.arange(most, device=device),
            torch.cat((self._prefix()[:, None].expand(-1, most, -1), among_new), dim=2),
        )
        kept = on_device(counts, device)
        self._hidden = hidden[torch.arange(len(new), device=device), kept - 1][:, None]
        self._next_position_ids = self._next_position_ids + kept[:, None]
        pack_rows(self._cache, self._ends, counts, most)
        self._ends = [end + count for end, count in zip(self._ends, counts, strict=True)]

    def propose(self, roots: Tensor, fill: Tensor, max_levels: int) -> Tensor:
        """The chains of one round, greedy and deterministic.

        Args:
            roots: `(B,)` newest token of every sequence of the batch.
            fill: `(B,)` what to draft for those that are not drafted for.

        Returns:
            `(B, 1 + n)` roots and drafted tokens; n is `max_levels` at most.
        """
        levels = max(min(self._num_levels, max_levels), 0) if self.rows else 0
        chains = torch.cat((roots[:, None], fill[:, None].expand(-1, levels)), dim=1)
        if levels == 0:
            return chains
        committed = self._cache.get_seq_length()
        hidden, prefix = self._hidden, self._prefix()
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        for level in range(levels):
            if level > 0:
                embeds = self._draft.embed_next(tokens[-1], hidden, self._visual_summary, level)
                visible = F.pad(prefix, (0, level), value=True)[:, None]
                hidden = self._forward(embeds, self._next_position_ids + level - 1, visible)
            score, best = self._draft.compute_logits(hidden, reduced_head=self._reduced_head).max(dim=-1)
            tokens.append(best if self._draft.draft_to_target is None else self._draft.draft_to_target[best])
            scores.append(score)
        drop_newest(self._cache, self._cache.get_seq_length() - committed)
        drafted, is_number = torch.cat(tokens, dim=1), torch.cat(scores, dim=1).isfinite()
        if not is_number.all():
            self.failed_drafts += 1
            warn_of_failed_draft(self.failed_drafts)
        rows = on_device(self.rows, chains.device)
        # Where the scores are not numbers, anything is as good as their best token, except a placeholder.
        drafted = drafted.to(chains.device).where(is_number.to(chains.device), roots[rows][:, None])
        chains[rows, 1:] = drafted
        return chains

    def _prefix(self) -> Tensor:
        """`(R, length)` bool: the rows of the cache that are text."""
        ends = on_device(self._ends, self._hidden.device)
        return causal(ends - 1, self._cache.get_seq_length())

    def _forward(self, embeds: Tensor, position_ids: Tensor, visible: Tensor) -> Tensor:
        sees_all = embeds.shape[1] == 1 and min(self._ends) == max(self._ends)
        mask = None if sees_all else additive_mask(visible, self._draft.dtype)
        hidden = self._draft(embeds, position_ids, mask, self._cache).last_hidden_state
        self.max_cache_length = max(self.max_cache_length, self._cache.get_seq_length())
        return hidden


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache for B sequences, from one for each; the shorter ones are padded at their ends."""
    joined, longest = DynamicCache(), max(cache.get_seq_length() for cache in caches)
    for layer, of_rows in enumerate(zip(*map(cache_tensors, caches), strict=True)):
        keys, values = (
            torch.cat([F.pad(entries, (0, 0, 0, longest - entries.shape[-2])) for entries in side])
            for side in zip(*of_rows, strict=True)
        )
        joined.update(keys, values, layer)
    return joined
