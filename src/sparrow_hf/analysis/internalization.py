"""How far states move away from what entered the decoder, layer by layer (paper, figure 6)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..targets import TargetView
from .answered import AnsweredPrompt

#: Positions compared at a time, in fp32.
CHUNK_ROWS = 4096


class InputSimilarity:
    """Cosine similarity of states to their embeddings, collected over one forward.

    Attributes:
        similarity: `"visual"` or `"text"` (all others, answer included) → `(layers,)`, entry k − 1 for the state after
            k layers, before the final norm; mean over positions.
    """

    def __init__(self, view: TargetView, answered: AnsweredPrompt):
        self._view, self._is_visual = view, answered.is_visual
        self._inputs: Tensor | None = None
        self.similarity = {kind: torch.zeros(len(view.layers)) for kind in ("visual", "text")}

    @contextmanager
    def gathering(self) -> Iterator["InputSimilarity"]:
        """Run one forward over prompt and answer in this context."""

        def keep_inputs(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._inputs = args[0][0]

        def hook(layer: int) -> Callable[..., None]:
            return lambda module, args, output: self._add(layer, output[0] if isinstance(output, tuple) else output)

        handles = []
        try:
            handles.append(self._view.layers[0].register_forward_pre_hook(keep_inputs))
            for index, module in enumerate(self._view.layers):
                handles.append(module.register_forward_hook(hook(index)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._inputs = None

    def _add(self, layer: int, states: Tensor) -> None:
        assert self._inputs is not None
        pairs = zip(states[0].split(CHUNK_ROWS), self._inputs.split(CHUNK_ROWS), strict=True)
        cosines = torch.cat(
            [functional.cosine_similarity(now.float(), then.to(now.device).float(), dim=-1) for now, then in pairs]
        )
        is_visual = self._is_visual.to(cosines.device)
        self.similarity["visual"][layer] = cosines[is_visual].mean().cpu()
        self.similarity["text"][layer] = cosines[~is_visual].mean().cpu()
