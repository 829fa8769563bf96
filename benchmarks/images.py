"""Loading images: this repository's loader against timm's and a plain torchvision one, with the same variation.

    python -m benchmarks.images

Small images are JPEGs of 32 px brought to 128, large ones PNGs of 300 px brought to 224, all cut out of scikit-learn's two
photographs. Crops (half to all of an image), mirrors and normalised float batches of 32, one thread, no loader processes;
epochs of the three take turns. The first is left out: ours decodes in it. Of small ones, what each part of an epoch takes. Of
photographs, JPEGs of 3,000 px brought to 224, memory holds few, so first epochs are compared, ours with and without
`Data(reduced_decode=2)`.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torch.utils.data._utils import collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.timers import timed
from finetune.data import loader as data_loader
from finetune.data.batches import plan_epoch
from finetune.data.loader import ImageDataset, load
from finetune.data.sources import load_data
from finetune.images import transforms as own_transforms
from finetune.images.cache import DiskCache, ImageCache
from finetune.images.transforms import Pixels, training_transform
from finetune.recipe import AdamW, Augment, Constant, Data, LayerDecay, Recipe
from finetune.training.memory import keep_freed_memory

BATCH, SCALE, RATIO = 32, (0.5, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = {"small": (32, 128, "jpg", 5.0), "large": (300, 224, "png", 2.0)}  # pixels there, pixels wanted, format, bar

PARTS = {  # of loading an image that is decoded: what does it
    "resized": [(Pixels, "resize")],
    "normalised": [(Pixels, "batch")],
    "crop drawn and cut": [(own_transforms, "random_crop")],
    "seeds": [(data_loader, "seed_cpu"), (data_loader, "keyed_seed")],
    "found in the cache": [(ImageCache, "get")],
    "put into batches": [(collate, "default_collate")],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does; all three have it
    figures = {}
    for kind, (pixels, size, suffix, bar) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), args.images, pixels, suffix)
            loaders = {"ours": ours(folder, size), "timm": timms(folder, size), "torchvision": torchvisions(folder, size)}
            seconds = {name: [] for name in loaders}
            for epoch in range(args.epochs + 1):
                for name, loader in loaders.items():
                    start = time.perf_counter()
                    count = sum(len(batch) for batch, _ in loader(epoch))
                    seconds[name].append((time.perf_counter() - start) / count)
        micros = {name: 1e6 * statistics.median(times[1:]) for name, times in seconds.items()}
        times_faster = min(micros["timm"], micros["torchvision"]) / micros["ours"]
        print(
            f"{kind:6} {pixels} to {size} px: "
            + ", ".join(f"{name} {each:.0f} us an image" for name, each in micros.items())
            + f"; ours in its first epoch {1e6 * seconds['ours'][0]:.0f}; {times_faster:.1f} times faster"
        )
        figures[kind] = {
            **{f"{name}_us": round(each, 1) for name, each in micros.items()},
            "times_faster": round(times_faster, 2),
            "holds": times_faster >= bar,
        }
    figures["small"]["parts_us"] = parts(*KINDS["small"][:3], args.images)
    print(f"of small images: {figures['small']['parts_us']}")
    holds = {f"{kind}_{KINDS[kind][3]:g}_times_faster": row["holds"] for kind, row in figures.items()}
    print(json.dumps({**figures, "photographs": decoding(args.epochs), "holds": holds}))
    return 0


def parts(pixels: int, size: int, suffix: str, images: int) -> dict[str, float]:
    """Microseconds an image of each part of an epoch without decoding; what is left is Python's and torch's loader."""
    spent = dict.fromkeys(PARTS, 0.0)

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images, pixels, suffix)
        for name, places in PARTS.items():
            for owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, timed(spent, name, getattr(owner, attribute))))
        loader = ours(folder, size)
        for epoch in range(2):
            spent.update(dict.fromkeys(PARTS, 0.0))
            start = time.perf_counter()
            count = sum(len(batch) for batch, _ in loader(epoch))
            whole = time.perf_counter() - start
    spent["the rest"] = whole - sum(spent.values())
    return {name: round(1e6 * seconds / count, 1) for name, seconds in spent.items()}


def decoding(rounds: int, images: int = 32) -> dict:
    """Microseconds an image in epochs that decode."""
    pixels, size, suffix = 3000, 224, "jpg"
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images, pixels, suffix)
        seconds: dict[str, list[float]] = {"ours": [], "reduced": [], "kept": [], "timm": []}
        kept = partial(ours, folder, size, cache=Path(folder) / "cache" / "kept")
        for _ in kept()(0):
            pass  # a first run
        for _ in range(rounds):
            loaders = {
                "ours": ours(folder, size),
                "reduced": ours(folder, size, 2.0),
                "kept": kept(),  # a later one
                "timm": timms(folder, size),
            }
            for name, loader in loaders.items():
                start = time.perf_counter()
                count = sum(len(batch) for batch, _ in loader(0))
                seconds[name].append((time.perf_counter() - start) / count)
    micros = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    print(f"photographs, {pixels} to {size} px: " + ", ".join(f"{name} {each:.0f} us" for name, each in micros.items()))
    return {
        **{f"{name}_us": round(each, 1) for name, each in micros.items()},
        "times_faster": round(micros["ours"] / micros["reduced"], 2),
        "times_faster_than_timm": round(micros["timm"] / micros["reduced"], 2),
        "times_faster_kept": round(micros["ours"] / micros["kept"], 2),
    }


def write_images(folder: Path, number: int, pixels: int, suffix: str) -> None:
    """`number` cuts of the photographs, in two classes."""
    photographs, random = load_sample_images().images, np.random.RandomState(0)
    for i in range(number):
        side = 4 * pixels if pixels <= 100 else min(pixels, 400)
        top, left = random.randint(427 - side), random.randint(640 - side)
        image = Image.fromarray(photographs[i % 2][top : top + side, left : left + side]).resize((pixels, pixels))
        for part in ("train", "val")[: 2 if i < 2 else 1]:
            file = folder / part / f"class_{i % 2}" / f"{i:05}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)


def recipe_of(folder: str, size: int, reduced_decode: float | None = None) -> Recipe:
    return Recipe(
        backbone="resnet18",
        weights="none",
        data=Data(folder, size, BATCH, reduced_decode=reduced_decode),
        optimizer=AdamW(),
        schedule=Constant(),
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.1),
        batch_norm="frozen",
        epochs=1,
        augment=Augment(crop_scale=SCALE, crop_ratio=RATIO, hflip=0.5),
    )


def inputs_of(size: int) -> dict:
    same = {"interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_pct": 1.0, "crop_mode": "center"}
    return {"input_size": (3, size, size), **same}


def ours(folder: str, size: int, reduced_decode: float | None = None, cache: Path | None = None):
    recipe = recipe_of(folder, size, reduced_decode)
    data = load_data(recipe)
    shortest = math.ceil((reduced_decode or 0) * size)
    transform = training_transform(recipe, inputs_of(size))
    images = ImageDataset(data.train.read_with(shortest=shortest), transform, 0, data.classes)
    if cache:
        images.cache = DiskCache(cache, len(images), 2**31)
    return lambda epoch: load(images, epoch, [plan.images for plan in plan_epoch(len(images), BATCH, 0, epoch)], 0)


def timms(folder: str, size: int):
    loader = timm.data.create_loader(
        timm.data.create_dataset("", f"{folder}/train"),
        (3, size, size),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return lambda epoch: loader


def torchvisions(folder: str, size: int):
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE, RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(ImageFolder(f"{folder}/train", transform), BATCH, shuffle=True, drop_last=True)
    return lambda epoch: loader


if __name__ == "__main__":
    sys.exit(main())
