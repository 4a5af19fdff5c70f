"""`draft`: whole chains, as the product proposes them and as one CUDA graph of the same kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from sparrow_hf import SparrowCandidateGenerator
from sparrow_hf._transformers import drop_newest

from .models import prompt
from .session import Part, Session
from .timing import captured, kernels, milliseconds

_CHAINS = (5, 7, 10, 14)


def drafting(session: Session, part: Part) -> None:
    """The whole vocabulary and a part of it; of each the chains, then one level (their difference by level)."""
    draft, sizes = session.draft, session.sizes
    inputs = prompt(session.target, sizes, sizes.lengths[1])
    whole = draft.config.draft_vocab_size
    assert whole is None
    for size in (None, sizes.reduced_vocabulary):
        try:
            if size is not None:
                draft.set_vocabulary(torch.arange(size))
            for levels in _CHAINS:
                with part.cell(vocabulary=size, levels=levels):
                    _chain(session, part, inputs, levels, size)
        finally:
            draft.config.draft_vocab_size, draft.draft_to_target = None, None
    if not session.on_cuda:
        part.header["needs"] = "CUDA for the ways in one graph"


def _chain(session: Session, part: Part, inputs: dict[str, Tensor], levels: int, vocabulary: int | None) -> None:
    draft = session.draft
    draft.config.set_tree_shape(f"chain-{levels}")
    generator = SparrowCandidateGenerator(draft, inputs["input_ids"])
    hidden_size = session.sizes.text["hidden_size"]
    states = {
        layer: torch.randn((1, len(positions), hidden_size), dtype=session.dtype, device=session.device)
        for layer, positions in generator.layers_to_collect.items()
    }
    generator.prefill(states, first_token=1)
    context = generator.cache.get_seq_length()

    def add(way: str, chain: Callable[[], Any]) -> None:
        times = milliseconds(chain, session.device, session.sizes.repeats)
        found = kernels(chain, session.device)
        part.add(
            vocabulary=vocabulary or session.sizes.text["vocab_size"],
            levels=levels,
            way=way,
            context=context,
            **times,
            level_ms=times["ms"] / levels,
            kernels=None if found is None else sum(kernel["count"] for kernel in found.values()),
            device_ms=None if found is None else sum(kernel["us"] for kernel in found.values()) / 1000,
        )

    add("product", lambda: generator.propose(levels))
    features = torch.randn(
        (1, 6, hidden_size * len(draft.config.feature_layer_ids)), dtype=session.dtype, device=session.device
    )
    position, cache = generator.next_position_id, generator.cache

    def extend() -> None:
        generator.extend(features, [1, 2, 3, 4, 5, 6])
        drop_newest(cache, 6)
        generator.next_position_id = position

    if levels == _CHAINS[0]:
        add("product, extend by 6", extend)
        generator.prefill(states, first_token=1)
    chain = _static_chain(session, generator, levels)
    add("static, greedy", chain)
    if session.on_cuda:
        graph, _ = captured(chain)
        add("static, greedy, graph", graph.replay)


def _static_chain(session: Session, generator: SparrowCandidateGenerator, levels: int) -> Callable[[], Tensor]:
    """The chain of the most probable tokens over a cache of fixed size, whose rows are then free again.

    level    0      1      2          the first is read off the state after the committed text
    keys     text   text n0   text n0 n1
    """
    draft = session.draft
    text, dtype, device = generator.cache.get_seq_length(), session.dtype, session.device
    total = -(-(text + levels) // 64) * 64
    cache = StaticCache(config=draft.config, max_cache_len=total)
    for index, layer in enumerate(generator.cache.layers[: len(draft.layers)]):
        cache.update(layer.keys[:, :, :text], layer.values[:, :, :text], index)
    hidden = torch.arange(total, device=device) > text + torch.arange(levels, device=device)[:, None]
    masks = torch.zeros((levels, total), dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
    positions = generator.next_position_id + torch.arange(levels, device=device)
    head, to_target = draft.reduced_head(), draft.draft_to_target
    assert generator.hidden is not None
    start = generator.hidden[None]

    def chain() -> Tensor:
        state, tokens = start, []
        for level in range(levels):
            token = draft.compute_logits(state, reduced_head=head).argmax(-1)
            if to_target is not None:
                token = to_target[token]
            tokens.append(token)
            if level < levels - 1:
                embeds = draft.embed_next(token, state, step=level + 1)
                mask = masks[level][None, None, None]
                state = draft(embeds, positions[level].view(1, 1), mask, cache).last_hidden_state
        for layer in cache.layers:
            layer.cumulative_length.sub_(levels - 1)
        return torch.cat(tokens, dim=1)

    return chain
