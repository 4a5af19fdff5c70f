"""Attention from chosen positions, without a matrix over all positions (paper, figures 2 and 5).

The queries and keys of a layer are computed once more from the input of its attention module, seen by a hook, so any
attention implementation will do (sdpa and FlashAttention never have the scores). Only chosen queries are taken, a
bounded number of scores at a time: nothing grows with the square of the length.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedTargetError
from ..targets import TargetView
from .answered import AnsweredPrompt

#: Attention scores held at a time, over all heads: 64 MB in fp32.
MAX_SCORES = 2**24

#: How far, relative to its length, the output of a layer's attention may be from what its probabilities give (bf16).
MAX_DEVIATION = 0.05
#: About how many rows of a layer are checked.
CHECKED_ROWS = 16


def attention_rows(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention probabilities of some positions of one layer, a few positions at a time.

    Args:
        attention: The layer's attention module.
        hidden_states: `(1, L, H)` its input.
        position_embeddings: Cosines and sines, `(1, L, head size)` each, that it was called with.
        rows: `(n,)` the queries wanted, ascending.

    Yields:
        `(c,)` rows and their probabilities `(heads, c, L)` in fp32, over all earlier rows and themselves.
    """
    rotate = inspect.getmodule(type(attention)).apply_rotary_pos_emb  # type: ignore[union-attr]
    cos, sin = position_embeddings

    def project(kind: str, chosen: Tensor | slice) -> Tensor:
        states = getattr(attention, f"{kind}_proj")(hidden_states[:, chosen])
        states = states.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, f"{kind}_norm"):
            states = getattr(attention, f"{kind}_norm")(states)
        states = states.transpose(1, 2)
        return rotate(states, states, cos[:, chosen], sin[:, chosen])[0][0]

    keys = project("k", slice(None))  # (KV heads, L, head size)
    num_heads = attention.q_proj.out_features // attention.head_dim
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    for chunk in rows.to(hidden_states.device).split(max(1, MAX_SCORES // (num_heads * len(positions)))):
        # The heads of one KV head share one product, so keys are never repeated.
        queries = project("q", chunk).reshape(len(keys), -1, attention.head_dim)
        scores = (queries @ keys.transpose(1, 2)).float() * attention.scaling
        scores = scores.view(num_heads, len(chunk), len(positions))
        yield chunk, scores.masked_fill_(positions > chunk[:, None], float("-inf")).softmax(dim=-1)


@contextmanager
def watching_attention(
    view: TargetView, watch: Callable[[int, Iterator[tuple[Tensor, Tensor]]], None], rows: Tensor
) -> Iterator[None]:
    """In this context, `watch(layer index, attention_rows(...))` is called for every layer of every forward.

    Args:
        rows: `(n,)` the queries wanted, ascending.

    Raises:
        UnsupportedTargetError: The target's attention is not computed as [`attention_rows`] computes it.
    """

    def hook(layer: int) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            inputs = kwargs["hidden_states"], kwargs["position_embeddings"]
            if not _gives(module, *inputs, rows, output[0]):
                raise _unsupported(view, "attend in a way that is unknown here")
            watch(layer, attention_rows(module, *inputs, rows))

        return after

    handles = []
    try:
        for index, module in enumerate(attention_modules(view)):
            handles.append(module.register_forward_hook(hook(index), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_modules(view: TargetView) -> list[Any]:
    """The attention module of every layer.

    Raises:
        UnsupportedTargetError: A layer is not of full attention, or has no `self_attn` with separate projections, or
            its module has no `apply_rotary_pos_emb` (Llama 4 has one of complex numbers).
    """
    if others := sorted(set(view.layer_kinds) - {"full_attention"}):
        raise _unsupported(view, f"are of the kind {', '.join(others)}")
    modules = [getattr(layer, "self_attn", None) for layer in view.layers]
    if not all(hasattr(module, f"{name}_proj") for module in modules for name in "qkvo"):
        raise _unsupported(view, "have no self_attn with q_proj, k_proj, v_proj and o_proj")
    if not all(hasattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb") for module in modules):
        raise _unsupported(view, "rotate queries and keys in a way that is unknown here")
    return modules


def _gives(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: Tensor, output: Tensor
) -> bool:
    """Whether the probabilities of some of the rows give the `(1, L, H)` output that the layer's attention gave."""
    checked = rows[:: max(1, len(rows) // CHECKED_ROWS)].to(hidden_states.device)
    with torch.no_grad():
        values = attention.v_proj(hidden_states)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        try:
            for chunk, probabilities in attention_rows(attention, hidden_states, position_embeddings, checked):
                # The heads of one KV head beside each other: (KV heads, group · c, L) @ (KV heads, L, head size)
                shared = probabilities.to(values.dtype).reshape(len(values), -1, values.shape[1]) @ values
                mixed = shared.reshape(-1, len(chunk), attention.head_dim).transpose(0, 1).flatten(1)
                given, expected = attention.o_proj(mixed).float(), output[0, chunk].float()
                if not (given - expected).norm() <= MAX_DEVIATION * expected.norm():
                    return False
        except (TypeError, RuntimeError) as error:
            # Heads of another shape, or RoPE with other arguments.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
    return True


def _unsupported(view: TargetView, why: str) -> UnsupportedTargetError:
    return UnsupportedTargetError(
        f"the layers of {type(view.model).__name__} {why}: their attention cannot be analysed"
    )


class AttentionMass:
    """Where the last instruction token and the answer attend to, collected over one forward.

    Attributes:
        mass: Query (`"last_instruction"`, or `"answer"`: the mean over its positions) → `(layers, heads, 3)` attention
            to each of [`~sparrow_hf.analysis.answered.GROUPS`]; sums to one.
        visual_scores: `"last_instruction"` or `"all_text"` → `(V,)` attention that each visual position receives from
            the last instruction token, or from all text positions of the prompt on average; mean over layers and
            heads.
    """

    def __init__(self, view: TargetView, answered: AnsweredPrompt):
        self._view, self._answered = view, answered
        layers, heads = len(view.layers), view.text_config.num_attention_heads
        visual = int(answered.is_visual.sum())
        self.mass = {query: torch.zeros((layers, heads, 3)) for query in ("last_instruction", "answer")}
        self.visual_scores = {query: torch.zeros(visual) for query in ("last_instruction", "all_text")}

    @contextmanager
    def gathering(self) -> Iterator["AttentionMass"]:
        """Run one forward over prompt and answer in this context."""
        text_rows = (~self._answered.is_visual).nonzero().squeeze(-1)
        with watching_attention(self._view, self._add, text_rows):
            yield self

    def _add(self, layer: int, chunks: Iterator[tuple[Tensor, Tensor]]) -> None:
        answered, layers = self._answered, len(self._view.layers)
        num_text_rows = answered.prompt_length - len(self.visual_scores["all_text"])
        for rows, probabilities in chunks:
            device = probabilities.device
            masses = (probabilities @ answered.groups.to(device, torch.float32)).cpu()  # (heads, c, 3)
            received = probabilities[..., answered.is_visual.to(device)].mean(0).cpu()  # (c, V)
            rows = rows.cpu()
            last, is_answer = rows == answered.last_instruction_row, rows >= answered.prompt_length
            self.mass["last_instruction"][layer] += masses[:, last].sum(1)
            self.mass["answer"][layer] += masses[:, is_answer].sum(1) / len(answered.answer_ids)
            self.visual_scores["last_instruction"] += received[last].sum(0) / layers
            self.visual_scores["all_text"] += received[~is_answer].sum(0) / (layers * num_text_rows)
