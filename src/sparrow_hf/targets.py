"""The parts of a target that the package uses: decoder, embedding, head, device. No code depends on the family.

What is read from a target's configuration (placeholder ids, the shape of a decoder layer) is in `target_config.py`.
"""

import itertools
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ._transformers import (
    NO_CACHE,
    commit_of,
    decoder_of,
    execution_device,
    layer_kinds,
    name_of,
    not_given_by_generate,
    query_groups,
    rope_borders,
    takes_masks_of_kinds,
    takes_positions,
    unwrap,
)
from .artifacts import tensor_digest
from .configuration_sparrow import SparrowDraftConfig
from .errors import BindingError, UnsupportedTargetError
from .hidden_states import install_hooks
from .target_config import visual_token_ids

#: What decoders call the norm behind their last layer.
_NORMS = ("norm", "embedding_norm", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "ln_f")

#: Kinds of layers of which several rows in one forward give what one at a time gives: if every row follows the one
#: before (a chain), and if rows also branch (a tree; the mask then says which rows a row sees).
TREE_LAYERS = frozenset({"full_attention", "sliding_attention"})
CHAIN_LAYERS = TREE_LAYERS | {"chunked_attention", "minimax_m3_sparse", "conv", "linear_attention"}


class TargetView:
    """Uniform access to the parts of a target. Holds references only; nothing is copied and nothing registered.

    Args:
        target: A video LLM of transformers, bare or wrapped by peft.

    Raises:
        UnsupportedTargetError: It has no decoder, embedding or head in the usual place, is an encoder-decoder, has
            layers that cannot verify drafts, or is given no dynamic cache or positions by `generate()`.
    """

    def __init__(self, target: PreTrainedModel):
        self.model = unwrap(target)
        name, config = type(self.model).__name__, self.model.config
        self.text_config = config.get_text_config()
        self.layer_kinds = layer_kinds(self.text_config)
        if unknown := set(self.layer_kinds) - CHAIN_LAYERS - {NO_CACHE}:
            raise UnsupportedTargetError(
                f"{name} has layers of the kind {', '.join(sorted(unknown))}, which may give other states for several "
                f"tokens in one forward than one by one; drafts can be verified by layers of the kind "
                f"{', '.join(sorted(CHAIN_LAYERS))}"
            )
        try:
            self.decoder: Any = decoder_of(self.model)
            self.layers: nn.ModuleList = self.decoder.layers
            norms = (getattr(self.decoder, name, None) for name in _NORMS)
            self.norm: nn.Module = next(norm for norm in norms if norm is not None)
        except (AttributeError, StopIteration) as error:
            raise UnsupportedTargetError(
                f"{name} has no decoder with `layers` and a norm behind them; Sparrow needs a decoder-only video LLM "
                "of transformers"
            ) from error
        if config.is_encoder_decoder:
            raise UnsupportedTargetError(f"{name} is an encoder-decoder; Sparrow needs a decoder-only video LLM")
        self.embedding: nn.Module = self.model.get_input_embeddings()
        self.head: nn.Module = self.model.get_output_embeddings()
        if self.embedding is None or self.head is None:
            raise UnsupportedTargetError(f"{name} has no input embedding or no language-model head")
        if lacking := not_given_by_generate(self.model):
            raise UnsupportedTargetError(
                f"generate() gives {name} no {lacking}; drafts are verified at positions behind the prompt's, in a "
                "dynamic cache that rejected tokens leave again"
            )
        #: Filled by `generation/self_check.py`: attention function → how drafts are verified with it.
        self.verification: dict[Any, Any] = {}
        #: Filled by `generation/static_decoding.py`: buffers and compiled steps of earlier calls.
        self.static_sessions: dict[Any, Any] = {}

    @property
    def chain_layers(self) -> list[str]:
        """Kinds of its layers that verify chains, but no trees."""
        return sorted(set(self.layer_kinds) - TREE_LAYERS - {NO_CACHE})

    @cached_property
    def obstacle_to_trees(self) -> str:
        """What does not let its rows branch: layers that follow no mask, positions or masks that it makes itself."""
        if self.chain_layers:
            return f"{', '.join(self.chain_layers)} layers"
        if not takes_positions(self.model, self.decoder):
            return "decoder, which counts positions itself,"
        has_kinds = len(set(self.layer_kinds) - {NO_CACHE}) > 1
        if has_kinds and not takes_masks_of_kinds(self.model, self.decoder):
            return "forward, which makes the masks of its layers itself,"
        return ""

    @cached_property
    def query_groups(self) -> dict[str, int]:
        """Kind of layer → how many query heads share one KV head, for kinds in which it is more than one.

        Without kinds whose attention modules do anything with a mask but give it to the attention function.
        """
        return query_groups(self.layers, self.text_config)

    @cached_property
    def sha256(self) -> str:
        """Digest of its weights, computed once: a target is frozen, and a large one takes long to read."""
        return tensor_digest(self.model.state_dict())

    def is_view_of(self, target: PreTrainedModel) -> bool:
        """Whether this is a view of `target` with its current embedding and head."""
        model = unwrap(target)
        return (
            model is self.model
            and model.get_input_embeddings() is self.embedding
            and model.get_output_embeddings() is self.head
        )

    def head_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Weights of the head, and its biases if it has some, of some tokens: copied as they are now, beside the ids.

        Returns:
            What `functional.linear` takes behind the states; `None` for a head without plain weights (quantised, or
            offloaded by accelerate).
        """
        head = self.head
        if type(head) is not nn.Linear or head.weight.device.type == "meta":
            return None
        parts = (head.weight,) if head.bias is None else (head.weight, head.bias)
        # On several devices, a head that is tied to the embedding lies beside it and not where the draft runs.
        return tuple(part.detach()[token_ids.to(part.device)].to(token_ids.device) for part in parts)

    def reduced_head(self, token_ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The head cut down to some tokens: `(…, H)` states → `(…, len(token_ids))` logits.

        Keep the result for one call or one training step only, since the head may be edited or moved after it. A head
        without plain weights computes all logits and the others are discarded, which is correct but saves no time.
        """
        rows = self.head_rows(token_ids)
        if rows is not None:
            return lambda states: functional.linear(states, *rows)
        head = self.head
        return lambda states: head(states)[..., token_ids]

    @cached_property
    def rope_borders(self) -> list[tuple[int, bool]]:
        """Positions at which the frequencies of the rotary embedding change, and whether they stay so beyond."""
        return rope_borders(self.decoder)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder's states (a quantised target's weights have another)."""
        # A norm may have no weights. States begin as embeddings.
        return next(itertools.chain(self.norm.parameters(), self.embedding.parameters())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the decoder's last states, on which the draft runs."""
        # A norm without weights runs where the last layer does.
        parts = (self.norm, *self.layers[-1].modules())
        last, weight = next((part, weight) for part in parts for weight in part.parameters(recurse=False))
        return execution_device(last, weight)


def bind(config: SparrowDraftConfig, target: PreTrainedModel) -> TargetView:
    """Checks a draft configuration against a target and installs the output hooks the draft needs.

    Raises:
        BindingError: A shape, the vocabulary, the layer count or the placeholder ids differ; all are named.
    """
    view = TargetView(target)
    found: dict[str, tuple[Any, Any]] = {
        "hidden_size": (config.hidden_size, view.text_config.hidden_size),
        "vocab_size": (config.vocab_size, view.text_config.vocab_size),
        "num_hidden_layers": (config.target_num_hidden_layers, len(view.layers)),
        "visual_token_ids": (sorted(config.visual_token_ids or []), visual_token_ids(view.model.config)),
    }
    wrong = [f"{name}: draft {ours}, target {theirs}" for name, (ours, theirs) in found.items() if ours != theirs]
    if wrong:
        raise BindingError(
            f"this draft was made for another target ({config.target_model_type}, "
            f"{config.target_name_or_path or 'unnamed'}): {'; '.join(wrong)}. Use the draft of "
            f"{name_of(view.model.config) or view.model.config.model_type}, or train one."
        )
    known = (config.target_name_or_path, config.target_revision)
    given = (name_of(view.model.config), commit_of(view.model.config))
    if any(ours and theirs and ours != theirs for ours, theirs in zip(known, given, strict=True)):
        warnings.warn(
            f"the draft was trained for {_said(*known)} and is used with {_said(*given)}: the output stays the "
            "target's own, the acceptance may be lower",
            stacklevel=4,
        )
    install_hooks(view.decoder, view.norm, config.layer_ids_read)
    return view


def _said(name: str | None, revision: str | None) -> str:
    return f"{name!r} at revision {revision}" if revision else f"{name!r}"
