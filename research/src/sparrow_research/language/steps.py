"""The steps of a road: commands that make files from those of earlier ones, one by one or several at a time.

Which steps one has to wait for is read from its words: those that name what an earlier one writes.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Step:
    """A command that is left out once its file is there.

    Attributes:
        words: Of `python -m`, with one `--output`.
        makes: The file, or `None`: the command sees by itself what is missing.
        seconds: About how long it takes on one CPU thread.
    """

    words: tuple[str, ...]
    makes: Path | None
    seconds: float

    @property
    def is_done(self) -> bool:
        return self.makes is not None and self.makes.exists()

    @property
    def output(self) -> str:
        """What it writes, a file or a folder."""
        return self.words[self.words.index("--output") + 1]

    def reads(self, other: Step) -> bool:
        """Whether a word of it names what another step writes, a folder that holds it, or something in it."""
        # `--compare NAME=FOLDER` names one, too.
        named = [word.rpartition("=")[2] for word in self.words]
        written = f"{other.output}/"
        return any(written.startswith(f"{word}/") or word.startswith(written) for word in named)


def tell(steps: Sequence[Step]) -> None:
    """Prints the commands, and about how long they take."""
    for step in steps:
        print(f"{step.seconds / 60:6.0f} min  python -m {shlex.join(step.words)}")
    print(f"{sum(step.seconds for step in steps) / 3600:.1f} hours on one CPU thread, about", flush=True)


def run_steps(steps: Sequence[Step], jobs: int, logs: Path) -> None:
    """Runs steps, each after those before it that write what it reads; after an error no other is started.

    Args:
        steps: In an order in which they could be run one by one.
        jobs: At a time. With more than one, each writes into a file of its own.
        logs: Folder of these files.

    Raises:
        subprocess.CalledProcessError: A step failed. What ran beside it was ended, and goes on when it is run again.
    """
    waiting = list(enumerate(steps))
    running: dict[int, tuple[Step, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for place, (number, step) in enumerate(waiting):
                before = [*(each for each, _ in running.values()), *(each for _, each in waiting[:place])]
                if len(running) < jobs and not any(step.reads(each) for each in before):
                    running[number] = step, _start(step, None if jobs == 1 else logs / _log_of(number, step))
            waiting = [(number, step) for number, step in waiting if number not in running]
            time.sleep(0.1)
            for number, (step, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[number]
                    if code:
                        if jobs > 1:
                            print(f"failed, see {logs / _log_of(number, step)}", flush=True)
                        raise subprocess.CalledProcessError(code, [sys.executable, "-m", *step.words])
                    print(f"done: {shlex.join(step.words[:2])} … --output {step.output}", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _log_of(number: int, step: Step) -> str:
    return f"{number:02d}-{Path(step.output).name}.log"


def _start(step: Step, log: Path | None) -> subprocess.Popen[bytes]:
    output: IO[bytes] | None = None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    try:
        return subprocess.Popen([sys.executable, "-m", *step.words], stdout=output, stderr=output)
    finally:
        if output is not None:
            # The process has its own handle.
            output.close()
