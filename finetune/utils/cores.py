"""One function of many items, spread over the cores of this machine."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")
MOST_PROCESSES = 16
AT_ONCE = 250  # items that a process is handed
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
WORTH_IT = 4000  # items; of fewer, processes take longer to start than they save


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(function: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[Found]:
    """What `function` says of each item, in their order, and what it raises.

    Few items are done in this process, and all on macOS and Windows: there a new process would import torch first.
    """
    processes, done = min(MOST_PROCESSES, num_cores()), 0
    if len(items) >= WORTH_IT and processes > 1 and sys.platform.startswith("linux"):
        fork = multiprocessing.get_context("fork")
        # Where no process, lock or memory is to be had, this process does the rest.
        with suppress(OSError, BrokenProcessPool), ProcessPoolExecutor(processes, fork, depend_on_parent) as pool:
            for found in pool.map(function, items, chunksize=AT_ONCE):
                yield found
                done += 1
    yield from map(function, items[done:])


def depend_on_parent() -> None:
    """End with the process that this one works for, however that ends, and not before."""
    outlast_interrupts()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def outlast_interrupts(*_: int) -> None:
    """Leave Ctrl-C and a closed terminal, which reach each process, to the one that this one works for."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
