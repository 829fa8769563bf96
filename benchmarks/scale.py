"""What grows with processes and with images.

    python -m benchmarks.scale

Two processes against one, on the same cores (each process has its share of them); and two runs at once, of half the batch each,
that exchange no gradients: what they lose is the optimizer's work, done twice, and the caches that they share. And the time and
memory that an image costs outside the network, for sets from a thousand to a million generated images.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.utils.cores import num_cores

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a run does
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--numbers", type=lambda text: [int(word) for word in text.split(",")], default=[1000, 30_000, 1_000_000]
    )
    parser.add_argument("--loaded", type=int, default=1000, help="images of each set that are loaded")
    parser.add_argument("--worker", choices=["images", "steps", "half"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        row = images(args.numbers[0], args.loaded) if args.worker == "images" else steps(32 if args.worker == "half" else 64)
        if row:
            print(json.dumps(row), flush=True)
        return 0
    cores = num_cores()
    two = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    speeds = {}
    for count, launcher in ((1, []), (2, two)):
        speeds[count] = worker([*launcher, "-m", "benchmarks.scale", "--worker", "steps"], cores // count)["images_per_second"]
    half = ["-m", "benchmarks.scale", "--worker", "half"]
    with ThreadPoolExecutor() as pool:
        rows = pool.map(worker, [half, half], [cores // 2] * 2)
        speeds["two apart"] = sum(row["images_per_second"] for row in rows)
    print(
        f"{cores} cores: one process {speeds[1]:.0f} images/s, two with {cores // 2} each {speeds[2]:.0f}: "
        f"{speeds[2] / speeds[1]:.2f} times; two apart {speeds['two apart'] / speeds[1]:.2f} times"
    )
    rows = [
        worker(["-m", "benchmarks.scale", "--worker", "images", "--numbers", str(number), "--loaded", str(args.loaded)], cores)
        for number in args.numbers
    ]
    print("| images | planning an epoch, us an image | loading, us an image | bytes an image |\n|---|---|---|---|")
    for row in rows:
        print("| {images:,} | {plan_us:.2f} | {load_us:.0f} | {bytes:.0f} |".format(**row))
    first, last = rows[0], rows[-1]
    print(
        json.dumps(
            {
                "images_per_second": speeds,
                "images": rows,
                "holds": {
                    "two_processes_not_slower": speeds[2] >= 0.95 * speeds[1],
                    "loading_time_flat": last["load_us"] <= 1.2 * first["load_us"],
                    "planning_below_1_percent_of_loading": last["plan_us"] <= 0.01 * last["load_us"],
                    "below_200_bytes_an_image": last["bytes"] < 200,
                },
            }
        )
    )
    return 0


def worker(words: list[str], threads: int) -> dict:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def steps(batch: int) -> dict | None:
    """Training of a real network on generated images, in one process or two."""
    import tempfile

    from benchmarks.loop import InMemory, Watched, recipe_of
    from finetune.models.backbone import build_backbone
    from finetune.training.loop import train
    from finetune.training.setup import make_accelerator

    recipe = recipe_of("resnet18", 64, batch, 3)
    accelerator = make_accelerator(recipe)
    with tempfile.TemporaryDirectory() as folder:
        record = Watched(Path(folder), accelerator, recipe, quiet=True)
        train(recipe, build_backbone(recipe, 10), (InMemory(1280, 64), InMemory(64, 64)), record, accelerator)
        accelerator.wait_for_everyone()
    return {"images_per_second": max(record.speeds)} if accelerator.is_main_process else None


def images(number: int, loaded: int) -> dict:
    """A set of `number` images: seconds to plan an epoch and to load some of it, and memory of the whole."""
    import numpy as np
    import torch
    from PIL import Image

    from finetune.data.batches import plan_epoch
    from finetune.data.dataset import ImageList
    from finetune.data.loader import ImageDataset, load
    from finetune.images.transforms import Pixels
    from finetune.recipe import Augment
    from finetune.utils.device import peak_memory

    def draw(index: int) -> Image.Image:
        return Image.fromarray(np.full((64, 64, 3), index % 256, np.uint8))

    same = {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "center"}
    inputs = {"input_size": (3, 64, 64), **same}
    before = peak_memory(torch.device("cpu"))
    labels = np.arange(number) % 10
    images = ImageDataset(ImageList(range(number), labels, draw), Pixels(inputs, Augment()), 0, tuple("0123456789"))
    start = time.perf_counter()
    planned = plan_epoch(number, 64, 0, 0)
    plan = time.perf_counter() - start
    used = peak_memory(torch.device("cpu")) - before
    start = time.perf_counter()
    count = sum(len(batch) for batch, _ in load(images, 0, [plan.images for plan in planned[: loaded // 64]], 0))
    return {
        "images": number,
        "plan_us": 1e6 * plan / number,
        "load_us": 1e6 * (time.perf_counter() - start) / count,
        "bytes": 2**30 * used / number,
    }


if __name__ == "__main__":
    sys.exit(main())
