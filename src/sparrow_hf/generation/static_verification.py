"""Verification in fixed shapes: the target's cache lies in slabs, and a tree of any size fills N rows.

One forward is a function of its buffers, so it can be compiled once and, on CUDA, replayed as one graph:

    slab     committed rows … | n0 n1 … n(N−1) | free
    row      0 … past − 1     | past … past + N − 1

Rows behind the tree's own nodes are fill: they see the prefix and themselves, and nobody sees them. The mask is made
in the step from `past` and the tree, so it cannot be out of date.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .. import hidden_states
from .._transformers import CACHE, NO_CACHE, empty, has_windows, move_rows, slab_cache, slab_layers, take_rows
from ..draft_inputs import additive_mask
from ..targets import TargetView
from .caches import HeldCache
from .fixed_steps import FixedStep
from .grouped_attention import fold, groups_of
from .tree import CandidateTree
from .verification import TOKEN_TYPE_KEYS, verification_inputs


class StaticVerification:
    """The buffers and steps of one target, number of rows and size of trees. Serves one call after the other.

    Args:
        num_rows: Rows of the slabs; at least prompt, new tokens and `num_nodes`.
        num_nodes: Nodes of a forward.
        max_path: Nodes that a round commits at most.
        layer_ids: Layers whose states the draft reads.
        compile_config: Arguments of `torch.compile`; `None`: run as it is.
    """

    def __init__(
        self,
        view: TargetView,
        num_rows: int,
        num_nodes: int,
        max_path: int,
        layer_ids: Sequence[int],
        compile_config: dict[str, Any] | None,
    ):
        self.num_nodes = num_nodes
        self.cache = slab_cache(view.text_config, num_rows)
        self._view = view
        self._max_path = max_path
        self._layer_ids = layer_ids
        # What of a forward's inputs stays the same for a call. Tensors stay where they are for all calls that have the
        # same options and shapes.
        self._inputs: dict[str, Any] = {}
        self._options_and_shapes = ""
        # Kinds of layers that have a mask of their own; one mask for all is that of the only kind.
        self._kinds: list[str] = []
        self._has_one_mask = True
        self._groups: dict[str, int] = {}
        with torch.inference_mode(False):
            # ids | depths | ancestors, row by row | past
            self._tree = torch.zeros(2 * num_nodes + num_nodes**2 + 1, dtype=torch.long, device=view.device)
            self._at = torch.zeros(num_nodes, dtype=torch.long, device=view.device)
            self._path = torch.zeros(2 * max_path, dtype=torch.long, device=view.device)
            # Columns of the prompt's padding.
            self._is_text = torch.ones(num_rows, dtype=torch.bool, device=view.device)
            self._columns = torch.arange(num_rows, device=view.device)
            self._nodes = torch.arange(num_nodes, device=view.device)
        self._new_step = partial(FixedStep, self._forward, view.device, compile_config)
        self._verify = self._new_step()
        self._move = FixedStep(self._move_path, view.device)

    def empty_cache(self) -> DynamicCache:
        """For the prefill: the slabs, or an ordinary cache.

        Layers with windows prefill in chunks by the rows they still have, so what they compute depends on the cache.
        """
        return DynamicCache(config=self._view.text_config) if has_windows(self.cache) else self.cache

    def take(self, prefilled: DynamicCache) -> "HeldSlabs":
        """The cache after the prefill, in the slabs."""
        if prefilled is not self.cache:
            take_rows(self.cache, prefilled)
        return HeldSlabs(self.cache, self)

    def start(self, held: "HeldSlabs", first_position: Tensor, model_kwargs: dict[str, Any]) -> None:
        """After the prefill: takes over what of a forward's inputs stays the same for the whole call."""
        view, size = self._view, self.num_nodes
        model_kwargs = model_kwargs | {CACHE: self.cache}
        mask = model_kwargs.get("attention_mask")
        self._is_text.fill_(True)
        if mask is not None:
            self._is_text[: mask.shape[1]] = mask[0].to(self._is_text.device) != 0
        # Nodes that are no chain: the model must be given their positions. All are where the root is.
        roots = CandidateTree(
            token_ids=torch.zeros((1, size), dtype=torch.long, device=view.device),
            depths=torch.zeros(size, dtype=torch.long, device=view.device),
            ancestors=torch.eye(size, dtype=torch.bool, device=view.device),
            children=[],
            is_chain=False,
        )
        inputs = verification_inputs(view, roots, held, first_position, model_kwargs, own_mask=True)
        masks = inputs["attention_mask"]
        self._has_one_mask = not isinstance(masks, dict)
        self._kinds = list(masks) if isinstance(masks, dict) else [k for k in view.layer_kinds if k != NO_CACHE][:1]
        self._groups = groups_of(view)
        # Position of the root if the cache ended at row 0.
        tensors = {"position_ids": inputs["position_ids"] - held.length}
        tensors |= {name: inputs[name] for name in TOKEN_TYPE_KEYS if inputs.get(name) is not None}
        others = {name: value for name, value in inputs.items() if not isinstance(value, Tensor | dict)}
        others.pop(CACHE)
        found = repr((others, {name: value.shape for name, value in tensors.items()}))
        with torch.inference_mode(False):
            if found != self._options_and_shapes:
                # A captured step would go on with the options and tensors of an earlier call.
                self._options_and_shapes, self._verify = found, self._new_step()
                self._inputs = others | {name: value.clone() for name, value in tensors.items()} | {CACHE: self.cache}
            for name, value in tensors.items():
                self._inputs[name].copy_(value)
        for layer in slab_layers(self.cache):
            layer.at = self._at
        # On CUDA the first run of a step is several, and rows that are moved twice are the wrong ones. On this path
        # every row stays where it is.
        self._path.copy_(torch.arange(self._max_path).repeat(2))
        self._move()

    def forward(self, tree: CandidateTree, past: int) -> tuple[Tensor, list[Tensor]]:
        """One forward of the target; its logits `(1, N, V)` and states `(1, N, H)` hold until the next."""
        size, n = self.num_nodes, len(tree)
        filled = torch.zeros((2 + size, size), dtype=torch.long)
        filled[0, :n] = tree.token_ids[0]
        filled[1, :n] = tree.depths
        filled[2:, :] = torch.eye(size, dtype=torch.long)
        filled[2 : 2 + n, :n] = tree.ancestors
        self._tree.copy_(torch.cat((filled.flatten(), torch.tensor([past]))), non_blocking=True)
        return self._verify()

    def _forward(self) -> tuple[Tensor, list[Tensor]]:
        size = self.num_nodes
        ids, depths, past = self._tree[None, :size], self._tree[size : 2 * size], self._tree[-1]
        ancestors = self._tree[2 * size : -1].view(size, size) != 0
        self._at.copy_(self._nodes + past)
        masks = {kind: self._mask(kind, past, depths, ancestors) for kind in self._kinds}
        inputs = self._inputs | {
            "input_ids": ids,
            "attention_mask": masks[self._kinds[0]] if self._has_one_mask else masks,
            "position_ids": self._inputs["position_ids"] + past + depths,
        }
        with hidden_states.in_step(self._layer_ids) as states:
            # Without the hooks of the model as a whole, which torch would trace and a graph would not run.
            outputs = self._view.model.forward(**inputs, return_dict=True)
        return outputs.logits[:, -size:], [states[layer] for layer in self._layer_ids]

    def _mask(self, kind: str, past: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        """`(1, 1, N, W)` additive mask over the whole slab; in a window, a node stands in row past + depth."""
        node = (self._columns - past).clamp(0, self.num_nodes - 1)
        is_prefix = self._columns < past
        is_node = ~is_prefix & (self._columns < past + self.num_nodes)
        visible = (is_prefix & self._is_text) | (is_node & ancestors[:, node])
        if kind == "sliding_attention":
            stand_in = torch.where(is_prefix, self._columns, past + depths[node])
            visible = visible & (stand_in > (past + depths - self._view.text_config.sliding_window)[:, None])
        return fold(additive_mask(visible[None], self._view.dtype), self._groups.get(kind, 1))

    def move(self, past: int, path: list[int]) -> None:
        """Brings the rows of a path together behind the `past` committed ones."""
        if path == list(range(len(path))):
            return
        # Rows behind the path move onto themselves.
        sources = path + list(range(len(path), self._max_path))
        rows = torch.tensor([*sources, *range(self._max_path)])
        self._path.copy_(rows + past, non_blocking=True)
        self._move()

    def _move_path(self) -> None:
        sources, destinations = self._path.view(2, -1)
        move_rows(slab_layers(self.cache), sources, destinations)

    def end(self) -> None:
        """After a call: the memory stays, its rows are forgotten."""
        empty(self.cache)


class HeldSlabs(HeldCache):
    """The cache of a call that verifies in fixed shapes."""

    def __init__(self, cache: DynamicCache, verification: StaticVerification):
        self._verification = verification
        self._rows = cache.get_seq_length()
        super().__init__(cache)

    @property
    def length(self) -> int:
        return self._rows

    @contextmanager
    def verifying(self, tree: CandidateTree) -> Iterator[list[int]]:
        path: list[int] = []
        yield path
        self._verification.move(self._rows, path)
        self._rows += len(path)

    def close(self) -> None:
        for layer in slab_layers(self._cache):
            layer.at = None
            layer.hold(self._rows)
