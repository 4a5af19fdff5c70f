"""`syncs`: how often a round waits for the device, and how many kernels it starts."""

import warnings
from collections import Counter
from typing import Any

import torch

from .calls import call
from .models import prompt
from .session import Part, Session
from .timing import kernels


def syncs(session: Session, part: Part) -> None:
    """What a call of many tokens has more than one of few, over its further rounds."""
    sizes = session.sizes
    inputs = prompt(session.target, sizes, sizes.lengths[0])
    if not session.on_cuda:
        part.header["needs"] = "CUDA: elsewhere nothing is counted"
    static = {"cache_implementation": "static", "disable_compile": True}
    for shape, options in (("chain-5", {}), (None, {}), ("chain-10", {}), ("chain-5", static), (None, static)):
        names = {"shape": shape or "plain", "cache": options.get("cache_implementation", "dynamic")}
        with part.cell(**names):
            found = []
            for tokens in (sizes.few_tokens, sizes.few_tokens, sizes.few_tokens + 8):
                rounds, waits = 0, Counter[str]()

                def run(tokens: int = tokens) -> None:
                    nonlocal rounds
                    rounds = call(session, inputs, tokens, shape, **options)[2]

                waits = _waits(session, run)
                found.append((rounds, waits, kernels(run, session.device)))
            # The first call warms up.
            (few, few_waits, few_kernels), (many, many_waits, many_kernels) = found[1:]
            further = max(many - few, 1)
            many_waits.subtract(few_waits)
            row: dict[str, Any] = {"rounds": further, "waits": many_waits.total() / further}
            row["waits_at"] = {place: count / further for place, count in many_waits.most_common(12) if count}
            if few_kernels is not None and many_kernels is not None:
                copies = [sum(_counts(each, "Mem")) for each in (few_kernels, many_kernels)]
                starts = [sum(kernel["count"] for kernel in each.values()) for each in (few_kernels, many_kernels)]
                row["copies"] = (copies[1] - copies[0]) / further
                row["kernels"] = (starts[1] - starts[0]) / further - row["copies"]
            part.add(**names, **row)


def _counts(found: dict[str, dict[str, float]], start: str) -> list[float]:
    return [kernel["count"] for name, kernel in found.items() if name.startswith(start)]


def _waits(session: Session, run: Any) -> Counter[str]:
    """Line of code → how often the device was waited for there."""
    if not session.on_cuda:
        run()
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    )
