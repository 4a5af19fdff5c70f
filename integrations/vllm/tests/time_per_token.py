"""CPU seconds that vLLM takes per token it decodes, plain and with the built-in Qwen2.5-VL draft.

`python time_per_token.py REFERENCES [--compiled]`, in the environment of `make test-vllm`, with the folder that
`references.py` wrote. CPU time does not depend on what else the machine does, unlike time on the wall.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from engines import Engine, Family, engine, tokens_per_round

ROUNDS = 3


def answer(engine: Engine, request: dict[str, Any], max_tokens: int) -> tuple[float, list[int], int]:
    """CPU seconds, ids and rounds of one answer."""
    start = time.process_time()
    answers = engine.answer([request], max_tokens=max_tokens)
    return time.process_time() - start, answers.ids[0], answers.rounds


def per_token(engine: Engine, request: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds per token behind the first one, the median of some answers, and the acceptance length."""
    answer(engine, request, 1)
    found = []
    for _ in range(ROUNDS):
        # The prompt is cached, so what is left of it costs little, and is taken off.
        prompt, _, _ = answer(engine, request, 1)
        whole, ids, rounds = answer(engine, request, 100)
        found.append((whole - prompt) / (len(ids) - 1))
    return median(found), tokens_per_round([ids], rounds) if rounds else 1.0


def main() -> None:
    family = Family(Path(sys.argv[1]) / "qwen2.5-vl", "eagle3")
    seconds: dict[bool, dict[str, float]] = {}
    for draft in (False, True):
        with engine(family, draft, enforce_eager="--compiled" not in sys.argv) as its:
            measured = {clip["name"]: per_token(its, family.request(clip)) for clip in family.clips}
        seconds[draft] = {name: each for name, (each, _) in measured.items()}
        for name, (each, length) in measured.items():
            print(f"{name}: {1000 * each:.1f} ms of CPU per token, {length:.2f} tokens per forward", flush=True)
    for visual_tokens in sorted({clip["visual_tokens"] for clip in family.clips}):
        names = [clip["name"] for clip in family.of_length(visual_tokens)]
        plain, drafted = (1000 * median(seconds[draft][name] for name in names) for draft in (False, True))
        print(f"{visual_tokens} visual tokens: plain {plain:.1f} ms, draft {drafted:.1f} ms: {plain / drafted:.2f}×")


if __name__ == "__main__":
    main()
