"""What each way of clipping costs, as a share of a step.

    python -m benchmarks.clipping --backbone resnet18 --image-size 64

Steps with each way take turns in one process, so that a busy machine slows all alike; medians are compared.
"""

import argparse
import json
import statistics
import time

import torch

from finetune.models.backbone import build_backbone
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import AdamW, Constant, Data, LayerDecay, Recipe
from finetune.training.loop import clip_gradients

WAYS = {
    "none, but the norm logged": {"clip_norm": None},
    "norm": {"clip_norm": 1.0},
    "norm of type inf": {"clip_norm": 1.0, "clip_norm_type": float("inf")},
    "value": {"clip_norm": None, "clip_value": 0.1},
    "adaptive": {"clip_norm": None, "clip_adaptive": 0.01},
}


def recipe(args: argparse.Namespace, **changes) -> Recipe:
    return Recipe(
        backbone=args.backbone,
        weights="none",
        data=Data("generated", args.image_size, args.batch_size),
        epochs=1,
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.1),
        optimizer=AdamW(),
        schedule=Constant(),
        batch_norm="frozen",
        **changes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = build_backbone(recipe(args), 10).to(device)
    optimizer = build_optimizer(build_param_groups(recipe(args), net))
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    clipping, whole = {way: [] for way in WAYS}, {way: [] for way in WAYS}

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for turn in range(args.rounds + 2):
        for way, changes in WAYS.items():
            start = now()
            optimizer.zero_grad()
            net(images).square().mean().backward()
            before = now()
            clip_gradients(recipe(args, **changes), optimizer)
            after = now()
            optimizer.step()
            if turn >= 2:  # the first ones warm up
                clipping[way].append(after - before)
                whole[way].append(now() - start)
    shares = {way: statistics.median(clipping[way]) / statistics.median(whole[way]) for way in WAYS}
    print(f"{args.backbone}, {args.batch_size} images of {args.image_size} px, {device}, {torch.get_num_threads()} threads")
    for way, share in shares.items():
        print(f"{way:26} {1e3 * statistics.median(clipping[way]):7.2f} ms, {share:6.2%} of a step")
    print(json.dumps({"share_of_a_step": {way: round(share, 4) for way, share in shares.items()}}))


if __name__ == "__main__":
    main()
