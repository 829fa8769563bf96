"""The processes of a run: as other launchers start them, or started and waited for by this one."""

import argparse
import importlib.util
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
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from finetune.recipe import Lora, Optimizer, Recipe
from finetune.recipe.checks import parts
from finetune.utils.cores import num_cores
from finetune.utils.errors import RecipeError
from finetune.utils.text import print_error

REFUSED = 2  # exit code of a run in which a person has something to put right
STOPPED = 75  # of one that was asked to stop: "try again", EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # as shells have it
GRACE = 5.0  # seconds for the other processes to end by themselves, once one has failed
TURN = 3.0  # seconds in which the first process of a machine says what is wrong with all, before the others do

Run = Callable[[argparse.Namespace], int]
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # what may be left over and is true all the same
ONE_OF_SEVERAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch reads
STARTED = {  # by programs that say it in their own words
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
UNKNOWN = {  # ways to train that Accelerate has and a run here has not
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# Tried in shards; their steps go number by number. Others look at a norm, rows or columns; of torch 2.14, Rprop fails, too.
OPTIMIZERS_IN_SHARDS = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD", "ASGD")


def check_launcher(recipe: Recipe) -> None:
    """Raise RecipeError for launcher settings that would be without effect, or change what the recipe computes."""
    check_processes()
    environment = os.environ
    for variable, name in UNKNOWN.items():
        if environment.get(variable, "").lower() == "true":
            raise RecipeError(
                f"the launcher asks for {name} ({variable}=true), which a run does not do; without it: finetune train NAME "
                "--processes N, or accelerate launch --multi_gpu --num_processes N ..., which overrules your default config"
            )
    if asks_for_fsdp():
        check_fsdp(recipe)
    if importlib.util.find_spec("torch_xla") and environment.get("USE_TORCH_XLA", "1").lower() not in ("0", "false", "no"):
        raise RecipeError("Accelerate would use torch_xla, with which a run was never tried; without it: USE_TORCH_XLA=0")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", recipe.mixed_precision):
        remedy = f"--set mixed_precision={precision}" if precision in ("fp16", "bf16") else "launch with --mixed_precision no"
        raise RecipeError(
            f"the launcher asks for mixed precision {precision}, the recipe for {recipe.mixed_precision}; "
            f"precision belongs to the recipe: {remedy}"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor" if recipe.torch_compile else "no"):
        raise RecipeError(
            f"the launcher asks for the dynamo backend {backend}; compiling belongs to the recipe: --set torch_compile=True, "
            "and launch with --dynamo_backend no"
        )
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise RecipeError("gradient accumulation is asked for with --accumulate N, not by the launcher")
    if environment.get("MASTER_PORT") == "0":
        raise RecipeError(
            "the launcher gave its processes port 0, where they can't meet (torch 2.6 does, asked for any free port): "
            "name one with --main_process_port, or leave that out"
        )
    if "MASTER_ADDR" in environment and "RANK" not in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise RecipeError(
            "accelerate launch was asked for several processes, but without several GPUs it starts one; give it --multi_gpu as "
            "well (it then starts them on the CPU, too), or --config_file accelerate_config.yaml, which says so"
        )


def asks_for_fsdp() -> bool:
    """Whether the launcher asks for the network in shards, over more than one process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("WORLD_SIZE", "1") != "1"


def check_fsdp(recipe: Recipe) -> None:
    """Raise RecipeError for what does not go with FSDP, or was never tried with it."""
    asked = {name: value.lower() for name, value in os.environ.items() if name.startswith("FSDP_")}
    if asked.get("FSDP_VERSION", "1") != "2":
        raise RecipeError(
            "the launcher asks for FSDP version 1; a run does version 2: --fsdp_version 2, from Accelerate 1.6 on"
        )
    used = [part for _, part in parts(recipe) if isinstance(part, Optimizer)]
    optimizers = {part.name for part in used} - {*OPTIMIZERS_IN_SHARDS}
    settings = {
        "fsdp_offload_params": asked.get("FSDP_OFFLOAD_PARAMS") == "true",
        "fsdp_ignored_modules": asked.get("FSDP_IGNORED_MODULES", "none") != "none",
        "fsdp_activation_checkpointing (a recipe has gradient_checkpointing=True)": (
            asked.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"
        ),
        "a function as backbone (one process may leave out a layer, for which the others wait)": callable(recipe.backbone),
        "ema_decay": recipe.ema_decay,
        "l2_sp": recipe.l2_sp,
        "frozen_views": recipe.augment.frozen_views,
        "a Lora row": any(isinstance(part, Lora) for _, part in parts(recipe)),
        "clip_adaptive": recipe.clip_adaptive,
        "torch_compile": recipe.torch_compile,
        "mixed_precision=fp16": recipe.mixed_precision == "fp16",
        "batch_norm=sync": recipe.batch_norm == "sync",
        f"optimizer {', '.join(sorted(optimizers))}": optimizers,
        "an optimizer's option fused": any("fused" in part.options for part in used),
    }
    if found := [name for name, is_there in settings.items() if is_there]:
        raise RecipeError(
            f"the launcher asks for FSDP, which does not go with {', '.join(found)}; leave that out, or launch with --multi_gpu"
        )


def check_processes() -> None:
    """Raise RecipeError unless the environment is of a process alone, or of one of several as torch and Accelerate know it."""
    environment = os.environ
    given = {name: environment[name] for name in (*ALONE, "LOCAL_RANK") if name in environment}
    if all(ALONE.get(name) == value for name, value in given.items()):
        for variable, program in STARTED.items():
            if environment.get(variable, "1") != "1":
                raise RecipeError(
                    f"{program} started {environment[variable]} processes without RANK and WORLD_SIZE, and each would be a run "
                    "of its own. To train on all, start one on each machine that starts the others: torchrun --nnodes M "
                    "--nproc_per_node N --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m finetune.run ...; "
                    f"for runs of their own, unset {variable}"
                )
        return
    missing = [name for name in ONE_OF_SEVERAL if name not in environment]
    numbers = all(value.isdecimal() for value in given.values())
    if missing or not numbers or int(given["RANK"]) >= int(given["WORLD_SIZE"]) or given.get("LOCAL_WORLD_SIZE") == "0":
        fault = f"without {', '.join(missing)}" if missing else "which no launcher does"
        raise RecipeError(
            f"the environment has {', '.join(map('='.join, given.items()))}, {fault}. To run alone, unset {' '.join(given)}; "
            "to start N processes: torchrun --nproc_per_node N -m finetune.run ...",
            one_process=not given.get("RANK"),  # which one, nobody knows
        )


def chosen_threads() -> bool:
    """Whether a person has said how many threads to take: `accelerate launch`, unasked, says 1 to a process on its own."""
    launcher = accelerate_launch()
    if launcher is None or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return True
    words = [word.replace("-", "_") for word in launcher.cmdline()]
    return "OMP_NUM_THREADS" in launcher.environ() or any(word.startswith("__num_cpu_threads") for word in words)


def accelerate_launch() -> Any:
    """The process of `accelerate launch`, of psutil, if it started this one."""
    import psutil  # Accelerate needs it

    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if any(Path(word).name.startswith("accelerate") for word in parent.cmdline()[:3]):
            return parent
    return None


def stop_signals() -> list[signal.Signals]:
    """What asks a run to stop: also SIGHUP, of a terminal that is closed, unless nohup has it ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@cache
def stop_with_launcher() -> None:
    """See to it that this process stops, with a checkpoint, if the launcher that started it dies without handing that on."""
    if "TORCHELASTIC_RUN_ID" in os.environ or accelerate_launch():
        threading.Thread(target=stop_with_parent, daemon=True).start()


def launch(run: Run, args: argparse.Namespace, processes: int | None) -> int:
    """run(args) in `processes` processes, by default one for each GPU; one of them is this process itself. The exit code.

    Ctrl-C, SIGTERM and SIGHUP reach every process, which end with a checkpoint, for as long as that takes. Of several errors
    the first is shown: those that follow are of processes that waited for the one that failed.
    """
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    if processes == 1:
        return run(args)
    args = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "verb"})  # what can be pickled
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
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

    before = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
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
        codes = {worker.exitcode for worker in workers} - {None, 0, STOPPED}
        if codes and deadline == float("inf"):
            deadline = time.monotonic() + (0 if REFUSED in codes else GRACE)  # it has said why
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
    """Stop, with a checkpoint, once the process that started this one is gone."""
    if parent := multiprocessing.parent_process():
        parent.join()
    else:
        before = os.getppid()
        while os.getppid() == before:
            time.sleep(1)
    signal.raise_signal(signal.SIGTERM) if sys.platform == "win32" else os.kill(os.getpid(), signal.SIGTERM)
