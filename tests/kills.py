"""Killing a process in the middle of its work, and looking at the files it leaves."""

import gc
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def die(run: Callable[[], Any]) -> None:
    """Runs something that kills its process, in a process of its own."""
    child = os.fork()
    if child == 0:
        # The copy has none of the threads (of libraries, of pytest-xdist) whose objects a collection would finalise.
        gc.disable()
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def files_of(folder: Path) -> dict[str, bytes]:
    """Path below `folder` → content, for every file in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def apart(run: Callable[..., Any], *args: Any) -> None:
    """Runs a function of a module in a fresh process, for what leaves traces in one, such as torch's compiler.

    A fork would not do: it can wait for ever for a lock that a thread of this process held.
    """
    process = get_context("spawn").Process(target=run, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0
