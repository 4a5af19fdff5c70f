"""Whole calls of `generate()`, timed from the end of the target's prefill."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparrow_hf._transformers import replaced_prefill

from .session import Part, Session
from .timing import synchronize

#: Tokens of a round that a trained draft of five levels gave on this project's own targets: what ratios are projected
#: for, since the draft here is random.
PROJECTED_TAU = 5.4

Call = tuple[list[int], float, int]


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


def call(session: Session, inputs: dict[str, Tensor], new_tokens: int, shape: str | None, **options: Any) -> Call:
    """One call of `generate()`.

    Args:
        shape: Of the draft's trees; `None`: plain decoding.

    Returns:
        The new ids, seconds after the prefill, and target forwards in them.
    """
    target, device = session.target, session.device
    # A static cache is otherwise as long as the longest one of the calls before.
    target._previous_max_cache_length = -1
    started = 0.0

    def timed(compute: Callable[[], Any], model_kwargs: dict[str, Any]) -> Any:
        nonlocal started
        outputs = compute()
        synchronize(device)
        started = time.perf_counter()
        return outputs

    options |= {"max_new_tokens": new_tokens, "min_new_tokens": None}
    if shape is None:
        with without_hooks(target), replaced_prefill(target, timed):
            ids = target.generate(**inputs, **options)
        rounds = new_tokens - 1
    else:
        session.draft.config.set_tree_shape(shape)
        with replaced_prefill(target, timed):
            ids = target.generate(**inputs, **options, assistant_model=session.draft)
        stats = session.draft.last_generation
        assert stats is not None
        rounds = stats.rounds
    synchronize(device)
    taken = time.perf_counter() - started
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), taken, rounds


def measure_arm(
    session: Session, part: Part, inputs: dict[str, Tensor], shape: str | None, repeats: int, **options: Any
) -> dict[str, Any]:
    """A row on one way to decode one prompt.

    The first call meets every length of the cache for the first time, and compiles where that is asked for. Then a
    round's time is what a call of many tokens takes beyond one of few, over the rounds that it has more: what happens
    once in a call (the draft's prefill, recording of graphs) is not in it.
    """
    sizes = session.sizes
    ids, first_seconds, first_rounds = call(session, inputs, sizes.many_tokens, shape, **options)
    times, whole = [], []
    for _ in range(repeats):
        _, few_seconds, few_rounds = call(session, inputs, sizes.few_tokens, shape, **options)
        _, seconds, rounds = call(session, inputs, sizes.many_tokens, shape, **options)
        times.append((seconds - few_seconds) * 1000 / max(rounds - few_rounds, 1))
        whole.append(seconds)
    best = sorted(times)[len(times) // 2]
    return part.add(
        prompt=inputs["input_ids"].shape[1],
        arm=arm_name(shape, options),
        round_ms=best,
        least_ms=min(times),
        most_ms=max(times),
        rounds=first_rounds,
        tau=(len(ids) - 1) / first_rounds,
        call_seconds=min(whole),
        first_call_seconds=first_seconds,
        ids=ids,
    )


def arm_name(shape: str | None, options: dict[str, Any]) -> str:
    """The way to decode in words."""
    cache = options.get("cache_implementation", "dynamic")
    if cache == "static":
        cache += ", not compiled" if options.get("disable_compile") else ", compiled"
    return f"{shape or 'plain'}, {cache}"


def add_ratios(part: Part, rows: list[dict[str, Any]]) -> None:
    """What the rounds of each prompt cost in plain steps, and what a trained draft's would bring."""
    for row in rows:
        plain = {other["arm"]: other for other in rows if other["prompt"] == row["prompt"] and "plain" in other["arm"]}
        if row["arm"] in plain:
            continue
        for name, other in plain.items():
            steps = row["round_ms"] / other["round_ms"]
            part.add(
                prompt=row["prompt"],
                arm=row["arm"],
                against=name,
                steps_per_round=steps,
                ratio=PROJECTED_TAU / steps,
                how=f"projected from measured rounds to {PROJECTED_TAU} tokens in each",
                same_ids=_agree(row["ids"], other["ids"]),
            )


def _agree(ids: list[int], others: list[int]) -> str:
    """How many of the first ids are the same."""
    pairs = zip(ids, others, strict=True)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), len(ids))
    return f"{same} of {len(ids)}"
