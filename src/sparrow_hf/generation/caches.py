"""The target's cache during the rounds of one call: what a round keeps, what it drops, what it carries over.

The loop knows [`HeldCache`] only; [`hold`] decides, once and after the prefill, which kind of layers stands behind it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from .._transformers import attention_layers, cache_tensors, convolution_layers, drop_newest, new_inputs, record_past
from .tree import CandidateTree


class HeldCache:
    """A cache of layers that can drop their newest rows: full attention, windows and convolutions.

    Between two rounds, cache and carried tokens together are the committed text without its newest token, which is the
    root of the next tree.

    Attributes:
        carried: Committed tokens whose rows the cache does not hold; they lead the next forward.
    """

    def __init__(self, cache: DynamicCache):
        self._cache = cache
        self._prefilled = self._marked = self.length
        self.carried: list[int] = []

    @property
    def length(self) -> int:
        """Rows that the cache holds."""
        return self._cache.get_seq_length()

    @property
    def rows_since_prefill(self) -> int:
        """How many of them the prefill did not compute."""
        return self.length - self._prefilled

    @property
    def spare_slots(self) -> int:
        """How many nodes the next tree may have, its root included; at least one."""
        return sys.maxsize

    @contextmanager
    def verifying(self, tree: CandidateTree) -> Iterator[list[int]]:
        """One forward over the carried tokens and `tree`; afterwards the cache holds committed rows only.

        Yields the path to keep, empty. Whatever is raised inside, the cache ends as plain `generate()` would have left
        it: with the row of every token whose successor was chosen, or was about to be.
        """
        self._marked = self.length
        path: list[int] = []
        try:
            yield path
        finally:
            self._keep(tree, path or self._path_of_a_broken_forward())

    def _path_of_a_broken_forward(self) -> list[int]:
        """Plain `generate()` has the row of its step, the root, once all layers have run. Before, some layers lack the
        new rows, so the others may not keep theirs."""
        return [0] if all(layer.get_seq_length() > self._marked for layer in attention_layers(self._cache)) else []

    def _keep(self, tree: CandidateTree, path: list[int]) -> None:
        """Keeps the entries of `path`, in place, and drops those of the other nodes.

        before   … committed | n0 n1 n2 n3 n4 |      path = [0, 2, 4]
        after    … committed | n0 n2 n4 |
        """
        is_prefix = path == list(range(len(path)))
        for layer, tensors in zip(attention_layers(self._cache), cache_tensors(self._cache), strict=True):
            new = layer.get_seq_length() - self._marked
            if not is_prefix:
                for entries in tensors:
                    start = entries.shape[-2] - new
                    source = torch.tensor(path, device=entries.device) + start
                    entries[:, :, start : start + len(path)] = entries[:, :, source]
            drop_newest(layer, new - len(path))
        for layer in convolution_layers(self._cache):
            # Nothing of the forward is left in a layer that it did not reach.
            drop_newest(layer, max(new_inputs(layer) - len(path), 0))


def hold(cache: DynamicCache) -> HeldCache:
    """The target's cache, after the prefill, as the loop sees it."""
    record_past(cache, True)
    return HeldCache(cache)
