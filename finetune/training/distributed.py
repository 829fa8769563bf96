"""Several processes as one run: who goes first, whether their weights agree, when all stop."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetune.models.sharding import is_shard, is_sharded
from finetune.recipe import Recipe
from finetune.training.launch import stop_signals
from finetune.utils.cores import num_cores
from finetune.utils.errors import RecipeError

T = TypeVar("T")
RUNS = itertools.count()  # of this program
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again to stop at once"


def join_processes() -> None:
    """Join the processes of a launch under keys of this run's own, where the launcher's store may have others'.

    torch 2.15 leaves there the addresses of the processes of an earlier run in the same program, or of those that died before
    the launcher started all again (--max_restarts), and new ones that read those wait for ever: 4 of 6 launches of a ten-line
    script did not recover within 40 seconds.
    """
    run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(RUNS)}"
    if run != "0-0" and "TORCHELASTIC_RUN_ID" in os.environ and not torch.distributed.is_initialized():
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"run{run}", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def main_process_first(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """make() on each machine's first process, so that one downloads, then on the others; a fault anywhere is raised by all."""
    made: list[T] = []
    for first in (True, False):
        fault = ""
        if first == accelerator.is_local_main_process:
            try:
                made.append(make())
            except RecipeError as error:
                fault = str(error)
        faults = [text for text in gather_object([fault]) if text]
        if faults:
            raise RecipeError(faults[0])
    return made[0]


def gather_strided(parts: list[torch.Tensor], total: int, accelerator: Accelerator) -> torch.Tensor:
    """`total` rows, of which process p of N has p, p + N, p + 2N, ... in `parts`, as one tensor in order, on every process.

    All processes bring as many; those past the end are left out.
    """
    rows = torch.cat(parts)
    if accelerator.num_processes == 1:
        return rows[:total]
    return accelerator.gather(rows).unflatten(0, (-1, len(rows))).transpose(0, 1).flatten(0, 1)[:total]


def broadcast(tensors: Iterable[torch.Tensor], accelerator: Accelerator) -> None:
    """Give every process the first one's values; shards keep their own."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            if not is_shard(tensor):
                torch.distributed.broadcast(tensor, 0)


def check_same_weights(net: nn.Module, accelerator: Accelerator) -> None:
    """Raise RuntimeError, with the first tensor that differs, unless all processes hold the same bits.

    Compared are sums of each tensor's bits read as whole numbers: one number a tensor, whatever its size. Shards are no copies.
    """
    if accelerator.num_processes == 1:
        return
    tensors = {name: value for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}  # not extra state
    state = {name: value for name, value in tensors.items() if not is_shard(value)}
    if not state:
        return
    sums = torch.stack([bits(tensor).sum(dtype=torch.int64) for tensor in state.values()])
    others = accelerator.gather(sums[None])
    differing = (others != others[0]).any(0).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(
            f"processes hold different values in {len(differing)} of {len(state)} tensors, the first of them "
            f"'{list(state)[differing[0]]}'; training went apart, and this run's numbers mean nothing"
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as whole numbers."""
    kind = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
    return tensor.detach().contiguous().view(-1).view(kind)


class Stopped(Exception):
    """The run was asked to stop, and has: everything it did is in its checkpoint."""


class StopRequest:
    """SIGTERM (a machine being taken away), SIGHUP or Ctrl-C, kept until the running step is finished.

    Before the first step there is nothing to finish: Stopped comes at once. A second Ctrl-C, too, stops at once. Used as a
    context: the handlers from before come back afterwards. Outside the main thread Python allows no handlers.
    """

    def __init__(self, accelerator: Accelerator, quiet: bool = False):
        self.says = accelerator.is_main_process and not quiet
        self.stepping = False  # set by the loop
        self.asked_at: float | None = None
        self.pending: tuple[torch.distributed.Work, torch.Tensor] | None = None
        # On the CPU's own channel: asking after each step must not make a GPU wait.
        self.group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "StopRequest":
        numbers = stop_signals() if threading.current_thread() is threading.main_thread() else []
        self.before = {number: signal.signal(number, self.remember) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: object) -> None:
        if not self.stepping:
            raise Stopped("before the first step")
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            if self.says:  # by os.write: print can't be called from within print
                over_the_bar = "\r\x1b[K" if sys.stderr.isatty() else ""
                with suppress(OSError):
                    os.write(2, f"{over_the_bar}{STOPPING}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > 1:  # sooner, a launcher passes the same one on
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether any process was asked; the same answer on all of them. On several it is as of the step before, so that no
        step waits for it."""
        if self.group is None:
            return self.asked_at is not None
        before, asked = self.pending, torch.tensor(int(self.asked_at is not None))
        answer = torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (answer, asked)
        if before:
            before[0].wait()
        return bool(before and before[1])


def wrap(recipe: Recipe, net: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network as this stage trains it: itself on one process or in shards, a fresh DistributedDataParallel on several.

    DDP fixes at wrapping which parameters it averages, so each stage is wrapped anew (a parameter unfrozen later would
    silently drift apart between processes), and nothing is sent for frozen layers. Norm statistics are not sent before each
    forward pass; the loop does it once an epoch. The network of a recipe's function may leave parameters unused, always or in
    one process alone, which DDP then looks for in each step; none of timm's or torchvision's does.
    """
    model = net
    if accelerator.num_processes > 1 and not is_sharded(net):
        devices = [accelerator.device] if accelerator.device.type == "cuda" else None
        skips = callable(recipe.backbone)
        model = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=skips)
        model.broadcast_buffers = False  # torch 2.15 has a new name for the argument, and deprecates the old one
    if not recipe.torch_compile:
        return model
    torch.compiler.reset()  # torch 2.6 would go on with the last stage's code, without gradients of what is unfrozen now
    return cast(nn.Module, torch.compile(model))


def default_workers(asked: int | None, device: str) -> int:
    """Loader processes: those asked for; else none beside a CPU that trains, up to 8 a process for a GPU."""
    if asked is not None:
        return asked
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if device == "cpu" else min(8, num_cores() // local)
