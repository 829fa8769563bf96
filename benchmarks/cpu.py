"""What speeds up training on a CPU: channels-last memory, bf16, torch.compile, a second core; each alone.

    python -m benchmarks.cpu

`train()` on random images that lie in memory, so that the network is all that is timed; each way in a process of its own, and
all ways of a network in turn. Also said: the seconds that the first epoch takes with all before it, in which a compiler works;
nothing that it compiled before is used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from finetune.utils.cores import num_cores

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {  # pixels, images a batch
    "efficientnet_lite0": (128, 32),
    "resnet18": (128, 32),
    "vit_tiny_patch16_224": (224, 16),
}
USUAL = "as it is"  # float32, channels last, all cores
WAYS = {
    USUAL: {},
    "contiguous memory": {"contiguous": True},
    "bf16": {"mixed_precision": "bf16"},
    "torch.compile": {"torch_compile": True},
    "bf16, torch.compile": {"mixed_precision": "bf16", "torch_compile": True},
    "one core": {"threads": 1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of an epoch; of four, the first of which is not timed")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.steps)))
        return 0
    networks = {}
    for network, (size, batch) in NETWORKS.items():
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, rows in found.items():
                line = [sys.executable, "-m", "benchmarks.cpu", "--steps", str(args.steps), "--worker", network, way]
                fresh = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
                done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=fresh)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                rows.append(json.loads(done.stdout.splitlines()[-1]))
        usual = found[USUAL]
        networks[network] = {"pixels": size, "batch": batch, "ways": {}}
        print(f"{network}, {batch} images of {size} px: {statistics.median(row['speed'] for row in usual):.1f} images/s")
        for way, rows in found.items():
            gains = [row["speed"] / base["speed"] for row, base in zip(rows, usual, strict=True)]
            networks[network]["ways"][way] = {
                "images_per_second": round(statistics.median(row["speed"] for row in rows), 1),
                "gain": round(statistics.median(gains), 2),
                "gains": [round(min(gains), 2), round(max(gains), 2)],
                "start_seconds": round(statistics.median(row["start"] for row in rows), 1),
            }
            row = networks[network]["ways"][way]
            print("  {way:20} {gain:.2f} times, the first epoch after {start_seconds} s".format(way=way, **row), flush=True)
    print(json.dumps({"cores": num_cores(), "networks": networks}))
    return 0


def measure(network: str, way: str, steps: int) -> dict:
    """Images a second, the median of three epochs; seconds to the end of the one before them."""
    import torch

    from benchmarks.loop import InMemory, Watched, recipe_of
    from finetune.models.backbone import build_backbone
    from finetune.training import loop
    from finetune.training.setup import make_accelerator
    from finetune.utils.seed import seed_all

    options = dict(WAYS[way])
    contiguous, threads = options.pop("contiguous", False), options.pop("threads", None)
    size, batch = NETWORKS[network]
    seed_all(0)
    start = time.perf_counter()
    recipe = replace(recipe_of(network, size, batch, 4), **options)
    accelerator = make_accelerator(recipe)
    if threads:
        torch.set_num_threads(threads)
    images = InMemory(steps * batch, size), InMemory(batch, size)
    layout = torch.contiguous_format if contiguous else torch.channels_last
    for one in images:
        one.tensors, one.memory_format = one.tensors.contiguous(memory_format=layout), layout
    with tempfile.TemporaryDirectory() as folder, patch("finetune.models.backbone.memory_format", lambda *_: layout):
        logger = Watched(Path(folder), accelerator, recipe, quiet=True)
        ends: list[float] = []
        logger.log_epoch = lambda *a, log=logger.log_epoch: (log(*a), ends.append(time.perf_counter()))
        loop.train(recipe, build_backbone(recipe, 10), images, logger, accelerator)
    return {"speed": statistics.median(logger.speeds[1:]), "start": ends[0] - start}


if __name__ == "__main__":
    sys.exit(main())
