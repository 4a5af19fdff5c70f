"""Hooks on the target's decoder, and the collector of one call.

`output_hidden_states=True` would keep every layer of every visual token (5.2 GB for 25k tokens of a 7B target). The
hooks here keep only what the draft reads. They are installed once, when a draft is bound (a hook added after a
compiled call never fires), and do nothing unless the running thread has a collector.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .devices import index_of
from .errors import HiddenStateCaptureError

_ACTIVE: "ContextVar[HiddenStateCollector | None]" = ContextVar("sparrow_hidden_states", default=None)


class HiddenStateCollector:
    """Gathers the states of chosen layers at chosen positions over one or several forwards (chunked prefill).

    Args:
        positions: Layer id (`hidden_states` convention: 0 = what enters the first layer, k = output after k layers,
            depth = post-norm) → `(n,)` ascending positions, counted from the start of the first forward; `None` keeps
            all.
    """

    def __init__(self, positions: Mapping[int, Tensor | None]):
        self._positions = positions
        self._seen = dict.fromkeys(positions, 0)
        self._parts: dict[int, list[Tensor]] = {layer: [] for layer in positions}

    def collect(self, layer: int, states: Tensor) -> None:
        """Keeps the requested positions of one forward, given the `(B, n, H)` states of `layer`."""
        if layer not in self._positions:
            return
        start, wanted = self._seen[layer], self._positions[layer]
        self._seen[layer] = start + states.shape[1]
        if wanted is not None:
            # wanted   3   7 |  9  14  20 | 31          absolute, all chunks
            # chunk           [8 ………… 24)               start = 8, n = 16
            # local             1   6  12               absolute − start
            wanted = wanted.to(states.device)
            states = states[:, wanted[(wanted >= start) & (wanted < self._seen[layer])] - start]
        self._parts[layer].append(states)

    def take(self, layer: int) -> Tensor:
        """`(B, n, H)` states gathered so far, in order.

        Raises:
            HiddenStateCaptureError: The hook did not run, or the forwards were shorter than the requested positions.
        """
        wanted = self._positions[layer]
        if self._seen[layer] == 0 or (wanted is not None and len(wanted) and int(wanted[-1]) >= self._seen[layer]):
            raise HiddenStateCaptureError(
                f"layer {layer}: {self._seen[layer]} states passed the hook, fewer than were asked for. Was the "
                "target compiled or copied before the draft was bound? Call draft.bind(target) first."
            )
        parts = self._parts[layer]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def take_rows(self, rows: list[int]) -> Tensor:
        """`(B, len(rows), F·H)` states of all F layers side by side, at some rows of what was gathered."""
        states = [self.take(layer) for layer in self._positions]
        at = index_of(rows, states[0].device)
        chosen = [of_layer[:, at] for of_layer in states]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    @contextmanager
    def active(self) -> Iterator["HiddenStateCollector"]:
        """Makes this the running thread's collector."""
        token = _ACTIVE.set(self)
        try:
            yield self
        finally:
            _ACTIVE.reset(token)


class RowCollectors(HiddenStateCollector):
    """A collector for each row of a batch, for forwards over all of them: rows keep different positions.

    Args:
        rows: The collector of each row; it gathers `(1, n, H)`.
    """

    def __init__(self, rows: Sequence[HiddenStateCollector]):
        super().__init__({})
        self.rows = rows

    def collect(self, layer: int, states: Tensor) -> None:
        """Hands every row its part of `(B, n, H)` states."""
        for row, collector in enumerate(self.rows):
            collector.collect(layer, states[row : row + 1])


def replay(states: Mapping[int, Tensor]) -> None:
    """Hands stored states to the running thread's collector, as the hooks would during the forward they come from.

    Args:
        states: Layer id → `(B, n, H)` states of the whole forward.
    """
    collector = _ACTIVE.get()
    if collector is not None:
        for layer, of_layer in states.items():
            collector.collect(layer, of_layer)


#: States of the step that torch is tracing at the moment; it cannot trace a `ContextVar`.
_traced: dict[int, Tensor] | None = None


@contextmanager
def in_step(layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Gathers the states of one forward, also while torch traces it for compilation.

    Yields an empty dict: layer id → `(B, n, H)` states, filled when the context is left.
    """
    global _traced
    states: dict[int, Tensor] = {}
    if torch.compiler.is_compiling():
        _traced = states
        try:
            yield states
        finally:
            _traced = None
    else:
        with HiddenStateCollector(dict.fromkeys(layers)).active() as collector:
            yield states
        states.update({layer: collector.take(layer) for layer in layers})


class _Hook:
    """A hook that hands states to the thread's collector, if there is one."""

    def __init__(self, layer: int):
        self.layer = layer

    def hand_over(self, states: Tensor) -> None:
        if torch.compiler.is_compiling() and _traced is not None:
            _traced[self.layer] = states
            return
        collector = _ACTIVE.get()
        if collector is not None:
            collector.collect(self.layer, states)


class _OutputHook(_Hook):
    """After a module has run: its output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hand_over(output[0] if isinstance(output, tuple) else output)


class _InputHook(_Hook):
    """Before a module runs: what enters it."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.hand_over(args[0] if args else kwargs["hidden_states"])


class _AllRowsHook:
    """Before a decoder runs: while states are collected, no layer may leave rows out.

    A decoder that is told how many logits are wanted may compute its last layers for those rows only (layers that
    share the keys and values of others leave nothing behind for later rows). The model cuts the rows for its head
    itself, where the decoder has not.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        is_traced = torch.compiler.is_compiling() and _traced is not None
        if is_traced or _ACTIVE.get() is not None:
            return args, kwargs | {"logits_to_keep": 0}
        return None


def install_hooks(decoder: Any, norm: nn.Module, layer_ids: set[int]) -> None:
    """Puts the hooks on a decoder that it has none of yet.

    Args:
        norm: The norm behind its last layer.
        layer_ids: Layers whose states are handed over (0 = before the first, depth = the norm).
    """
    layers = decoder.layers
    for layer in sorted(layer_ids):
        module = norm if layer == len(layers) else layers[max(layer - 1, 0)]
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(isinstance(hook, _Hook) and hook.layer == layer for hook in hooks):
            continue
        if layer == 0:
            module.register_forward_pre_hook(_InputHook(layer), with_kwargs=True)
        else:
            module.register_forward_hook(_OutputHook(layer))
    has_hook = any(isinstance(hook, _AllRowsHook) for hook in decoder._forward_pre_hooks.values())
    if "logits_to_keep" in inspect.signature(decoder.forward).parameters and not has_hook:
        decoder.register_forward_pre_hook(_AllRowsHook(), with_kwargs=True)
