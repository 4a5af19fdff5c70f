"""The target's cache during the rounds of one call: what a round keeps, what it drops, what it carries over.

The loop knows [`HeldCache`] only; [`hold`] decides, once and after the prefill, which kind of layers stands behind it.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from .._transformers import (
    attention_layers,
    cache_tensors,
    convolution_layers,
    drop_newest,
    new_inputs,
    record_past,
    recurrent_states,
)
from ..devices import on_device
from .tree import CandidateTree

#: Tokens that recurrent layers may leave to the next forward.
MAX_CARRIED = 16

#: Columns that a mask is made longer than it must be.
MASK_ROOM = 512


class HeldCache:
    """A cache of layers that can drop their newest rows: full attention, windows and convolutions.

    Between two rounds, cache and carried tokens together are the committed text without its newest token, which is the
    root of the next tree.

    Attributes:
        carried: Committed tokens whose rows the cache does not hold, each one for every sequence. They lead the next
            forward.
        is_ragged: Whether the sequences of a batch may have come to different lengths.
    """

    is_ragged = False

    def __init__(self, cache: DynamicCache):
        self._cache = cache
        self._mask = torch.empty((1, 0))
        self._prefilled = self._marked = self.length
        self.carried: list[list[int]] = []

    @property
    def length(self) -> int:
        """Rows that the cache holds."""
        return self._cache.get_seq_length()

    @property
    def rows_since_prefill(self) -> int | Tensor:
        """How many of them the prefill did not compute; `(B, 1)` where the sequences of a batch differ."""
        return self.length - self._prefilled

    @property
    def ends(self) -> int | Tensor:
        """Rows of prompt (padding included) and text together; `(B, 1)` where they differ."""
        return self._prefilled + self.rows_since_prefill

    def step_mask(self, mask: Tensor, num_new: int) -> Tensor:
        """`(B, length + num_new)`, 1 at the rows that are text, of a forward over `num_new` rows.

        Cut from a longer one, which is made anew only when it has become too short: masks of prompts are long.

        Args:
            mask: The mask of the first plain step.
        """
        end = self.length + num_new
        if self._mask.shape[1] < end:
            self._mask = pad(mask, (0, end + MASK_ROOM - mask.shape[1]), value=1)
        return self._mask[:, :end]

    @property
    def spare_slots(self) -> int:
        """How many nodes the next tree may have, its root included; at least one."""
        return sys.maxsize

    def close(self) -> None:
        """After the last round: the cache drops old rows by itself again."""
        record_past(self._cache, False)

    @contextmanager
    def verifying(self, tree: CandidateTree) -> Iterator[list[int]]:
        """One forward over the carried tokens and `tree`; afterwards the cache holds committed rows only.

        Yields the path to keep, empty. Whatever is raised inside, the cache ends as plain `generate()` would have left
        it: with the row of every token whose successor was chosen, or was about to be.
        """
        self._mark()
        path: list[int] = []
        try:
            yield path
        finally:
            if path:
                self._keep(tree, path)
            else:
                self._break_off(tree)

    def _mark(self) -> None:
        """Before the forward: what the cache holds is committed."""
        self._marked = self.length

    def _keep(self, tree: CandidateTree, path: list[int]) -> None:
        """After the forward: keeps what belongs to `path` and drops what belongs to the other nodes."""
        self._keep_rows(path)

    def _break_off(self, tree: CandidateTree) -> None:
        """After a forward that raised, or of which no token was chosen."""
        self._keep_rows([0] if self._every_layer_has_new_rows() else [])

    def _every_layer_has_new_rows(self) -> bool:
        """Plain `generate()`, broken off here, has the row of its step, the root. Earlier some layers lack the new
        rows, so the others may not keep theirs."""
        return all(layer.get_seq_length() > self._marked for layer in attention_layers(self._cache))

    def _keep_rows(self, kept: list[int]) -> None:
        """Keeps the rows `kept` of the last forward, in place, and drops its other rows.

        before   … committed | r0 r1 r2 r3 r4 |      kept = [0, 2, 4]
        after    … committed | r0 r2 r4 |
        """
        moved = [(to, row) for to, row in enumerate(kept) if to != row]
        # One copy to the device for all layers on it that hold as many rows.
        indices: dict[tuple[torch.device, int], tuple[Tensor, ...]] = {}
        for layer, tensors in zip(attention_layers(self._cache), cache_tensors(self._cache), strict=True):
            new = layer.get_seq_length() - self._marked
            for entries in tensors if moved else ():
                start = entries.shape[-2] - new
                if (entries.device, start) not in indices:
                    columns = [[start + row for row in rows] for rows in zip(*moved, strict=True)]
                    indices[entries.device, start] = on_device(columns, entries.device).unbind()
                to, source = indices[entries.device, start]
                entries.index_copy_(2, to, entries.index_select(2, source))
            drop_newest(layer, new - len(kept))
        for layer in convolution_layers(self._cache):
            # A layer that the forward did not reach has nothing to drop.
            drop_newest(layer, max(new_inputs(layer) - len(kept), 0))


class RaggedCache(HeldCache):
    """The cache of a batch whose sequences have come to different lengths; full attention only.

    Every sequence is packed to its own end, so that there are no holes inside of it. What lies behind it is masked.

        prefill      – – a a a a |                        –: padding
                     b b b b b b |
        a forward    – – a a a a | a a a                  of which a keeps 3, b keeps 1
                     b b b b b b | b b b
        packed       – – a a a a   a a a |
                     b b b b b b   b · · |                ·: masked
        the next     – – a a a a   a a a | a a a          of which a keeps 1, b keeps 3
                     b b b b b b   b · · | b b b
        packed       – – a a a a   a a a   a |
                     b b b b b b   b b b   b |

    Args:
        new_tokens: The tokens of each sequence after its prompt, in lists that grow. Between two rounds, the cache has
            the rows of all but the newest.
    """

    is_ragged = True

    def __init__(self, cache: DynamicCache, new_tokens: Sequence[list[int]]):
        super().__init__(cache)
        self._new_tokens = new_tokens
        self._rows = [0] * len(new_tokens)

    @property
    def rows_since_prefill(self) -> Tensor:
        return on_device(self._rows, cache_tensors(self._cache)[0][0].device)[:, None]

    def step_mask(self, mask: Tensor, num_new: int) -> Tensor:
        return pad(self.prefix_mask(mask), (0, num_new), value=1)

    def prefix_mask(self, mask: Tensor) -> Tensor:
        """`(B, length)`, 1 at the rows that are text, from the mask of the first plain step."""
        behind = torch.arange(self.length - self._prefilled, device=mask.device)
        is_text = behind < self.rows_since_prefill.to(mask.device)
        return torch.cat((mask[:, : self._prefilled], is_text.to(mask.dtype)), dim=1)

    def _keep(self, tree: CandidateTree, path: list[int]) -> None:
        kept = [len(tokens) - 1 - rows for tokens, rows in zip(self._new_tokens, self._rows, strict=True)]
        pack_rows(self._cache, [self._prefilled + rows for rows in self._rows], kept, len(tree))
        self._rows = [rows + count for rows, count in zip(self._rows, kept, strict=True)]


def pack_rows(cache: DynamicCache, ends: Sequence[int], kept: Sequence[int], num_new: int) -> None:
    """Moves the first `kept[b]` of the newest `num_new` rows of each sequence b to the end `ends[b]` of its text.

    before   … text · · | r0 r1 r2 |      kept = 2
    after    … text r0 r1 |               as long as the longest sequence

    Rows are moved together: what a sequence does not keep lands behind its new end, where it is masked.
    """
    most = max(kept)
    start = cache.get_seq_length() - num_new
    if any(end != start for end in ends):
        to = torch.tensor(ends)[:, None] + torch.arange(most)
        for tensors in cache_tensors(cache):
            for entries in tensors:
                to = to.to(entries.device, non_blocking=True)
                moved = entries[:, :, start : start + most].clone()
                entries.scatter_(2, to[:, None, :, None].expand_as(moved), moved)
    longest = max(end + count for end, count in zip(ends, kept, strict=True))
    drop_newest(cache, start + num_new - longest)


class RecurrentCache(HeldCache):
    """A cache with recurrent layers, such as linear attention: they hold one state of all they have read.

    A state follows one text, so drafts are chains; and nothing can be taken out of a state. So the states are copied
    before drafts enter them. If a draft is rejected they are put back, and the accepted tokens are carried: they lead
    the next forward, which reads them once more.

        states after       …x   | forward over           | accepted | then
        round 1             x   | r d1 d2 d3             | r d1     | put back; carried: r d1
        round 2             x   | r d1 | s e1 e2 e3      | s        | put back; carried: r d1 s
        round 3             x   | r d1 s | t f1 f2 f3    | all      | states after … f3; carried: nothing

    Args:
        max_carried: With more carried tokens than this, the next tree is its root alone. A root is never rejected.
    """

    def __init__(self, cache: DynamicCache, max_carried: int):
        super().__init__(cache)
        self._max_carried = max_carried
        self._saved: list[Tensor] | None = None

    @property
    def spare_slots(self) -> int:
        return 1 if len(self.carried) > self._max_carried else sys.maxsize

    def _mark(self) -> None:
        super()._mark()
        if self._saved is None:
            self._saved = [state.clone() for state in recurrent_states(self._cache)]

    def _keep(self, tree: CandidateTree, path: list[int]) -> None:
        if len(path) < len(tree):
            self._put_back()
            self.carried += tree.token_ids[:, path].T.tolist()
        else:
            self._keep_rows(list(range(len(self.carried) + len(tree))))
            self._saved = None
            self.carried = []

    def _break_off(self, tree: CandidateTree) -> None:
        if self._every_layer_has_new_rows():
            self.carried += tree.token_ids[:, :1].T.tolist()
        self._put_back()

    def _put_back(self) -> None:
        for state, saved in zip(recurrent_states(self._cache), self._saved or [], strict=True):
            state.copy_(saved)
        self._keep_rows([])


def hold(cache: DynamicCache) -> HeldCache:
    """The target's cache, after the prefill, as the loop sees it."""
    record_past(cache, True)
    return RecurrentCache(cache, MAX_CARRIED) if recurrent_states(cache) else HeldCache(cache)
