"""Decoding in fixed shapes: which calls can have it, and the buffers and compiled steps kept from call to call."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .._transformers import CACHE, attention_of, dynamic_copy
from ..configuration_sparrow import TreeShape
from ..devices import index_of
from ..errors import UnsupportedGenerationError
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView
from .refusals import arguments_of_hooks
from .self_check import Verification
from .static_drafts import StaticDrafting
from .static_verification import StaticVerification
from .tree import CandidateTree

#: Lengths whose buffers and steps are kept for the next calls of a target and draft.
_MAX_KEPT = 2


class StaticSession:
    """What one call in fixed shapes works with, and the next call of about the same length uses again.

    Args:
        num_rows: Rows of the target's and of the draft's slabs, from [`rows_needed`].
        compile_config: Arguments of `torch.compile`; `None`: not compiled.
    """

    def __init__(
        self,
        view: TargetView,
        draft: SparrowDraftModel,
        num_rows: tuple[int, int],
        compile_config: dict[str, Any] | None,
    ):
        self._view, shape = view, draft.config.tree_shape
        max_path = shape.num_draft_levels + 1
        num_nodes = shape.num_tree_nodes
        layers = draft.config.feature_layer_ids
        self.verification = StaticVerification(view, num_rows[0], num_nodes, max_path, layers, compile_config)
        self.drafting = StaticDrafting(draft, num_rows[1], shape, max_path, compile_config)

    def copy_of_cache(self) -> DynamicCache:
        """What the target's cache holds, for the caller."""
        return dynamic_copy(self.verification.cache, self._view.text_config)


class StaticVerifier:
    """The counterpart of `TargetVerifier` in fixed shapes."""

    def __init__(self, verification: StaticVerification, first_position: Tensor, model_kwargs: dict[str, Any]):
        self._verification = verification
        self._held = self._verification.take(model_kwargs[CACHE])
        self._states: list[Tensor] = []
        self._verification.start(self._held, first_position, model_kwargs)

    def max_levels(self) -> int:
        """How deep the next tree may be."""
        return self._verification.num_nodes - 1

    @contextmanager
    def verifying(self, tree: CandidateTree) -> Iterator[tuple[Tensor, list[int]]]:
        """One forward over the tree. Yields its `(1, N, V)` logits and the path to keep, empty."""
        with self._held.verifying(tree) as path:
            logits, self._states = self._verification.forward(tree, self._held.length)
            yield logits[:, : len(tree)], path

    def features(self, path: list[int]) -> Tensor:
        """`(1, n, features · H)` states of the last forward at the nodes of a path."""
        at = index_of(path, self._states[0].device)
        return torch.cat([states[:, at] for states in self._states], dim=-1)

    def close(self, outlives_call: bool) -> None:
        """After the last round."""
        self._held.close()


def bucket(length: int) -> int:
    """The size of the buffers for a length: longer by a quarter or 63 at most, so that many lengths have the same."""
    step = max(64, 1 << length.bit_length() - 3) if length > 64 else 64
    return -(-length // step) * step


def rows_needed(shape: TreeShape, max_length: int) -> tuple[int, int]:
    """Rows of the target's and of the draft's slabs: for `max_length` tokens, and what is drafted behind them."""
    newest = shape.num_draft_levels + 1
    return (
        bucket(max_length + shape.num_tree_nodes),
        bucket(max_length + newest + shape.beam_width * shape.num_draft_levels),
    )


def check_fixed_shapes(view: TargetView, ways: Verification, recorded: Collection[str]) -> None:
    """Whether a call with `cache_implementation="static"` can have a draft.

    Raises:
        UnsupportedGenerationError: It cannot; what stands in the way is named.
    """
    found = [f"output_{name}" for name in recorded]
    if view.rope_borders:
        found.append("rotary embeddings whose frequencies follow the length")
    if view.obstacle_to_trees:
        found.append(f"the target's {view.obstacle_to_trees.rstrip(',')}")
    elif ways.trees != "own":
        found.append(f"the attention function {attention_of(view.text_config)!r}, which follows no mask of a tree")
    if len({parameter.device for parameter in view.decoder.parameters()}) > 1:
        found.append("a decoder on several devices")
    if view.model._forward_hooks or view.model._forward_pre_hooks:
        # A step calls the model's `forward`: torch would trace them, and a graph would not run them.
        found.append("forward hooks on the target as a whole")
    if found:
        raise UnsupportedGenerationError(
            f"cache_implementation='static' cannot be combined with a Sparrow draft and {'; '.join(found)}: leave "
            "cache_implementation at its default, or generate without the draft"
        )


@contextmanager
def static_session(
    view: TargetView, draft: SparrowDraftModel, max_length: int, compile_config: dict[str, Any] | None
) -> Iterator[StaticSession]:
    """A session for one call, with an empty cache: that of an earlier call where it fits, or else a new one.

    A thread that finds it in use makes its own. That of a call that raises is not kept: it may be half made.
    """
    kept = view.static_sessions
    num_rows, device = rows_needed(draft.config.tree_shape, max_length), view.device.type
    key = (
        num_rows,
        draft.config.tree_shape,
        repr(compile_config),
        attention_of(view.text_config),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        _kernel_settings(),
        _state_of(view.model),
        _state_of(draft),
    )
    session = kept.pop(key, None) or StaticSession(view, draft, num_rows, compile_config)
    yield session
    session.verification.end()
    session.drafting.end()
    kept[key] = session
    for old in list(kept)[:-_MAX_KEPT]:
        kept.pop(old, None)


def _kernel_settings() -> tuple[Any, ...]:
    """Settings of torch that decide which kernels run; a captured graph goes on with those of its capture."""
    cuda = torch.backends.cuda
    kernels = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    return (
        *(torch.get_float32_matmul_precision(), getattr(cuda.matmul, "fp32_precision", None)),
        *(torch.are_deterministic_algorithms_enabled(), cuda.cudnn_sdp_enabled(), *kernels),
    )


def _state_of(model: nn.Module) -> int:
    """Changes when a model's weights move, its modules change, or an adapter is switched, added or scaled.

    A captured graph holds addresses and numbers, so it would go on with the old ones.
    """
    parts: list[Any] = [model.training]
    for module in model.modules():
        parts += [id(module), len(module._forward_hooks), len(module._forward_pre_hooks)]
        # peft tells the modules of one call what its adapters are.
        parts += [repr(arguments) for arguments in arguments_of_hooks(module)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            # An address may come back for another size.
            parts += [tensor.data_ptr(), tuple(tensor.shape)]
        # Adapters of peft.
        for name in ("active_adapters", "disable_adapters", "merged_adapters", "scaling"):
            parts.append(repr(getattr(module, name, None)))
    return hash(tuple(parts))
