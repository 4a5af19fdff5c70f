"""Killing a process in the middle of its work, and looking at the files it leaves."""

import gc
import os
import signal
import traceback
from collections.abc import Callable
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


def apart(run: Callable[[], Any]) -> None:
    """Runs something in a process of its own that leaves traces in one, such as torch's compiler: a process that was
    forked off after it can crash."""
    child = os.fork()
    if child == 0:
        gc.disable()
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
