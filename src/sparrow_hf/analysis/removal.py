"""Which layers of the target need its visual tokens (paper, figures 3 and 5): they are hidden from layer x on.

Positions that no other attends to have no effect. So from layer x on attention runs over the text positions alone,
with their own RoPE positions. This is exact, works with any attention implementation, and needs no mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.prepare import to_target
from ..targets import TargetView
from .answered import AnsweredPrompt, ProcessedPrompt, greedy
from .attention import attention_modules


@contextmanager
def hidden_visual_rows(view: TargetView, is_visual: Tensor, from_layer: int) -> Iterator[None]:
    """In this context, layers `from_layer`, `from_layer` + 1, … (0-based) attend to no visual position of the prompt.

    `from_layer` is the number of layers that still attend to them: the depth changes nothing, and 0 removes the visual
    input; text keeps its positions. Forwards with a cache work too: the first one holds the whole prompt.

    Args:
        view: The target.
        is_visual: `(L,)` bool: the visual ones among the positions of the first forward.
        from_layer: The first layer that attends to text only, 0 … depth.
    """
    text = (~is_visual).nonzero().squeeze(-1)
    is_prefill = False

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal is_prefill
        kwargs = dict(kwargs)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        is_prefill = kwargs["hidden_states"].shape[1] == len(is_visual)
        if is_prefill:
            kept = text.to(kwargs["hidden_states"].device)
            kwargs["hidden_states"] = kwargs["hidden_states"][:, kept]
            kwargs["position_embeddings"] = tuple(part[:, kept] for part in kwargs["position_embeddings"])
            if mask is not None:
                kwargs["attention_mask"] = mask[..., kept, :][..., kept]
            if positions is not None:
                # Only FlashAttention looks at these, and it would take a gap for the border of two packed sequences.
                kwargs["position_ids"] = positions[..., : len(text)]
        elif mask is not None and from_layer > 0:
            # keys of this layer     text rows of the prompt | later rows
            # columns of the mask    all rows of the prompt  | later rows      (as long as layer 0's cache)
            later = torch.arange(len(is_visual), mask.shape[-1], device=mask.device)
            kwargs["attention_mask"] = mask[..., torch.cat((text.to(mask.device), later))]
        return args, kwargs

    def after(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not is_prefill:
            return output
        attended = output[0].new_zeros((1, len(is_visual), output[0].shape[-1]))
        attended[:, text.to(attended.device)] = output[0]
        return attended, *output[1:]

    handles = []
    try:
        for module in attention_modules(view)[from_layer:]:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_grid(depth: int, points: int = 9) -> list[int]:
    """About `points` values of x, evenly spaced from 0 to the depth, both included."""
    return sorted({round(index * depth / (points - 1)) for index in range(points)})


@torch.no_grad()
def predicted_tokens(view: TargetView, answered: AnsweredPrompt) -> Tensor:
    """`(A,)` most probable token of the target at every position of the answer, given all before it."""
    outputs = view.model(**answered.inputs, use_cache=False, logits_to_keep=len(answered.answer_ids) + 1)
    return outputs.logits[0, :-1].argmax(dim=-1)


def agreement(view: TargetView, answered: AnsweredPrompt, expected: Tensor, layers: Sequence[int]) -> dict[int, int]:
    """x → tokens of the answer that the target predicts as before when visual tokens are hidden from layer x on.

    Teacher-forced: every token is predicted after the answer that the target wrote with visual tokens.

    Args:
        expected: `(A,)` what it predicts with all visual tokens, see [`predicted_tokens`].
        layers: The values of x.
    """
    agreed = {}
    for layer in layers:
        with hidden_visual_rows(view, answered.is_visual, layer):
            agreed[layer] = int((predicted_tokens(view, answered) == expected).sum())
    return agreed


def scores(
    view: TargetView,
    answered: AnsweredPrompt,
    layers: Sequence[int],
    max_new_tokens: int,
    score: Callable[[list[int], ProcessedPrompt], float],
) -> dict[int, float]:
    """x → score of the answer that the target writes freely when visual tokens are hidden from layer x on.

    Args:
        score: Judges the ids of an answer, with the prompt's `reference` at hand.
    """
    inputs = to_target(answered.prompt.inputs, view.model)
    found = {}
    for layer in layers:
        with hidden_visual_rows(view, answered.is_visual[: answered.prompt_length], layer):
            output = greedy(view.model, inputs, max_new_tokens, answered.prompt.tokenizer)
        found[layer] = score(output[0, answered.prompt_length :].tolist(), answered.prompt)
    return found
