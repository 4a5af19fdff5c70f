"""`identity`: the ids of plain `generate()`, exactly in fp32; how often rounding decides otherwise in bf16."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .calls import NOT_COMPILED, call, first_difference, forget_lengths
from .models import prompt
from .planting import planted
from .session import Part, Session

_LAYERS = 2
_STATIC = ("chain-5", NOT_COMPILED)
#: Dtype → shape and options of the calls that are compared with plain decoding.
_ARMS: dict[torch.dtype, list[tuple[str | None, dict[str, Any]]]] = {
    torch.float32: [("chain-5", {}), _STATIC, ("48-5-10", {}), ("48-5-10", NOT_COMPILED), (None, NOT_COMPILED)],
    torch.bfloat16: [("chain-5", {}), _STATIC, (None, NOT_COMPILED)],
}


def identity(session: Session, part: Part) -> None:
    """A target of two layers of the same shapes. Drafts are planted, so that some are accepted; tf32 is off."""
    part.header["layers"] = _LAYERS
    sizes = dataclasses.replace(session.sizes, text=session.sizes.text | {"num_hidden_layers": _LAYERS})
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for dtype, arms in _ARMS.items():
            cut = Session(session.folder, session.device, dtype, sizes, session.deadline)
            for length in sizes.lengths[:2]:
                prompts = [prompt(cut.target, sizes, length, seed) for seed in range(sizes.identity_prompts)]
                plain = [call(cut, inputs, sizes.identity_tokens, None).ids for inputs in prompts]
                for shape, options in arms:
                    names = {"dtype": str(dtype), "prompt": length, "shape": shape or "plain", "options": options}
                    with part.cell(**names):
                        part.add(**names, **_compared(cut, prompts, plain, shape, options))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _compared(
    session: Session,
    prompts: list[dict[str, Tensor]],
    plain: list[list[int]],
    shape: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    sizes = session.sizes
    forget_lengths(session)
    differences, taus = [], []
    for inputs, ids in zip(prompts, plain, strict=True):
        with planted(ids, sizes.text["vocab_size"]):
            found = call(session, inputs, sizes.identity_tokens, shape, **options)
        differences.append(first_difference(found.ids, ids))
        taus.append(found.tau)
    return {
        "prompts": len(prompts),
        "identical": sum(difference is None for difference in differences),
        "first_differences": differences,
        "tau": taus,
        "distinct_tokens": [len(set(ids)) for ids in plain],
    }
