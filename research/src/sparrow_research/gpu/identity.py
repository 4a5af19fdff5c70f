"""`identity`: the ids of plain `generate()`, exactly in fp32; how often rounding decides otherwise in bf16."""

import dataclasses
from typing import Any

import torch

from .calls import call
from .models import prompt
from .session import Part, Session

_LAYERS = 2


def identity(session: Session, part: Part) -> None:
    """A target of two layers of the same shapes; tf32 is off."""
    part.header["layers"] = _LAYERS
    sizes = dataclasses.replace(session.sizes, text=session.sizes.text | {"num_hidden_layers": _LAYERS})
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    static = {"cache_implementation": "static", "disable_compile": True}
    try:
        for dtype in (torch.float32, torch.bfloat16):
            # A target of its own: that of the other parts would not hold both.
            cut = Session(session.folder, session.device, dtype, sizes, session.deadline)
            for length in (sizes.lengths[0], sizes.lengths[1]):
                prompts = [prompt(cut.target, sizes, length, seed) for seed in range(sizes.identity_prompts)]
                plain = [call(cut, inputs, sizes.identity_tokens, None)[0] for inputs in prompts]
                for shape, options in (
                    ("chain-5", {}),
                    ("chain-10", {}),
                    ("48-5-10", {}),
                    ("chain-5", static),
                    (None, static),
                ):
                    names = {"dtype": str(dtype), "prompt": length, "shape": shape or "plain", "options": options}
                    with part.cell(**names):
                        _compare(cut, part, prompts, plain, names, shape, options)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _compare(
    session: Session,
    part: Part,
    prompts: list[dict[str, torch.Tensor]],
    plain: list[list[int]],
    names: dict[str, Any],
    shape: str | None,
    options: dict[str, Any],
) -> None:
    tokens = session.sizes.identity_tokens
    found = [call(session, inputs, tokens, shape, **options)[0] for inputs in prompts]
    firsts = [
        next((index for index, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other), None)
        for ids, others in zip(found, plain, strict=True)
    ]
    part.add(
        **names,
        prompts=len(prompts),
        identical=sum(first is None for first in firsts),
        first_differences=firsts,
        distinct_tokens=[len(set(ids)) for ids in plain],
    )
