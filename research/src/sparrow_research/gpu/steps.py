"""`steps`: the target's forward over the rows of one verification, by how the cache is kept and attended to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from sparrow_hf._transformers import CACHE, drop_newest

from .attending import fold_mask
from .calls import attention_of
from .session import Part, Session
from .timing import captured, milliseconds, peak_gigabytes

#: Rows of a static cache behind the prompt.
_SPARE = 64


def steps(session: Session, part: Part) -> None:
    """The longest prompts last; of every length first what a plain step and a chain of five cost."""
    _, middle, long, longest = session.sizes.lengths
    for length in (middle, longest, session.sizes.lengths[0], long):
        for name, forwards in _WAYS.items():
            if name.endswith("graph") and not session.on_cuda:
                part.header["needs"] = "CUDA for the ways that end in 'graph'"
                continue
            with part.cell(prompt=length, way=name):
                forwards(session, part, length, name)


def _dynamic(session: Session, part: Part, length: int, name: str) -> None:
    cache = _filled(session, length, DynamicCache(config=session.target.config.get_text_config()))
    for rows in session.sizes.rows:
        forward = _forward(session, cache, length, rows, total=length + rows)

        def step(forward: Callable[[], Tensor] = forward, rows: int = rows) -> None:
            forward()
            drop_newest(cache, rows)

        _add(session, part, length, name, rows, step)


def _static(session: Session, part: Part, length: int, name: str) -> None:
    total = -(-(length + _SPARE) // 64) * 64
    cache = _filled(session, length, StaticCache(config=session.target.config.get_text_config(), max_cache_len=total))
    for rows in session.sizes.rows:
        forward = _forward(session, cache, length, rows, total)

        def step(forward: Callable[[], Tensor] = forward, rows: int = rows) -> Tensor:
            output = forward()
            for layer in cache.layers:
                layer.cumulative_length.sub_(rows)
            return output

        if name.endswith("graph"):
            graph, _ = captured(step)
            _add(session, part, length, name, rows, graph.replay)
            del graph
        elif rows in (1, 6, 11):
            _add(session, part, length, name, rows, step)


def _folded(forwards: Callable[[Session, Part, int, str], None]) -> Callable[[Session, Part, int, str], None]:
    def measured(session: Session, part: Part, length: int, name: str) -> None:
        with attention_of(session.target, "folded"):
            forwards(session, part, length, name)

    return measured


_WAYS: dict[str, Callable[[Session, Part, int, str], None]] = {
    "dynamic, sdpa": _dynamic,
    "dynamic, folded": _folded(_dynamic),
    "static, sdpa": _static,
    "static, sdpa, graph": _static,
    "static, folded, graph": _folded(_static),
}


def _filled(session: Session, length: int, cache: Any) -> Any:
    """The cache of a prompt with random keys and values."""
    text = session.target.config.get_text_config()
    shape = (1, text.num_key_value_heads, length, text.hidden_size // text.num_attention_heads)
    for layer in range(text.num_hidden_layers):
        states = [torch.randn(shape, dtype=session.dtype, device=session.device) for _ in range(2)]
        cache.update(*states, layer)
    return cache


def _forward(session: Session, cache: Any, length: int, rows: int, total: int) -> Callable[[], Tensor]:
    """Decoder and head over `rows` rows, each of which sees the prompt, those before it and itself."""
    target, device = session.target, session.device
    text = target.config.get_text_config()
    is_folded = text._attn_implementation == "folded"
    embeds = torch.randn((1, rows, session.sizes.text["hidden_size"]), dtype=session.dtype, device=device)
    positions = (length + torch.arange(rows, device=device)).expand(4, 1, rows)
    mask = None
    if rows > 1 or total > length + rows:
        # A row's last key is itself.
        hidden = torch.arange(total, device=device) > (length + torch.arange(rows, device=device))[:, None]
        lowest = torch.finfo(session.dtype).min
        mask = torch.zeros((1, 1, rows, total), dtype=session.dtype, device=device).masked_fill_(hidden, lowest)
        if is_folded:
            mask = fold_mask(mask, text.num_attention_heads, text.num_key_value_heads)

    def forward() -> Tensor:
        outputs = target.get_decoder()(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            use_cache=True,
            **{CACHE: cache},
        )
        return target.get_output_embeddings()(outputs.last_hidden_state)

    return forward


def _add(session: Session, part: Part, length: int, way: str, rows: int, step: Callable[[], Any]) -> None:
    times = milliseconds(step, session.device, session.sizes.repeats)
    part.add(prompt=length, way=way, rows=rows, **times, peak_gb=peak_gigabytes(step, session.device))
