"""Positions of the text after a video, where transformers since 5.3 has others than vLLM and the models' own code."""

from typing import Any

import torch
from torch import Tensor

from .models import unwrap

#: `model_type` of the targets that this is so for.
OTHER_POSITIONS_IN_VLLM = frozenset({"qwen2_vl", "qwen2_5_vl"})
_METHOD = "get_rope_index"


def use_vllm_positions(target: Any) -> None:
    """Lets a target of [`OTHER_POSITIONS_IN_VLLM`] number the text after a video from the largest of time, height and
    width, in everything that it does from now on. transformers takes the larger of height and width."""
    model = unwrap(target).model
    own = getattr(model, _METHOD)

    def get_rope_index(
        input_ids: Tensor, mm_token_type_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        positions, deltas = own(input_ids, mm_token_type_ids, *args, attention_mask=attention_mask, **kwargs)
        for row, kinds in enumerate(mm_token_type_ids):
            real = torch.ones_like(kinds).bool() if attention_mask is None else attention_mask[row].bool()
            kinds, numbers = kinds[real], positions[:, row, real]
            # kinds    0 0 2 2 2 2 0 0 …      text, or one visual token after the other
            # behind               ↑          what follows moves on by as much as this one
            for behind in ((kinds[1:] != kinds[:-1]) & (kinds[:-1] != 0)).nonzero().flatten() + 1:
                numbers[:, behind:] += numbers[:, :behind].max() + 1 - numbers[0, behind]
            positions[:, row, real] = numbers
            deltas[row] = numbers.max() + 1 - len(kinds)
        return positions, deltas

    setattr(model, _METHOD, get_rope_index)


def uses_vllm_positions(target: Any) -> bool:
    """Whether [`use_vllm_positions`] was called on a target."""
    return _METHOD in vars(getattr(unwrap(target), "model", target))
