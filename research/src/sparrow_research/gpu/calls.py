"""Whole calls of `generate()`, timed from the end of the target's prefill."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparrow_hf._transformers import replaced_prefill

from .planting import planted
from .session import Part, Session
from .timing import spread, synchronize

#: A cache of fixed size: transformers compiles plain decoding with it on CUDA by itself, or runs it as it is.
COMPILED: dict[str, Any] = {"cache_implementation": "static"}
NOT_COMPILED: dict[str, Any] = COMPILED | {"disable_compile": True}


class Call(NamedTuple):
    """New ids, seconds after the prefill, and target forwards in them."""

    ids: list[int]
    seconds: float
    rounds: int

    @property
    def tau(self) -> float:
        """Tokens per forward."""
        return (len(self.ids) - 1) / self.rounds


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Plain `generate()` runs without the hooks that a bound draft has put on the target."""
    hooked = {module: dict(module._forward_hooks) for module in model.modules() if module._forward_hooks}
    for module in hooked:
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, hooks in hooked.items():
            module._forward_hooks.update(hooks)


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """The model's decoder attends by the function of this name."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def call(session: Session, inputs: dict[str, Tensor], new_tokens: int, shape: str | None, **options: Any) -> Call:
    """One call of `generate()`.

    Args:
        shape: Of the draft's trees; `None`: plain decoding.
        options: Of `generate()`; and `attention`, the target's function for this call (`attending.py`).
    """
    target, device = session.target, session.device
    started = 0.0

    def timed(compute: Callable[[], Any], model_kwargs: dict[str, Any]) -> Any:
        nonlocal started
        outputs = compute()
        synchronize(device)
        started = time.perf_counter()
        return outputs

    if shape is not None:
        session.draft.config.set_tree_shape(shape)
        options["assistant_model"] = session.draft
    attention = attention_of(target, options.pop("attention", "sdpa"))
    with attention, replaced_prefill(target, timed), without_hooks(target) if shape is None else nullcontext():
        ids = target.generate(**inputs, **options, max_new_tokens=new_tokens)
    synchronize(device)
    seconds = time.perf_counter() - started
    rounds = new_tokens - 1
    if shape is not None:
        stats = session.draft.last_generation
        assert stats is not None
        rounds = stats.rounds
    return Call(ids[0, inputs["input_ids"].shape[1] :].tolist(), seconds, rounds)


def forget_lengths(session: Session) -> None:
    """The next static cache is as long as its call needs, and not as the longest one of the calls before."""
    session.target._previous_max_cache_length = -1


def measure_arm(
    session: Session, part: Part, inputs: dict[str, Tensor], shape: str | None, repeats: int, **options: Any
) -> dict[str, Any]:
    """A row on one way to decode one prompt.

    In the first call every length of the cache is new to the libraries, and it compiles where that is asked for. A
    round's time is what a later call of many tokens takes beyond one of few, over the rounds that it has more: what
    happens once in a call (the draft's prefill, recording of graphs) is not in it. Last, with a draft, a token's time
    with planted drafts, taken in the same way.
    """
    sizes = session.sizes

    def few_and_many() -> tuple[Call, Call]:
        few = call(session, inputs, sizes.few_tokens, shape, **options)
        return few, call(session, inputs, sizes.many_tokens, shape, **options)

    forget_lengths(session)
    first = call(session, inputs, sizes.many_tokens, shape, **options)
    pairs = [few_and_many() for _ in range(repeats)]
    times = [1000 * (many.seconds - few.seconds) / max(many.rounds - few.rounds, 1) for few, many in pairs]
    row: dict[str, Any] = {f"round_{name}": value for name, value in spread(times).items()}
    later = pairs[-1][1].seconds
    row |= {"tau": first.tau, "call_seconds": later, "first_call_extra_seconds": first.seconds - later}
    if shape is not None:
        try:
            with planted(first.ids, sizes.text["vocab_size"]):
                few, many = few_and_many()
            further = len(many.ids) - len(few.ids)
            row["planted_tau"] = further / max(many.rounds - few.rounds, 1)
            row["planted_token_ms"] = 1000 * (many.seconds - few.seconds) / further
        except Exception as error:
            # What was measured without is worth keeping.
            row["planted_error"] = f"{type(error).__name__}: {error}"[:500]
    length = inputs["input_ids"].shape[1]
    return part.add(prompt=length, arm=arm_name(shape, options), **row, ids=first.ids)


def arm_name(shape: str | None, options: dict[str, Any]) -> str:
    """The way to decode in words."""
    cache = options.get("cache_implementation", "dynamic")
    if cache == "static":
        cache += ", not compiled" if options.get("disable_compile") else ", compiled"
    return ", ".join((shape or "plain", cache, *filter(None, [options.get("attention")])))


def first_difference(ids: list[int], others: list[int]) -> int | None:
    """Index of the first id that is another; `None`: all are the same."""
    pairs = enumerate(zip(ids, others, strict=True))
    return next((index for index, (one, other) in pairs if one != other), None)
