"""`SparrowDraftModel`: FC, decoder layer, head. It contains no decoding loop and no code of the target."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, initialization

from ._transformers import (
    CACHE,
    DECODER_LAYERS,
    DecoderOutput,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    check_contract,
    checkpoint_with_cache,
    run_layer,
)
from .configuration_sparrow import SparrowDraftConfig, check_vocabulary
from .draft_inputs import DraftInputs, put
from .errors import BindingError, DraftConfigError, UnsupportedTargetError
from .saved_draft import SavedDraft

if TYPE_CHECKING:
    from .generation.stats import GenerationStats
    from .targets import TargetView

_Inputs = TypeVar("_Inputs", bound=DraftInputs)
#: Length of a state below which it is taken to be nothing.
_SHORTEST = 1e-6


class SparrowDraftModel(SavedDraft):
    """The draft of Sparrow (paper, section 3): one decoder layer over the target's own text states.

    Position `t` of its sequence holds the embedding of token `t + 1` and the target's state of token `t`, fused by one
    linear map, and predicts the target's state of token `t + 1`, hence token `t + 2`. Embedding and head are the
    target's: they are borrowed by [`~SparrowDraftModel.bind`], never registered and never saved.

    Use it as `target.generate(**inputs, assistant_model=draft)`; `draft.last_generation` then holds the
    [`GenerationStats`] of this thread's last call.

    `draft.provenance` describes how the draft was trained. It is saved beside the weights as `PROVENANCE.json`, shown
    on the model card (see [`~model_card.model_card`] for its entries), and loaded again with the weights.
    """

    base_model_prefix = "draft"
    main_input_name = "inputs_embeds"
    _no_split_modules = [layer.__name__ for layer in DECODER_LAYERS.values()]
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: SparrowDraftConfig):
        super().__init__(config)
        hidden = config.hidden_size
        num_features = len(config.feature_layer_ids)
        self.feature_fc = nn.Linear(num_features * hidden, hidden, bias=False) if num_features > 1 else nn.Identity()
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.fc_bias)
        block = DECODER_LAYERS[config.block_type]
        self.layers = nn.ModuleList([block(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        for layer in self.layers:
            checkpoint_with_cache(layer)
        if not config.input_norm:
            self.layers[0].input_layernorm = nn.Identity()
        self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps) if config.output_norm else nn.Identity()
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.draft_to_target: Tensor | None
        size = config.draft_vocab_size
        self.register_buffer("draft_to_target", None if size is None else torch.arange(size))
        self.provenance: dict[str, Any] = {}
        self._set_unregistered(None)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.feature_fc and isinstance(module, nn.Linear):
            # Several feature layers start as [0 | … | I]: the last layer's states alone.
            hidden, last = self.config.hidden_size, self._latest_feature
            start = torch.zeros_like(module.weight)
            start[:, last * hidden : (last + 1) * hidden] = torch.eye(hidden)
            initialization.copy_(module.weight, start)

    def _set_unregistered(self, target: "TargetView | None") -> None:
        # `nn.Module.__setattr__` would register the target's modules as the draft's own.
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_thread", threading.local())
        self._placeholder_index: tuple[Any, Tensor] = (None, torch.empty(0))

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes start unbound: the draft does not own its target. Thread state is dropped.
        unregistered = ("_target", "_thread", "_placeholder_index")
        return {key: value for key, value in self.__dict__.items() if key not in unregistered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_unregistered(None)

    # -- what one forward does ---------------------------------------------------------------------------------------

    def embed_inputs(self, inputs: _Inputs) -> tuple[Tensor, _Inputs]:
        """What enters the draft's layers for whole prompts, in training and generation alike.

        Text tokens are embedded by [`~SparrowDraftModel.embed_next`]. Visual ones are the target's middle-layer
        states, raw (paper, IVSB) or through FC's second half (`project_visual`).

        Returns:
            embeds: `(B, R, H)`, zero where padded.
            inputs: As given. Drafts that merge visual tokens return fewer of them, and the `visual_summary` that later
                text reads.
        """
        text = self.embed_next(inputs.next_ids, inputs.text_states, inputs.visual_summary)
        visual = inputs.visual_states
        if self.config.project_visual:
            visual = self.fc(torch.cat((torch.zeros_like(visual), visual), dim=-1))
        nothing = text.new_zeros((*inputs.position_ids.shape, text.shape[-1]))
        return put(put(nothing, inputs.text_positions, text), inputs.visual_positions, visual), inputs

    def embed_next(
        self, token_ids: Tensor, states: Tensor, visual_summary: Tensor | None = None, step: int = 0
    ) -> Tensor:
        """What enters the draft's layers for text tokens: `FC(e ⊕ h)` (paper, equation of HSR).

        Args:
            token_ids: `(B, n)` token after each text token; `(n,)` of one sequence, and then no B below.
            states: `(B, n, F·H)` the target's states of the text tokens, the F feature layers side by side (step 0),
                or `(B, n, H)` the draft's own outputs.
            visual_summary: `(B, n, H)` or `(B, 1, H)`, from the inputs that
                [`~SparrowDraftModel.embed_inputs`] returned.
            step: How many outputs of its own the draft has fed itself, these ones included.

        Returns:
            `(B, n, H)`.
        """
        if step == 0:
            states = self.fuse(states)
        states = self.read_states(states, visual_summary, step)
        return self.fc(torch.cat((self.embed(token_ids), states), dim=-1))

    @property
    def _latest_feature(self) -> int:
        """Which of the feature layers is the latest in the target."""
        layers = self.config.feature_layer_ids
        return layers.index(max(layers))

    def fuse(self, states: Tensor) -> Tensor:
        """`(…, H)` of the states of all feature layers, `(…, F·H)`."""
        if self.config.feature_norm:
            layers = states.unflatten(-1, (-1, self.config.hidden_size))
            exact = torch.promote_types(layers.dtype, torch.float32)
            lengths = torch.linalg.vector_norm(layers, dim=-1, keepdim=True, dtype=exact)
            latest = lengths[..., self._latest_feature, None, :]
            # Padding is all zeros.
            states = (layers * (latest / lengths.clamp(min=_SHORTEST)).to(layers.dtype)).flatten(-2)
        return self.feature_fc(states)

    def read_states(self, states: Tensor, visual_summary: Tensor | None, step: int) -> Tensor:
        """`(B, n, H)` states as FC reads them, arguments as in [`~SparrowDraftModel.embed_next`]: here as they are."""
        return states

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        is_causal: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Runs the draft's decoder layers.

        Args:
            inputs_embeds: `(B, R, H)` from [`~SparrowDraftModel.embed_inputs`] or [`~SparrowDraftModel.embed_next`].
            position_ids: `(B, R)` RoPE positions.
            attention_mask: `(B, 1, R, past + R)` additive mask, or `None` when every key is visible to every query.
            cache: Cache of the draft, extended in place.
            is_causal: Without a mask and with an empty cache, every position sees those up to itself (training: no
                R × R mask is ever built). Not understood by the eager attention.
            position_embeddings: What `rotary_emb` gives for the positions, if it is known; these may then be `None`.

        Returns:
            A [`~transformers.modeling_outputs.BaseModelOutputWithPast`]; its `last_hidden_state` `(B, R, H)` predicts
            the target's post-norm states.
        """
        if position_embeddings is None:
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = run_layer(
                layer, hidden_states, attention_mask, position_ids, cache, position_embeddings, is_causal
            )
        return DecoderOutput(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    # -- what it borrows ---------------------------------------------------------------------------------------------

    @classmethod
    def from_target(cls, target: PreTrainedModel, *, copy_last_layer: bool = False, **overrides: Any) -> Self:
        """A fresh draft for `target`, on its device, in its dtype, bound to it.

        Args:
            target: The video LLM to draft for.
            copy_last_layer: Start the draft's decoder layers and its norm from the target's last ones. `sparrow train`
                also fits FC to them (see `training/first_weights.py`), which is most of the gain.
            overrides: Fields of the draft's configuration.

        Raises:
            UnsupportedTargetError: The target's drafts could not be verified, or its last layers cannot be copied
                because they are not of the kind a draft has.
            DraftConfigError: An override is out of range, or the target has fewer layers than are to be copied.
        """
        from .targets import TargetView

        view = TargetView(target)
        config = cls.config_class.from_target_config(view.model.config, **overrides)
        with torch.device(view.device):
            draft = cls(config)
        draft = draft.to(dtype=view.dtype).eval()
        if copy_last_layer:
            if config.num_hidden_layers > len(view.layers):
                raise DraftConfigError(
                    f"the draft has {config.num_hidden_layers} layers to copy into, but the target has "
                    f"{len(view.layers)}: lower num_hidden_layers, or start at random"
                )
            for layer, source in zip(draft.layers, view.layers[-config.num_hidden_layers :], strict=True):
                _copy_weights(source, layer)
            weight = getattr(view.norm, "weight", None)
            # A norm without weights is one of ones, as a new draft's is.
            if config.output_norm and weight is not None:
                with torch.no_grad():
                    draft.norm.weight.copy_(weight)
        draft.bind(target)
        return draft

    def bind(self, target: PreTrainedModel) -> "TargetView":
        """Checks that this draft fits `target`, borrows its embedding and head, and installs the output hooks.

        Called by `generate()` on first use; calling it again with the same target costs nothing.

        Returns:
            The view of this very target, even if another thread binds the draft to another one meanwhile.

        Raises:
            TransformersContractError: The installed transformers lacks something that the package needs.
            BindingError: Another hidden size, vocabulary, layer count or set of placeholder ids.
            DraftConfigError: The draft's own, smaller vocabulary holds ids that cannot be drafted.
        """
        from .targets import bind

        check_contract()
        view = self._target
        if view is None or not view.is_view_of(target):
            if self.draft_to_target is not None:
                check_vocabulary(self.config, self.draft_to_target)
            view = bind(self.config, target)
            object.__setattr__(self, "_target", view)
        return view

    @property
    def target(self) -> "TargetView":
        """The target this draft is bound to.

        Raises:
            BindingError: It is not bound yet.
        """
        if self._target is None:
            raise BindingError("the draft is not bound to a target: call draft.bind(target), or generate once")
        return self._target

    def embed(self, token_ids: Tensor) -> Tensor:
        """`(B, R)` ids → `(B, R, H)` embeddings, the target's, in this draft's dtype and on its device."""
        return self.target.embedding(token_ids).to(self.fc.weight)

    def reduced_head(self) -> Callable[[Tensor], Tensor] | None:
        """The head of the draft's own, smaller vocabulary, cut out of the target's as it is now.

        Returns:
            `(…, H)` states → `(…, D)` logits, for one call or one training step; `None` for a draft that proposes the
            whole vocabulary.
        """
        return None if self.draft_to_target is None else self.target.reduced_head(self.draft_to_target)

    def compute_logits(
        self,
        hidden_states: Tensor,
        full_vocabulary: bool = False,
        reduced_head: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """`(…, H)` states → `(…, D)` logits of the target's head, placeholders excluded, in fp32.

        Args:
            hidden_states: Post-norm states, predicted or the target's own.
            full_vocabulary: All V tokens, also where the draft proposes only D of them (`draft_vocab_size`); the
                token of column i is then i, otherwise `draft_to_target[i]`.
            reduced_head: What [`~SparrowDraftModel.reduced_head`] returned, so that it is cut out once for many steps.
        """
        hidden_states = hidden_states.to(self.target.dtype)
        if not full_vocabulary and (reduced_head := reduced_head or self.reduced_head()) is not None:
            return reduced_head(hidden_states).float()
        # On several devices, a head that is tied to the embedding answers beside it.
        logits = self.target.head(hidden_states).to(hidden_states.device).float()
        # The target would read a drafted placeholder as visual input.
        return logits.index_fill_(-1, self._placeholders(logits), float("-inf"))

    def _placeholders(self, logits: Tensor) -> Tensor:
        """Placeholder ids that are columns of such logits, on their device; some lie behind the head's vocabulary."""
        size, device, token_ids = logits.shape[-1], logits.device, tuple(self.config.visual_token_ids or [])
        known, index = self._placeholder_index
        if known != (size, device, token_ids):
            # A tensor made in inference mode could not be used in training.
            with torch.inference_mode(False):
                index = torch.tensor([token for token in token_ids if token < size], dtype=torch.long, device=device)
            self._placeholder_index = (size, device, token_ids), index
        return index

    def set_vocabulary(self, token_ids: Tensor | Sequence[int]) -> None:
        """Lets the draft propose these tokens only; `config.draft_vocab_size` follows.

        On real targets the head takes most of a draft step, and its cost is proportional to the vocabulary.
        Verification always uses the target's whole vocabulary, so the output does not change.

        Args:
            token_ids: D ids of the target's vocabulary, a `(D,)` tensor or a list, ascending, without visual
                placeholders.

        Raises:
            DraftConfigError: The ids are none, not ascending, out of range, or hold a placeholder.
        """
        checked = check_vocabulary(self.config, token_ids)
        self.config.draft_vocab_size = len(checked)
        # A buffer made in inference mode could not be used in training.
        with torch.inference_mode(False):
            self.draft_to_target = checked.to(self.device, copy=True)

    @property
    def last_generation(self) -> "GenerationStats | None":
        """Statistics of the last `generate()` call of the calling thread that used this draft, while it runs too."""
        return getattr(self._thread, "stats", None)

    @last_generation.setter
    def last_generation(self, stats: "GenerationStats") -> None:
        self._thread.stats = stats


def _copy_weights(source: nn.Module, layer: nn.Module) -> None:
    """Copies a target's decoder layer into a draft's, which may lack the input norm."""
    weights, own = source.state_dict(), layer.state_dict()
    unlike = {name for name, tensor in own.items() if name not in weights or weights[name].shape != tensor.shape}
    unlike |= weights.keys() - own.keys() - {"input_layernorm.weight"}
    if unlike:
        raise UnsupportedTargetError(
            f"copy_last_layer: the target's {type(source).__name__} is no {type(layer).__name__}, which the draft has "
            f"({', '.join(sorted(unlike)[:4])}); leave copy_last_layer out"
        )
    layer.load_state_dict(weights, strict=False)
