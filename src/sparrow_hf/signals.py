"""Ctrl-C and SIGTERM: how a process that is asked to end does so.

While `sparrow` imports its packages, which takes seconds, it ends at once: nothing can be lost. While a verb works,
they raise, so that the verb can say what is kept. Whoever imports the package keeps the handlers of their own.

Nothing here takes time to import.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .errors import causes

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
#: So long a process that was stopped waits for its threads.
THREAD_SECONDS = 5.0
#: By then, whatever Python ignores exceptions in has returned.
RAISE_AGAIN_SECONDS = 0.05

Handler = Callable[[int, FrameType | None], Any] | int | None


class Terminated(BaseException):
    """The process was asked to end (SIGTERM). Not an `Exception`, as `KeyboardInterrupt` is none."""


STOPS = (KeyboardInterrupt, Terminated)


def number_of(stop: BaseException) -> signal.Signals:
    """The signal behind `KeyboardInterrupt` or [`Terminated`]."""
    return signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT


def raise_stop_in(error: Exception) -> None:
    """Raises what interrupted the work, if code in C has turned it into an error of another type."""
    for each in causes(error):
        if isinstance(each, STOPS):
            raise each


def is_command() -> bool:
    """Whether this process was started as `sparrow` or as `python -m sparrow_hf.cli`."""
    started = getattr(sys, "argv", None) or [""]
    # `python -m` has not found the module's file while it imports the packages above it.
    return Path(started[0]).stem == "sparrow" or (started[0] == "-m" and "sparrow_hf.cli" in sys.orig_argv)


def end_at_once() -> None:
    """From now on, Ctrl-C and SIGTERM end the process with one sentence, whatever it does."""
    _handle(end)


def end(number: int, _: FrameType | None = None) -> NoReturn:
    """Ends the process. No exception does: imports may turn one into another error."""
    if is_first_process():
        os.write(2, f"Stopped by {NAMES[signal.Signals(number)]}.\n".encode())
    os._exit(128 + number)


def end_soon(code: int) -> None:
    """Lets the process end with this code after some seconds, if it has not ended by itself.

    A pool that is interrupted while it starts a thread forgets it, and Python waits for that thread for ever.
    """
    last = threading.Timer(THREAD_SECONDS, os._exit, (code,))
    last.daemon = True
    last.start()


@contextmanager
def raising() -> Iterator[list[BaseException]]:
    """Within the block, Ctrl-C raises `KeyboardInterrupt`, and SIGTERM [`Terminated`].

    Where Python ignores exceptions (in a `__del__`, in a callback), they are raised once more a little later.

    Yields:
        What was raised, empty at first. Another error may arrive in its place, see [`raise_stop_in`].
    """
    raised: list[BaseException] = []
    again: list[threading.Timer] = []
    hook = sys.unraisablehook

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raised.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
        raise raised[-1]

    def ignored(what: Any) -> None:
        if isinstance(what.exc_value, STOPS):
            again.append(threading.Timer(RAISE_AGAIN_SECONDS, _send, (number_of(what.exc_value),)))
            again[-1].start()
        else:
            hook(what)

    before, sys.unraisablehook = _handle(stop), ignored
    try:
        yield raised
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = hook
        _restore(before)


@contextmanager
def ignoring() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM do nothing. For what takes no time."""
    before = _handle(signal.SIG_IGN)
    try:
        yield
    finally:
        _restore(before)


def is_first_process() -> bool:
    """Whether this is the process that speaks; all processes of `accelerate launch` are stopped together."""
    return os.environ.get("RANK", "0") == "0"


def _send(number: signal.Signals) -> None:
    """Sends the main thread a signal, which also ends its waiting where that can be ended (not on Windows)."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)


def _handle(handler: Handler) -> dict[signal.Signals, Handler]:
    """Handles both signals, except one that whoever started the process wants ignored (`nohup`, `&` in a script)."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in NAMES}
    return {
        number: signal.signal(number, handler)
        for number, found in before.items()
        if found not in (signal.SIG_IGN, None)
    }


def _restore(handlers: dict[signal.Signals, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
