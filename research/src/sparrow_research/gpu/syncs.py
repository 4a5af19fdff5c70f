"""`syncs`: how often a round waits for the device, and how many kernels it starts."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calls import NOT_COMPILED, arm_name, call, forget_lengths
from .models import prompt
from .session import Part, Session
from .timing import kernels

#: Beginnings of what is no kernel: copies and fills.
_COPIES = ("Memcpy", "Memset")


def syncs(session: Session, part: Part) -> None:
    """What a call of many tokens has more than one of few, over its further rounds."""
    sizes = session.sizes
    inputs = prompt(session.target, sizes, sizes.lengths[0])
    if not session.on_cuda:
        part.header["needs"] = "CUDA: elsewhere nothing is counted"
    arms: list[tuple[str | None, dict[str, Any]]] = [
        ("chain-5", {}),
        ("chain-5", NOT_COMPILED),
        (None, {}),
        (None, NOT_COMPILED),
        ("chain-10", {}),
    ]
    for shape, options in arms:
        name = arm_name(shape, options)
        with part.cell(arm=name):
            forget_lengths(session)
            most = sizes.few_tokens + 8
            call(session, inputs, most, shape, **options)
            few_rounds, few = _counted(session, inputs, sizes.few_tokens, shape, options)
            many_rounds, many = _counted(session, inputs, most, shape, options)
            further = max(many_rounds - few_rounds, 1)
            many.subtract(few)
            waits = {place: count / further for place, count in many.most_common() if count and ":" in place}
            row = {"waits": sum(waits.values()), "kernels": many["kernels"] / further}
            part.add(arm=name, rounds=further, **row, copies=many["copies"] / further, waits_at=waits)


def _counted(
    session: Session, inputs: dict[str, Tensor], tokens: int, shape: str | None, options: dict[str, Any]
) -> tuple[int, Counter[str]]:
    """Rounds of a call; its kernels, its copies, and line of code → how often it waited for the device there."""
    rounds = 0

    def run() -> None:
        nonlocal rounds
        rounds = call(session, inputs, tokens, shape, **options).rounds

    counts: Counter[str] = Counter()
    for name, kernel in (kernels(run, session.device) or {}).items():
        counts["copies" if name.startswith(_COPIES) else "kernels"] += int(kernel["count"])
    counts.update(_waits(session, run))
    return rounds, counts


def _waits(session: Session, run: Callable[[], None]) -> list[str]:
    """The line of code of every wait for the device."""
    if not session.on_cuda:
        run()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return [f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}" for warning in found]
