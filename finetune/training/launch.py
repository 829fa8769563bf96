"""Training processes, started by torch's own launcher from within this process."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

STOPPED = 75  # as run.py's


def launch(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, processes: int | None) -> int:
    """run(args) in `processes` processes, by default one for each GPU; one of them is this process itself. The exit code.

    Ctrl-C and SIGTERM reach every process, which end with a checkpoint.
    """
    processes = processes or max(1, torch.cuda.device_count())
    if processes == 1:
        return run(args)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each error of a process once more
    args = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "verb"})  # what can be pickled
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id=str(os.getpid()),
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT",
    )
    try:
        return max(elastic_launch(config, run)(args).values())
    except SignalException as stopped:
        return STOPPED if stopped.sigval in (signal.SIGTERM, signal.SIGINT) else 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"finetune: process {rank} ended with code {failure.exitcode}; what it said stands above", file=sys.stderr)
        return 1
