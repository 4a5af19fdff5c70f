"""Work that shares nothing, several pieces at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def run_in_processes(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], processes: int, description: str
) -> Iterator[T]:
    """What the calls return, in the order in which they end. After an error, calls that did not begin are dropped.

    Args:
        function: Of a module, so that another process finds it.
        calls: Its arguments, one tuple for each call.
        processes: Calls at a time.
        description: Of the progress bar.
    """
    # A forked process would inherit the threads of this one's tensors.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(function, *call) for call in calls]
        try:
            for run in tqdm(as_completed(running), desc=description, total=len(running)):
                yield run.result()
        finally:
            pool.shutdown(cancel_futures=True)
