"""One function of many items, spread over the cores of this machine."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")
MOST_PROCESSES = 16
AT_ONCE = 250  # items that a process is handed
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
WORTH_IT = 4000  # items; of fewer, processes take longer to start than they save


def num_cores() -> int:
    """The cores that this process may use: those it is bound to, or fewer where a container has the time of fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota())))  # one thread more than that, and all of them wait for the next period


def cpu_quota() -> float:
    """Cores whose time Linux grants to this process's control group: `docker run --cpus`, a pod's limit, systemd's CPUQuota.

    Of the groups around it the strictest counts (kernel: admin-guide/cgroup-v2, scheduler/sched-bwc); inf without a limit.
    """
    found = math.inf
    with suppress(OSError, ValueError):  # not Linux
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                root, names = GROUPS, ["cpu.max"]
            elif "cpu" in controllers.split(","):
                root, names = GROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):  # a container may see its own group in its parents' place
                with suppress(OSError, ValueError):  # "max" is no limit, nor is -1
                    quota, period = " ".join((folder / name).read_text() for name in names).split()
                    found = min(found, int(quota) / int(period)) if int(quota) > 0 else found
    return found


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
