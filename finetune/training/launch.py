"""Training processes, started and waited for by this one."""

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue

from finetune.utils.text import print_error

STOPPED = 75  # exit code of a run that was asked to stop: "try again", EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # as shells have it
GRACE = 5.0  # seconds for the other processes to end by themselves, once one has failed

Run = Callable[[argparse.Namespace], int]


def launch(run: Run, args: argparse.Namespace, processes: int | None) -> int:
    """run(args) in `processes` processes, by default one for each GPU; one of them is this process itself. The exit code.

    Ctrl-C and SIGTERM reach every process, which end with a checkpoint, for as long as that takes. Of several errors the first
    is shown: those that follow are of processes that waited for the one that failed.
    """
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    if processes == 1:
        return run(args)
    args = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "verb"})  # what can be pickled
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    faults: SimpleQueue[str] = context.SimpleQueue()
    workers = [context.Process(target=work, args=(run, args, faults, rank, processes, port)) for rank in range(processes)]

    def pass_on(number: int, frame: object) -> None:
        if sys.platform == "win32" and number == signal.SIGINT:
            return  # Windows sends Ctrl-C to every process itself, and os.kill would end them at once
        for worker in workers:
            with suppress(ProcessLookupError):
                if worker.is_alive() and worker.pid:
                    os.kill(worker.pid, number)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for worker in workers:
            worker.start()  # deaf to Ctrl-C until work() is reached
        for number in before:
            signal.signal(number, pass_on)
        killed = wait_for(workers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [worker.exitcode or 0 for worker in workers]
    lost = [rank for rank, code in enumerate(codes) if code < 0 and rank not in killed]
    if lost:
        name = signal.Signals(-codes[lost[0]]).name
        print_error(f"process {lost[0]} was ended by {name}; the last checkpoint is kept: finetune resume")
    elif not faults.empty():
        print(faults.get(), file=sys.stderr, end="")
    elif INTERRUPTED in codes:
        print_error("stopped at once")
    return max(code if code >= 0 else 1 for code in codes)


def wait_for(workers: Sequence[SpawnProcess]) -> list[int]:
    """Wait for all to end, and kill those that do not once another has failed; returns which were killed."""
    deadline, running = float("inf"), list(workers)
    while running:
        wait([worker.sentinel for worker in running], timeout=0.5)
        running = [worker for worker in running if worker.is_alive()]
        if deadline == float("inf") and any(worker.exitcode not in (None, 0, STOPPED) for worker in workers):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for worker in running:
                worker.kill()
                worker.join()
            return [rank for rank, worker in enumerate(workers) if worker in running]
    return []


def work(run: Run, args: argparse.Namespace, faults: "SimpleQueue[str]", rank: int, processes: int, port: int) -> None:
    """One of the processes, as torch and Accelerate know it by its environment."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C then comes once, from the process that started this one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    code = 1
    try:
        code = run(args)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        if faults.empty():  # the first is shown; unread, the pipe holds 64 KiB, and a longer text would block for ever
            faults.put(traceback.format_exc()[-4000:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (0, STOPPED):
        os._exit(code)  # without waiting for the others
    sys.exit(code)


def stop_with_parent() -> None:
    """Stop, with a checkpoint, if the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        signal.raise_signal(signal.SIGTERM) if sys.platform == "win32" else os.kill(os.getpid(), signal.SIGTERM)
