"""One run of the benchmark: its time, its models, and the files that its parts write row by row."""

import gc
import json
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel, SparrowError
from sparrow_hf.artifacts import write_json
from sparrow_hf.evaluation.provenance import provenance

from .models import random_draft, random_target
from .sizes import Sizes

#: What is written and not printed.
_NOT_SHOWN = ("traceback", "ids", "least_ms", "most_ms")


class OutOfTime(BaseException):
    """A part has used the time it was given. Nothing that only looks out for errors catches it."""


@dataclass
class Part:
    """What one part has found so far. Every row is printed, and the file written again, as it is found."""

    name: str
    path: Path
    header: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> dict[str, Any]:
        """Notes one row."""
        self.rows.append(row)
        shown = {name: value for name, value in row.items() if name not in _NOT_SHOWN and value is not None}
        print("  " + "  ".join(f"{name}={_short(value)}" for name, value in shown.items()), flush=True)
        self.write()
        return row

    @contextmanager
    def cell(self, **names: Any) -> Iterator[None]:
        """What goes wrong inside is noted as a row; the part goes on. What the package refuses is no failure."""
        try:
            yield
        except SparrowError as error:
            self.add(**names, available=False, error=f"{type(error).__name__}: {error}"[:500])
        except Exception as error:
            self.add(**names, error=f"{type(error).__name__}: {error}"[:500], traceback=traceback.format_exc()[-1500:])

    def write(self) -> None:
        """Writes the file anew."""
        write_json(self.path, self.header | {"rows": self.rows}, indent=1, default=str)


@dataclass
class Session:
    """What all parts share.

    Args:
        deadline: `time.monotonic()` at which the last part ends.

    Attributes:
        calls: Length of a prompt → rows on whole calls with it, of all parts.
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    deadline: float
    calls: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU; without one, what needs it is left out and said so."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    @cached_property
    def target(self) -> PreTrainedModel:
        """The target, made once for all parts."""
        started = time.perf_counter()
        target = random_target(self.sizes, self.dtype, self.device)
        print(f"target: {target.num_parameters() / 1e9:.2f} billion weights in {time.perf_counter() - started:.1f} s")
        return target

    @cached_property
    def draft(self) -> SparrowDraftModel:
        """Its draft, a chain of 5 until a part sets another."""
        return random_draft(self.target, "chain-5")

    def run(self, name: str, measure: Callable[["Session", Part], None], budget: float) -> None:
        """Runs one part for `budget` seconds at most; whatever happens in it, its file says so and the run goes on."""
        seconds = min(budget, self.seconds_left)
        part = Part(name, self.folder / f"{name}.json", {"part": name})
        print(f"\n{name} ({seconds:.0f} s at most)", flush=True)
        started = time.monotonic()
        try:
            if seconds < 3:
                raise OutOfTime("no time was left to start")
            with interrupted_after(seconds):
                details = {"weights": "random", "shapes": self.sizes.text, "lengths": self.sizes.lengths}
                part.header |= provenance(self.target, **details)
                part.header |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
                part.header["command"] = shlex.join(["python", "-m", "sparrow_research.gpu", *sys.argv[1:]])
                with torch.no_grad():
                    measure(self, part)
        except (Exception, OutOfTime) as error:
            part.header["error"] = f"{type(error).__name__}: {error}"[:500]
            if not isinstance(error, OutOfTime):
                part.header["traceback"] = traceback.format_exc()[-3000:]
            print(f"  stopped: {part.header['error']}", flush=True)
        finally:
            part.header["seconds"] = time.monotonic() - started
            part.write()
            print(f"  {name} took {part.header['seconds']:.1f} s", flush=True)
            self.forget_compiled()

    def forget_compiled(self) -> None:
        """What one way to decode compiled or cached is not the next one's."""
        if self.on_cuda:
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises [`OutOfTime`] in the block when it has run for so long (main thread only)."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: the first one may come where Python only prints what is raised (in a `__del__`).
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
