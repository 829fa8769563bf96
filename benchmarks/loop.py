"""train() against the barest loop that does the same arithmetic on the same batches, which lie in memory.

    python -m benchmarks.loop

Epochs of both take turns in one process, and in two (with a thread each and DistributedDataParallel). What is timed are the
steps of an epoch; validation and checkpoints are start.py's. The smaller the network, the more a loop's own work
counts: the hard case is the first. At the end, what each part of a step takes that the bare loop does not have, or has done
before its clock starts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a run does
ROOT = Path(__file__).resolve().parents[1]

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.timers import timed
from finetune.data.batches import Cut, plan_epoch
from finetune.data.loader import ImageDataset
from finetune.models.backbone import build_backbone
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import AdamW, Cosine, Data, LayerDecay, Recipe
from finetune.training import loop as train_loop
from finetune.training.distributed import StopRequest
from finetune.training.logger import Logger
from finetune.training.setup import make_accelerator
from finetune.utils.cores import num_cores
from finetune.utils.seed import seed_all

CASES = {  # network, pixels, batch, steps an epoch
    "test_resnet, 32 px": ("test_resnet", 32, 64, 60),
    "resnet18, 64 px": ("resnet18", 64, 32, 15),
}
BAR = 0.98
FETCHED = "batches put together"
PARTS = {  # of a step: what does it
    FETCHED: (train_loop, "load_batches"),
    "gradients zeroed twice": (AcceleratedOptimizer, "zero_grad"),
    "log": (Logger, "log_step"),
    "seeds": (train_loop, "seed_all"),
    "learning rates": (train_loop, "set_lrs"),
    "asked to stop": (StopRequest, "agreed"),
}


class InMemory(ImageDataset):
    """Float images and labels that are there already."""

    preprocessing = {
        "input_size": (3, 64, 64),
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
    }

    def __init__(self, number: int, size: int):
        super().__init__(range(number), self, 0, tuple("0123456789"))
        generator = torch.Generator().manual_seed(0)
        self.tensors = torch.randn(number, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        self.targets = torch.randint(10, (number,), generator=generator)

    def __getitem__(self, key):
        return self.tensors[key[1]], self.targets[key[1]]

    def batch(self, images):
        return images


class Watched(Logger):
    """Knows how many images a second each epoch's steps took."""

    def log_epoch(self, *args):
        super().log_epoch(*args)
        self.speeds = [*getattr(self, "speeds", []), self.epoch_images / self.epoch_seconds]


def recipe_of(backbone: str, size: int, batch: int, epochs: int) -> Recipe:
    return Recipe(
        backbone=backbone,
        weights="none",
        data=Data("generated", size, batch),
        epochs=epochs,
        optimizer=AdamW(),
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.1),
        schedule=Cosine(warmup_epochs=0.5),
        batch_norm="frozen",
        label_smoothing=0.1,
        clip_norm=1.0,
    )


def bare(recipe: Recipe, net: nn.Module, images: InMemory, accelerator, epochs: int) -> list[float]:
    """Images a second of each epoch of a loop without logging, stages, checkpoints or anything else."""
    for module in net.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    count = accelerator.num_processes
    model = nn.parallel.DistributedDataParallel(net, forward_sync_buffers=False) if count > 1 else net
    parameters = list(net.parameters())
    optimizer = build_optimizer(build_param_groups(recipe, net))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    speeds = []
    for epoch in range(epochs):
        plans = plan_epoch(len(images), recipe.data.batch_size, 0, epoch, Cut(accelerator.process_index, count))
        batches = [(images.tensors[part], images.targets[part], plan.size) for plan in plans for part in plan.micro_batches]
        start = time.perf_counter()
        for batch, labels, size in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(batch), labels, reduction="sum", label_smoothing=0.1) / size * count
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
        accelerator.wait_for_everyone()
        speeds.append(len(images) / (time.perf_counter() - start))
    return speeds


def measure(case: str, rounds: int) -> dict:
    """Medians over epochs that take turns."""
    backbone, size, batch, steps = CASES[case]
    recipe = recipe_of(backbone, size, batch, 2)
    accelerator = make_accelerator(recipe)
    images, few, found = InMemory(steps * batch, size), InMemory(batch, size), {"ours": [], "bare": []}
    for _ in range(rounds):
        for name in found:
            seed_all(0)
            net = build_backbone(recipe, 10)
            if name == "bare":
                found[name] += bare(recipe, net, images, accelerator, recipe.epochs)[1:]
                continue
            with tempfile.TemporaryDirectory() as folder:
                record = Watched(Path(folder), accelerator, recipe, quiet=True)
                train_loop.train(recipe, net, (images, few), record, accelerator)
                found[name] += record.speeds[1:]  # the first epoch warms up
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    return {
        "case": case,
        "processes": accelerator.num_processes,
        **{name: round(speed, 1) for name, speed in medians.items()},
        "ratio": round(medians["ours"] / medians["bare"], 3),
        "step_ms": round(1e3 * batch / medians["bare"], 1),
        "parts_ms": parts(recipe, (images, few), accelerator, steps),
        "main": accelerator.is_main_process,
    }


def parts(recipe: Recipe, datasets: tuple[InMemory, InMemory], accelerator, steps: int) -> dict[str, float]:
    """Milliseconds of a step that each part takes in train()."""
    spent = dict.fromkeys(PARTS, 0.0)

    def watched(name: str, function):
        if name != FETCHED:
            return timed(spent, name, function)
        return lambda *args: iter(partial(timed(spent, name, next), function(*args), None), None)

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(patch.object(owner, attribute, watched(name, getattr(owner, attribute))))
        logger = Logger(Path(folder), accelerator, recipe, quiet=True)
        train_loop.train(recipe, build_backbone(recipe, 10), datasets, logger, accelerator)
    return {name: round(1e3 * seconds / (recipe.epochs * steps), 2) for name, seconds in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if (row := measure(args.worker, args.rounds)).pop("main"):
            print(json.dumps(row), flush=True)
        return 0
    rows = []
    for case in CASES:
        for processes, launcher in ((1, []), (2, ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"])):
            done = subprocess.run(
                [sys.executable, *launcher, "-m", "benchmarks.loop", "--worker", case, "--rounds", str(args.rounds)],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(max(1, num_cores() // processes))},
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            rows.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
            print(
                "{case}, {processes} process(es): train() {ours:.0f} images/s, bare {bare:.0f}; {ratio:.3f}".format(**rows[-1]),
                flush=True,
            )
            print("  of {step_ms} ms a step: {parts_ms}".format(**rows[-1]))
    print(
        json.dumps(
            {"cases": rows, "holds": {f"{row['case']}, {row['processes']} processes": row["ratio"] >= BAR for row in rows}}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
