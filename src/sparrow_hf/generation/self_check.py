"""Whether a target's rows depend on nothing but their own text: several tokens in one forward against one by one.

Most of it is known beforehand, from the kinds of layers. What cannot be read is tried, once per target and attention
function: attention functions and code that are not transformers' own, and quantised modules, which may mix the rows of
a forward. Hooks are not tried: they would see tokens that nobody generated.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _transformers
from .._transformers import CACHE
from ..errors import UnsupportedTargetError
from ..targets import TargetView
from .attention import following_masks, let_follow_masks
from .caches import hold
from .tree import CandidateTree, build_tree
from .verification import verification_inputs

#: A target's own attention function, or the eager one of its model.
Way = Literal["own", "eager"]

#: Largest relative difference of logits that rounding explains.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_OF_HALF_PRECISION = 0.1

#: Whose modules compute each row by itself.
_ROW_BY_ROW = ("torch.nn.modules.", "transformers.", "peft.")

#: Parents of the nodes of the trees that are tried; a chain, and a tree in which most rows have strangers before them.
_CHAIN = [-1, 0, 1, 2, 3]
_TREE = [-1, 0, 0, 0, 1, 2, 4, 5]
#: The prompt begins with padding: some functions ignore that too.
_PROMPT_LENGTH, _PADDING = 12, 3


@dataclass
class Verification:
    """How a target verifies drafts.

    Attributes:
        chains, trees: The attention function it does so with; `None` where none gives what one token at a time gives.
        why_no_trees: What of the target stands in the way of trees.
        untold: What could not be read and was therefore tried.
        differences: Of what was tried (`"chain, own"`): the largest relative difference of the logits.
    """

    chains: Way | None
    trees: Way | None
    why_no_trees: str = ""
    untold: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)

    def of(self, tree: CandidateTree) -> Way | None:
        """The attention function that verifies this tree."""
        return self.chains if tree.is_chain else self.trees


def how_to_verify(view: TargetView) -> Verification:
    """How this target verifies drafts with the attention function it has now; what must be tried is tried once.

    Raises:
        UnsupportedTargetError: It cannot: rows of one forward depend on each other.
    """
    # Modules may have been replaced since the last call, and quantised in place.
    name, untold = _transformers.attention_of(view.text_config), tuple(what_cannot_be_read(view))
    key = name, _transformers.attention_function(view.layers, view.text_config), untold
    known: dict[Any, Verification] = view.verification
    if key not in known:
        known[key] = measure(view) if untold else _known(view)
        # The function may be a new one now that also follows masks.
        known[name, _transformers.attention_function(view.layers, view.text_config), untold] = known[key]
    refuse_without_a_way(view, known[key])
    return known[key]


def refuse_without_a_way(view: TargetView, found: Verification) -> None:
    """Raises [`UnsupportedTargetError`] if not even chains are verified."""
    if found.chains is None:
        difference = max(found.differences.values(), default=float("nan"))
        raise UnsupportedTargetError(
            f"{type(view.model).__name__}: several tokens in one forward give other logits than one by one (relative "
            f"difference {difference:.1e}), so drafts cannot be verified. Look at {'; '.join(found.untold) or 'hooks'}"
        )


def what_cannot_be_read(view: TargetView) -> list[str]:
    """What of a target may mix the rows of a forward, as far as its properties do not say; empty if they do."""
    found = []
    name = _transformers.attention_of(view.text_config)
    if not _transformers.is_stock_attention(view.layers, view.text_config):
        found.append(f"the attention function {name!r}")
    if not type(view.model).__module__.startswith("transformers.models."):
        found.append(f"the class {type(view.model).__name__}, which is not transformers' own")
    # Named by their classes.
    strangers: set[str] = set()
    tensors: set[str] = set()
    for module in view.decoder.modules():
        if not type(module).__module__.startswith(_ROW_BY_ROW):
            strangers.add(type(module).__name__)
        for tensor in module.parameters(recurse=False):
            if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
                tensors.add(type(tensor.data).__name__)
    if strangers:
        found.append(f"modules of the kind {', '.join(sorted(strangers))}")
    if tensors:
        found.append(f"weights of the kind {', '.join(sorted(tensors))}")
    return found


def _known(view: TargetView) -> Verification:
    obstacle = view.obstacle_to_trees
    return Verification("own", None if obstacle else "own", obstacle)


@torch.no_grad()
def measure(view: TargetView) -> Verification:
    """Tries a chain and a tree against the same tokens one by one."""
    obstacle = view.obstacle_to_trees
    found = Verification(None, None, obstacle, what_cannot_be_read(view))
    name, function = _transformers.attention_of(view.text_config), None
    if not _transformers.is_stock_attention(view.layers, view.text_config):
        function = _transformers.attention_function(view.layers, view.text_config)
    ways: list[Way] = ["own"]
    if function is not None:
        let_follow_masks(name, function)
        ways.append("eager")
    with _keeping_position_offsets(view.model):
        prompt = _Prompt(view)
        for way in ways:
            # Masks of ours say nothing to layers that are no attention.
            if found.chains is None and (way == "own" or not obstacle) and prompt.agrees(_CHAIN, way, found):
                found.chains = way
            # FlashAttention does not ignore a 4-D mask: it fails, on a GPU in a way that ends the process.
            if way == "own" and _transformers.takes_flat_masks_only(name):
                continue
            if found.trees is None and not obstacle and prompt.agrees(_TREE, way, found):
                found.trees = way
    if found.trees is None and not obstacle:
        found.why_no_trees = f"attention function {name!r}"
    return found


@contextmanager
def _keeping_position_offsets(model: nn.Module) -> Iterator[None]:
    """Puts back what models with M-RoPE note of the last prompt: a second turn of the caller's continues from it."""
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


class _Prompt:
    """A short text that the target has read, and drafts to follow it."""

    def __init__(self, view: TargetView):
        self._view, self._model = view, view.model
        vocabulary = view.text_config.vocab_size
        # Any ids do. Multiples of a prime are spread over the vocabulary and never repeat.
        self._ids = (torch.arange(_PROMPT_LENGTH + len(_TREE), device=view.device) * 7919 + 101) % vocabulary
        prompt = self._ids[None, :_PROMPT_LENGTH]
        is_text = torch.arange(_PROMPT_LENGTH, device=view.device) >= _PADDING
        kwargs: dict[str, Any] = {"attention_mask": is_text.long()[None], "use_cache": True}
        kwargs["position_ids"] = _transformers.prompt_position_ids(self._model, prompt, kwargs)
        kwargs[CACHE] = _transformers.new_cache(self._model)
        inputs = self._model.prepare_inputs_for_generation(prompt, is_first_iteration=True, **kwargs)
        outputs = self._model(**inputs, return_dict=True)
        self._kwargs = _transformers.advance(self._model, outputs, kwargs)

    def agrees(self, parents: list[int], way: Way, found: Verification) -> bool:
        """Whether a tree in one forward gives the logits of its tokens one by one; notes the difference."""
        tree = build_tree(self._ids[_PROMPT_LENGTH:].tolist()[: len(parents)], parents, self._ids.device)
        try:
            with following_masks(way == "eager"):
                together = self._logits(tree, own_mask=way == "eager" or not tree.is_chain)
        except torch.OutOfMemoryError:
            # That says nothing about the target.
            raise
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        differences = []
        for node in range(len(parents)):
            path = tree.ancestors[node].nonzero()[:, 0].tolist()
            alone = self._one_by_one(tree.token_ids[0, path].tolist())
            spread = (alone - alone.mean()).norm()
            differences.append(float((together[node] - alone).norm() / spread))
        worst = torch.tensor(differences)
        tolerance = _TOLERANCE.get(self._view.dtype)
        # In half precision a row may fall to another expert by rounding alone.
        difference = float(worst.max() if tolerance is not None else worst.median())
        found.differences[f"{'chain' if parents is _CHAIN else 'tree'}, {way}"] = difference
        return difference <= (tolerance or _TOLERANCE_OF_HALF_PRECISION)

    def _one_by_one(self, tokens: list[int]) -> Tensor:
        """`(V,)` logits after the last of some tokens."""
        kwargs = copy.deepcopy(self._kwargs)
        for token in tokens:
            step = self._ids.new_tensor([[token]])
            inputs = self._model.prepare_inputs_for_generation(step, is_first_iteration=False, **kwargs)
            outputs = self._model(**inputs, return_dict=True)
            kwargs = _transformers.advance(self._model, outputs, kwargs)
        return outputs.logits[0, -1].double()

    def _logits(self, tree: CandidateTree, own_mask: bool) -> Tensor:
        """`(N, V)` logits of a tree in one forward."""
        kwargs = copy.deepcopy(self._kwargs)
        first_position, held = kwargs["position_ids"][..., -1:], hold(kwargs[CACHE])
        inputs = verification_inputs(self._view, tree, held, first_position, kwargs, own_mask)
        return self._model(**inputs, return_dict=True).logits[0, -len(tree) :].double()
