"""Command line of the GPU benchmark."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .attention import attention
from .drafting import drafting
from .identity import identity
from .rounds import compiled, compiled_long, rounds
from .session import Part, Session
from .sizes import full_sizes, small_sizes
from .steps import steps
from .syncs import syncs

#: Part → what measures it, and the seconds it may take of the 480 that all may.
PARTS: dict[str, tuple[Callable[[Session, Part], None], float]] = {
    "rounds": (rounds, 140),
    "compiled": (compiled, 220),
    "steps": (steps, 60),
    "draft": (drafting, 30),
    "attention": (attention, 50),
    "syncs": (syncs, 30),
    "identity": (identity, 50),
    "compiled_long": (compiled_long, 240),
}
_MINUTES = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparrow_research.gpu", description=__doc__)
    parser.add_argument("output", type=Path, help="folder that gets one JSON file per part")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in order; by default %(default)s")
    parser.add_argument("--layers", type=int, default=28, help="of the target")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="after which nothing is begun or goes on")
    parser.add_argument("--small", action="store_true", help="a tiny target: tries the benchmark itself, on a CPU too")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - PARTS.keys():
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if not options.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --small tries the benchmark without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(
        folder=options.output,
        device=device,
        dtype=torch.float32 if options.small else torch.bfloat16,
        sizes=small_sizes() if options.small else full_sizes(options.layers),
        deadline=time.monotonic() + options.minutes * 60,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        measure, seconds = PARTS[name]
        session.run(name, measure, seconds * options.minutes / _MINUTES)
    print("\nmilliseconds of a round, and of a token with planted drafts")
    for length, rows in sorted(session.calls.items()):
        for row in rows:
            planted = f"{row['planted_token_ms']:9.2f}" if "planted_token_ms" in row else ""
            print(f"{length:6}  {row['arm']:40}{row['round_ms']:9.2f}{planted}")


if __name__ == "__main__":
    main()
