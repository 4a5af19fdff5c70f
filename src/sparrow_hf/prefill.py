"""One prefill for all arms. With 25,000 visual tokens the prefill takes longer than the decoding of all arms.

`generate()` runs a prefill in every call. Here it runs once, and its results are kept: the logits of the last
position, the cache, and the states of the layers that drafts read. Later calls get a copy of them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ._transformers import CACHE, grow_in_place, grows_in_place, replaced_prefill, unwrap
from .clocks import StopWatch
from .hidden_states import HiddenStateCollector, replay


class PrefillSnapshot:
    """The target's prefill of one prompt, computed on construction.

    Holds the prompt's cache a second time, and its states of `layers`, all of them: at 25,000 visual tokens of a 7B
    target 1.4 GB and 0.18 GB per layer.

    Args:
        inputs: What the processor returned.
        settings: Further arguments of `generate()`.
        layers: Layer ids (`hidden_states` convention) of which drafts read the states; their hooks are installed.

    Attributes:
        seconds: From the call of `generate()` to its first token: video encoder and prefill. Longer than plain
            `generate()`'s where that leaves rows out of layers that share keys and values.
    """

    def __init__(
        self, target: PreTrainedModel, inputs: Mapping[str, Tensor], settings: Mapping[str, Any], layers: set[int]
    ):
        self._model: Any = unwrap(target)
        # The video is encoded, so later calls do not need its pixels.
        self._inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}

        def keep(compute: Callable[[], Any], model_kwargs: dict[str, Any]) -> Any:
            self._outputs = compute()
            self._cache: DynamicCache = model_kwargs[CACHE]
            return self._outputs

        collector = HiddenStateCollector(dict.fromkeys(layers))
        with replaced_prefill(self._model, keep), collector.active(), StopWatch(target) as watch:
            target.generate(**inputs, **{**settings, "max_new_tokens": 1}, streamer=watch)
        self.seconds = watch.prefill_seconds
        self._states = {layer: collector.take(layer) for layer in layers}

    @contextmanager
    def replayed(self) -> Iterator[dict[str, Tensor]]:
        """The target's next `generate()` calls start from this prefill; give them the inputs that are yielded."""

        def repeat(compute: Callable[[], Any], model_kwargs: dict[str, Any]) -> Any:
            replay(self._states)
            outputs = copy.copy(self._outputs)
            # `generate()` goes on with the cache of these outputs, in the place of the empty one it made.
            outputs[CACHE] = copy.deepcopy(self._cache)
            if grows_in_place(model_kwargs[CACHE]):
                grow_in_place(outputs[CACHE])
            return outputs

        with replaced_prefill(self._model, repeat):
            yield self._inputs
