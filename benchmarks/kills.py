"""Kill real runs in every way a machine can, resume them, and count those that do not end with the bits of an unbroken run.

    python -m benchmarks.kills --kills 100
    python -m benchmarks.kills --kills 20 --fsdp

Each trial starts the command (one process or two; with --fsdp two that share the network), sends SIGKILL to one process or
to all at a random moment, or from inside a checkpoint's writing, then gives the same command again until it finishes, and
compares model, optimizer state and metrics file with those of a run that nothing happened to. Runs are forked from this
process, which has torch loaded already.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import safetensors.torch
import torch

from benchmarks.docs import kills as table
from finetune.run import main
from finetune.training.run_dir import newest_checkpoint
from finetune.utils import files

WAYS = ("all processes", "one process", "while a checkpoint is written")
RECIPE = """
from torch import nn
from finetune import AdamW, Cosine, Data, Group, Recipe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(16, 10)

    def forward(self, images):
        return self.fc(self.drop(self.body(self.norm(self.stem(images)).relu()).relu().mean((2, 3))))


recipe = Recipe(backbone=Net, head="fc", data=Data("generated", image_size=24, batch_size=4),
                groups=(Group("head", "fc", lr=1e-2), Group("body", "body", lr=3e-3, unfreeze_at=2),
                        Group("stem", "stem|norm", lr=1e-3, unfreeze_at=4)),
                optimizer=AdamW(weight_decay=0.05), schedule=Cosine(warmup_epochs=0.5), batch_norm="train", epochs=8)
"""
FSDP_RECIPE = """
from finetune import AdamW, Cosine, Data, Group, Recipe

recipe = Recipe(backbone="test_resnet", weights="none", dropout=0.3, data=Data("generated", image_size=32, batch_size=4),
                groups=(Group("head", "fc", lr=1e-2), Group("body", r"layer[34]", lr=3e-3, unfreeze_at=2),
                        Group("stem", ".", lr=1e-3, unfreeze_at=4)),
                optimizer=AdamW(weight_decay=0.05), schedule=Cosine(warmup_epochs=0.5), batch_norm="train", epochs=8)
"""


def start(folder: Path, count: int, workers: int, before: Callable[[], None] | None = None) -> list[int]:
    """Fork the `count` processes of a run; returns their numbers. `before` is called in the first of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if count > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            if before and rank == 0:
                before()
            torch.set_num_threads(1)
            code = 1
            try:
                code = main(
                    [
                        "--recipe",
                        str(folder.parent / "recipe.py"),
                        "--output",
                        str(folder),
                        "--resume",
                        "auto",
                        "--checkpoint-every",
                        "2",
                        "--workers",
                        str(workers),
                    ]
                )
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def die_at_flush(number: int) -> None:
    """Make this process kill itself as it flushes the number-th file or folder of its checkpoints to the disk."""
    real, calls = files.flush, []

    def fatal(path):
        calls.append(path)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    files.flush = fatal


def wait(children: list[int], seconds: float = 600) -> list[int]:
    """Exit codes; once one process is dead of a signal the others are killed, as the launcher does."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(code != 0 for code in codes.values()) or time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def contents(folder: Path) -> tuple[dict, str]:
    """Every tensor of a finished run's last checkpoint, and its metrics."""
    last = newest_checkpoint(folder)
    tensors = safetensors.torch.load_file(last / "model.safetensors")
    for name, state in torch.load(last / "optimizer.pt", weights_only=True).items():
        tensors |= {f"{name} {key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors, (folder / "metrics.jsonl").read_text()


def same(a: tuple[dict, str], b: tuple[dict, str]) -> bool:
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][n], b[0][n]) for n in a[0])


def trial(folder: Path, count: int, way: str, seconds: float, rng: random.Random) -> bool:
    """Start a run and kill it; False if it was done before the blow fell."""
    if way == WAYS[2]:
        children = start(folder, count, rng.choice((0, 2)), partial(die_at_flush, rng.randint(1, 120)))
    else:
        children = start(folder, count, rng.choice((0, 2)))
        time.sleep(rng.uniform(0.1, 1.0) * seconds)
        for child in children if way == WAYS[0] else [rng.choice(children)]:
            os.kill(child, signal.SIGKILL)
    codes = wait(children)
    return -signal.SIGKILL in codes and not (folder / "result.json").exists()


def results(counts: dict[tuple[str, int], list[int]], fsdp: bool) -> list[dict]:
    """The trials so far, as benchmarks/results/kills.json has them."""
    return [
        {
            "killed": way,
            "processes": f"{count}, FSDP2" if fsdp else count,
            "kills": kills,
            "resumed": resumed,
            "bitwise_equal": same,
        }
        for (way, count), (kills, resumed, same) in counts.items()
    ]


def benchmark(kills: int, seed: int, fsdp: bool) -> int:
    """Run the trials, print the rows so far after each and the table in the end, return the number lost."""
    processes = (2,) if fsdp else (1, 2)
    rng, counts = random.Random(seed), {(way, count): [0, 0, 0] for way in WAYS for count in processes}
    if fsdp:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "recipe.py").write_text(FSDP_RECIPE if fsdp else RECIPE)
        whole, seconds = {}, {}
        for count in processes:
            began = time.monotonic()
            assert wait(start(root / f"unbroken{count}", count, 0)) == [0] * count, (root / f"unbroken{count}.log").read_text()
            seconds[count], whole[count] = time.monotonic() - began, contents(root / f"unbroken{count}")
        done = 0
        while done < kills:
            way, count = list(counts)[done % len(counts)]
            folder = root / f"run{done}-{time.monotonic_ns()}"
            if not trial(folder, count, way, seconds[count], rng):
                continue  # it had finished: no kill
            done += 1
            resumed = wait(start(folder, count, rng.choice((0, 2)))) == [0] * count
            equal = resumed and same(contents(folder), whole[count])
            for i, happened in enumerate((True, resumed, equal)):
                counts[way, count][i] += happened
            if not equal:
                print(f"LOST: {way}, {count} processes\n{(root / f'{folder.name}.log').read_text()[-3000:]}", flush=True)
            print(json.dumps(results(counts, fsdp)), flush=True)
    rows = results(counts, fsdp)
    print(table(rows))
    return sum(row["kills"] - row["bitwise_equal"] for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fsdp", action="store_true", help="two processes that share the network, as accelerate launch asks")
    arguments = parser.parse_args()
    sys.exit(benchmark(arguments.kills, arguments.seed, arguments.fsdp) > 0)
