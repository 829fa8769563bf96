"""What frozen layers save: memory and time while only the head trains, and a linear probe on features computed once.

    python -m benchmarks.frozen

Memory is the process's highest, above what it was before the first step, in a process for each stage. Times are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from finetune.recipe import AdamW, Constant, Data, Group, Recipe

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a run does
ROOT = Path(__file__).resolve().parents[1]

STAGES = {
    "everything trains": "Group('all', '.', lr=1e-3)",
    "only the head trains": "Group('head', '{head}', lr=1e-3), Group('rest', '.', lr=0)",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--head", default="fc")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--worker", choices=[*STAGES, "features"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(features(args) if args.worker == "features" else steps(recipe_of(args, args.worker), args.steps)))
        return 0
    found = {}
    for name in (*STAGES, "features"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.frozen", *sys.argv[1:], "--worker", name],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found[name] = json.loads(done.stdout.splitlines()[-1])
    whole, head, kept = found["everything trains"], found["only the head trains"], found["features"]
    memory = head["gib"] / whole["gib"]
    faster = head["seconds"] / kept["seconds"]
    print(f"{args.backbone}, {args.batch_size} images of {args.image_size} px")
    for name in STAGES:
        print(f"{name:20} {1e3 * found[name]['seconds']:8.1f} ms a step, {found[name]['gib']:.3f} GiB")
    print(
        f"{'features kept':20} {1e3 * kept['seconds']:8.1f} ms as many images\n"
        f"memory while only the head trains: {memory:.0%}; kept features: {faster:.0f} times faster than computing them"
    )
    print(
        json.dumps(
            {
                **found,
                "memory_share": round(memory, 3),
                "times_faster": round(faster, 1),
                "holds": {"memory_at_most_40_percent": memory <= 0.4, "kept_features_10_times_faster": faster >= 10},
            }
        )
    )
    return 0


def recipe_of(args: argparse.Namespace, stage: str) -> Recipe:
    rows = eval(f"({STAGES[stage].format(head=args.head)},)", {"Group": Group})
    return Recipe(
        backbone=args.backbone,
        weights="none",
        data=Data("generated", args.image_size, args.batch_size),
        groups=rows,
        optimizer=AdamW(),
        schedule=Constant(),
        batch_norm="frozen",
        epochs=1,
    )


def steps(recipe: Recipe, number: int) -> dict:
    """Steps of a recipe as the loop takes them, on random images: median seconds, and the memory they need."""
    import torch

    from finetune.data.batches import BatchPlan
    from finetune.data.loader import Batch, ImageDataset
    from finetune.models.backbone import build_backbone
    from finetune.models.batch_norm import set_train_mode
    from finetune.optim.freezing import start_stage
    from finetune.optim.loss import Criterion
    from finetune.optim.optimizers import build_optimizer
    from finetune.optim.param_groups import build_param_groups
    from finetune.training.loop import train_step
    from finetune.training.setup import make_accelerator
    from finetune.utils.device import peak_memory

    accelerator, net = make_accelerator(recipe), build_backbone(recipe, 10)
    criterion = Criterion(recipe, net, ImageDataset(range(10), None, 0, tuple("0123456789")), accelerator.device)
    groups = build_param_groups(recipe, net)
    optimizer = accelerator.prepare(build_optimizer(groups))
    start_stage(groups, optimizer, 0)
    set_train_mode(net, recipe.batch_norm)
    indices, size = list(range(recipe.data.batch_size)), recipe.data.image_size
    images = torch.randn(len(indices), 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(len(indices)) % 10
    before, seconds = peak_memory(accelerator.device), []
    for step in range(number):
        start = time.perf_counter()
        batch = Batch(BatchPlan(step, indices, [indices], [0]), [(images, labels)])
        train_step(recipe, net, criterion, optimizer, batch, accelerator)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "gib": peak_memory(accelerator.device) - before}


def features(args: argparse.Namespace) -> dict:
    """A pass of the fit over kept features of as many images."""
    import timm
    import torch
    from torch.nn.functional import cross_entropy

    from finetune.models.linear_probe import fit

    net = timm.create_model(args.backbone, num_classes=10)
    number, passes = 20 * args.batch_size, []
    kept, labels = torch.randn(number, net.get_classifier().in_features), torch.arange(number) % 10

    def loss(logits, targets):
        passes.append(time.perf_counter())
        return cross_entropy(logits, targets, reduction="sum")

    fit(net.get_classifier(), kept, labels, loss, 0.1)
    return {"seconds": (passes[-1] - passes[0]) / (len(passes) - 1) / 20}


if __name__ == "__main__":
    sys.exit(main())
