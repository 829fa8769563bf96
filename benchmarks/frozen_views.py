"""What frozen_views saves: an epoch of a stage whose first layers are frozen, computed from images and from what was kept.

    python -m benchmarks.frozen_views

Generated JPEGs, random weights. The two ways take turns, each in a process of its own; times are medians over epochs. Beside
them stands how many times fewer multiplications an epoch has, as torch counts them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"head": "fc", "head and layer4": "fc|layer4"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(epoch_seconds(args, *args.worker)))
        return 0
    found: dict[str, dict[str, list[float]]] = {stage: {"computed": [], "kept": []} for stage in STAGES}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images)
        for _ in range(args.pairs):
            for stage, ways in found.items():
                for way, seconds in ways.items():
                    line = [sys.executable, "-m", "benchmarks.frozen_views", *sys.argv[1:], "--worker", stage, way, folder]
                    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
                    if done.returncode:
                        sys.exit(done.stderr[-3000:])
                    seconds.append(json.loads(done.stdout.splitlines()[-1]))
    result = {}
    for stage, ways in found.items():
        ratios = [computed / kept for computed, kept in zip(ways["computed"], ways["kept"], strict=True)]
        result[stage] = {
            **{way: min(seconds) for way, seconds in ways.items()},
            "times_faster": round(statistics.median(ratios), 1),
            "times_fewer_operations": round(times_fewer_operations(args, STAGES[stage]), 1),
        }
    head, layer4 = (result[stage]["times_faster"] for stage in STAGES)
    print(json.dumps({**result, "holds": {"head_10_times_faster": head >= 10, "layer4_3_times_faster": layer4 >= 3}}))
    return 0


def write_images(folder: Path, number: int) -> None:
    """Photographs of noise, a fifth of them to validate on."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(number):
        place = folder / ("val" if i % 5 == 0 else "train") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(small).resize((240, 200)).save(place / f"{i}.jpg")


def times_fewer_operations(args: argparse.Namespace, trained: str) -> float:
    """Multiplications of an epoch, validation included, with the frozen layers computed, to those with them kept."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net, layers = timm.create_model(args.backbone, num_classes=2).eval(), tuple(trained.split("|"))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(layers))
    with FlopCounterMode(display=False) as training:
        net(image := torch.zeros(1, 3, args.image_size, args.image_size)).sum().backward()
    with FlopCounterMode(display=False) as validating, torch.no_grad():
        net(image)
    whole, kept = 0, 0
    for counts, images in ((training.get_flop_counts(), 4), (validating.get_flop_counts(), 1)):  # four train, one validates
        for module, operations in counts.items():
            if module.count(".") == 1:  # ResNet.layer1 and its like
                number = images * sum(operations.values())
                whole += number
                kept += number * module.split(".")[1].startswith(layers)
    return whole / kept


def epoch_seconds(args: argparse.Namespace, stage: str, way: str, folder: str) -> float:
    """The median time of an epoch, of training and validation, after those in which something is computed once."""
    from finetune.data.sources import load_data
    from finetune.models.backbone import build_backbone
    from finetune.recipe import AdamW, Augment, Constant, Data, Group, Recipe
    from finetune.training.logger import Logger
    from finetune.training.loop import train
    from finetune.training.setup import RunOptions, build_datasets, make_accelerator

    recipe = Recipe(
        backbone=args.backbone,
        weights="none",
        data=Data(folder, args.image_size, args.batch_size),
        augment=Augment(frozen_views=1 if way == "kept" else args.epochs),  # as many as epochs: none twice, nothing kept
        groups=(Group("trains", STAGES[stage], lr=1e-3), Group("rest", ".", lr=0)),
        optimizer=AdamW(),
        schedule=Constant(),
        batch_norm="frozen",
        epochs=args.epochs,
    )
    ends = []

    class Timed(Logger):
        def log_epoch(self, *arguments):
            super().log_epoch(*arguments)
            ends.append(time.perf_counter())

    accelerator, data = make_accelerator(recipe), load_data(recipe)
    net = build_backbone(recipe, len(data.classes))
    with tempfile.TemporaryDirectory() as run:
        logger = Timed(Path(run), accelerator, recipe, quiet=True)
        train(recipe, net, build_datasets(recipe, net, data), logger, accelerator, RunOptions(quiet=True))
    return statistics.median(later - earlier for earlier, later in zip(ends[:-1], ends[1:], strict=True))


if __name__ == "__main__":
    sys.exit(main())
