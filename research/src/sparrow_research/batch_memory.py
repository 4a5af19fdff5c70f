"""Measures the memory of batches on a built-in target: plain `generate()` and the draft, one by one and together.

    python -m sparrow_research.batch_memory --max-new-tokens 32 --output research/data/batch_memory.json
    python -m sparrow_research.batch_memory --visual-tokens 25000 --single --max-new-tokens 48 --output FILE

Counted are the bytes of all tensors that a call makes and that are alive at the same time, so the figures are the same
on every machine. Weights, inputs and what a kernel uses inside are not among them.
"""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.generation import BaseStreamer

from sparrow_hf.artifacts import write_json
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.testbed import load
from sparrow_hf.training.batched_answers import left_pad

from .batches import NUM_CLIPS, SIZES, prompts


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside of it while they live.

    Attributes:
        live: Of those that live now.
        peak: The most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


class PeakByPhase(BaseStreamer):
    """Tells the peak of the prefill from that of the rounds: the first token comes between them."""

    def __init__(self, memory: LiveBytes):
        self.memory = memory
        self.prefill = self._calls = 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the prompt was the first
            self.prefill = self.memory.peak
            self.memory.peak = self.memory.live

    def end(self) -> None:
        pass


@torch.no_grad()
def peaks(target: Any, batches: list[dict[str, Tensor]], **kwargs: Any) -> dict[str, int]:
    """The largest of several calls."""
    found = []
    for inputs in batches:
        with LiveBytes() as memory:
            streamer = PeakByPhase(memory)
            target.generate(**inputs, **kwargs, streamer=streamer)
        found.append((streamer.prefill, memory.peak))
    prefill, rounds = map(max, zip(*found, strict=True))
    return {"prefill": prefill, "rounds": rounds}


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure the memory of batches on the built-in target.")
    parser.add_argument("--visual-tokens", type=int, default=240, help="length of the longest clip")
    parser.add_argument("--single", action="store_true", help="the longest clip alone, with the draft as it ships")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)

    target, processor, draft = load()
    if not options.single:
        draft.config.set_tree_shape("chain-5")
    num_clips, sizes = (1, SIZES[:1]) if options.single else (NUM_CLIPS, SIZES)
    clips, pad = prompts(target, processor, options.visual_tokens, num_clips), processor.tokenizer.pad_token_id
    arms: dict[str, dict[str, Any]] = {
        "plain": {},
        "draft": {"assistant_model": draft},
        "in step": {"assistant_model": draft, "return_dict_in_generate": True},
    }
    found: dict[str, dict[str, dict[str, int]]] = {}
    for size in sizes:
        batches = [left_pad(clips[start : start + size], pad) for start in range(0, num_clips, size)]
        for arm, settings in arms.items():
            of_arm = peaks(target, batches, max_new_tokens=options.max_new_tokens, do_sample=False, **settings)
            found.setdefault(str(size), {})[arm] = of_arm
            print(f"B={size} {arm}: {', '.join(f'{name} {peak / 1e6:.2f} MB' for name, peak in of_arm.items())}")
    write_json(options.output, provenance(target, peak_bytes=found), indent=2)


if __name__ == "__main__":
    main()
