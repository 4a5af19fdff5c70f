"""The draft's layers over the few tokens of a round: as they are, or in as few calls of PyTorch as they take.

Every call costs the host some microseconds, however few numbers it computes, and a decoder layer of transformers makes
74. It is a layer of Llama's kind, whose formula is known:

    a = x + o(attention(rotated q(norm(x)), rotated k(norm(x)), v(norm(x))))
    y = a + down(act(gate(norm(a))) · up(norm(a)))

If nothing was put between or in place of its modules, [`FewCalls`] computes this of their weights. Adapters, quantised
weights, hooks and other attention functions make a round run the modules: [`draft_forward`] looks at each call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import Cache

from .._transformers import DECODER_LAYERS, GROUPED_ATTENTION, LlamaRMSNorm, attention_of, is_stock_attention
from ..modeling_sparrow import SparrowDraftModel
from .grouped_attention import fold, grouped_attention

#: The modules of a layer whose formula is known, beside the activation. It may have norms of heads.
_LINEAR = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_OTHERS = {"", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}


class DraftForward:
    """The draft's layers and its norm, as they are, over tokens of one sequence."""

    def __init__(self, draft: SparrowDraftModel):
        self._draft = draft

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`(n, head_dim)` cosines and sines of `(n,)` positions, as a call of this forward takes them."""
        cos, sin = self._draft.rotary_emb(embeds, position_ids[None])
        return cos[0], sin[0]

    def __call__(self, embeds: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache) -> Tensor:
        """`(n, H)` outputs.

        Args:
            embeds: `(n, H)`.
            rotary: Rows of what [`~DraftForward.rotary`] gave; one row holds for all tokens.
            mask: `(1, 1, n, past + n)` additive, or `None` when every token sees every key.
            cache: Cache of the draft, extended in place.
        """
        cos, sin = rotary
        positions = cos[None], sin[None]
        return self._draft(embeds[None], None, mask, cache, position_embeddings=positions).last_hidden_state[0]


class FewCalls(DraftForward):
    """The same in few calls, for one call of `generate()`: weights are read when it is made."""

    @torch.no_grad()
    def __init__(self, draft: SparrowDraftModel):
        super().__init__(draft)
        self._layers = [_Layer(layer) for layer in draft.layers]
        self._norm = _Norm.of(draft.norm)

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # cos · (x1, x2) + sin · (−x2, x1): one call swaps the halves, so the sines have the sign.
        cos, sin = super().rotary(embeds, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat((-first, second), dim=-1)

    def __call__(self, embeds: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache) -> Tensor:
        if mask is not None:
            mask = fold(mask, self._layers[0].num_groups)
        for index, layer in enumerate(self._layers):
            embeds = layer(embeds, rotary, mask, cache, index)
        return self._norm(embeds)


def draft_forward(draft: SparrowDraftModel) -> DraftForward:
    """How a draft runs in this call."""
    return FewCalls(draft) if _has_known_formula(draft) else DraftForward(draft)


def _has_known_formula(draft: SparrowDraftModel) -> bool:
    is_on_sdpa = attention_of(draft.config) in ("sdpa", GROUPED_ATTENTION)
    return (
        is_on_sdpa
        and is_stock_attention(draft.layers, draft.config)
        and not draft.training
        and not torch.is_autocast_enabled(draft.device.type)
        and type(draft).forward is SparrowDraftModel.forward
        and type(draft.norm) in (LlamaRMSNorm, nn.Identity)
        and all(map(_does_what_its_class_does, (draft, draft.norm)))
        and all(map(_is_known, draft.layers))
    )


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer is transformers' own, with the modules it was made of and no others."""
    modules = dict(layer.named_modules())
    linear = {name for name, module in modules.items() if type(module) is nn.Linear}
    others = {name for name, module in modules.items() if type(module).__module__ == type(layer).__module__}
    if type(modules.get("input_layernorm")) is nn.Identity:
        others.add("input_layernorm")
    return (
        type(layer) in DECODER_LAYERS.values()
        and (linear, others - _HEAD_NORMS) == (_LINEAR, _OTHERS)
        and modules.keys() == linear | others | {"mlp.act_fn"}
        and all(map(_does_what_its_class_does, modules.values()))
    )


def _does_what_its_class_does(module: nn.Module) -> bool:
    """Whether a module has no hooks, no other forward, and no tensors of a special kind."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and all(type(each.data) is Tensor for each in module.parameters(recurse=False))
    )


class _Layer:
    """The weights of a decoder layer, transposed; those of queries, keys and values side by side."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = _Norm.of(layer.input_layernorm), _Norm.of(layer.post_attention_layernorm)
        self.scaling = attention.scaling
        self.head_dim = attention.head_dim
        self.num_groups = attention.num_key_value_groups
        num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.num_heads = num_kv_heads * self.num_groups, num_kv_heads
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        bias = None if attention.q_proj.bias is None else torch.cat([each.bias for each in projections])
        self.qkv = torch.cat([each.weight for each in projections]).t(), bias
        others = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.output, self.gate, self.up, self.down = ((each.weight.t(), each.bias) for each in others)
        self.activation = mlp.act_fn
        self.head_norm: Callable[[Tensor], Tensor] = _as_it_is
        if hasattr(attention, "q_norm"):
            of_heads = attention.q_norm.weight, attention.k_norm.weight
            weights = [weight.expand(count, 1, -1) for weight, count in zip(of_heads, self.num_heads, strict=True)]
            self.head_norm = _Norm(torch.cat(weights), attention.q_norm.variance_epsilon)

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache, index: int
    ) -> Tensor:
        (cos, sin), (heads, kv_heads) = rotary, self.num_heads
        qkv = _linear(self.norms[0](x), *self.qkv)
        # (1, heads, n, head_dim), the heads of queries, keys and values one after the other
        qkv = qkv.view(1, len(x), -1, self.head_dim).transpose(1, 2)
        queries_keys, values = qkv.split((heads + kv_heads, kv_heads), dim=1)
        queries_keys = self.head_norm(queries_keys)
        turned = torch.addcmul(queries_keys * cos, queries_keys.roll(self.head_dim // 2, -1), sin)
        queries, keys = turned.split((heads, kv_heads), dim=1)
        keys, values = cache.update(keys, values, index)
        seen = grouped_attention(queries, keys, values, mask, self.scaling)
        x = _linear(seen.view(len(x), -1), *self.output, added=x)
        normed = self.norms[1](x)
        return _linear(self.activation(_linear(normed, *self.gate)) * _linear(normed, *self.up), *self.down, added=x)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
    """`rows · weight + bias + added`, without what is `None`."""
    if bias is not None:
        added = bias if added is None else added + bias
    return rows.mm(weight) if added is None else torch.addmm(added, rows, weight)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


class _Norm:
    """`x · w / √(mean x² + ε)` over the last dimension.

    Args:
        weight: `(n,)`, or `(heads, 1, n)` for states of `(1, heads, rows, n)`.
    """

    def __init__(self, weight: Tensor, epsilon: float):
        size = weight.shape[-1]
        self._weight, self._epsilon = weight, epsilon
        # √(mean x² + ε) is hypot(|x|, √(n·ε)) / √n.
        self._scaled_weight = self._weight.to(torch.promote_types(weight.dtype, torch.float32)) * size**0.5
        self._offset = torch.tensor((size * epsilon) ** 0.5)

    @classmethod
    def of(cls, norm: Any) -> Callable[[Tensor], Tensor]:
        return _as_it_is if isinstance(norm, nn.Identity) else cls(norm.weight, norm.variance_epsilon)

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.is_cuda and self._weight.ndim == 1:
            return rms_norm(rows, self._weight.shape, self._weight, self._epsilon)
        # On other devices that would be six calls.
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=self._scaled_weight.dtype)
        return (rows / torch.hypot(length, self._offset) * self._scaled_weight).to(rows.dtype)
