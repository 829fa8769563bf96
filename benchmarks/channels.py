"""Grey images in one channel against three copies of it: the same recipe, three seeds of each.

    python -m benchmarks.channels --data DIR --label "chest X-rays, PQF weights" --weights FILE

The recipe is resnet50_xray with a ResNet-18. With one channel the first layer has the sum of its pretrained weights over red,
green and blue, and the mean and deviation are the images' own. A finished run is a line of --output, and is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"three copies": [], "one channel": ["--set", "data.channels=1"]}
KEPT = ("top1", "macro_f1", "auroc", "linear_probe_macro_f1", "val_images", "seconds", "images_per_second", "versions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="grey images: train/CLASS and val/CLASS")
    parser.add_argument("--label", required=True, help="what images and weights are called")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "channels.jsonl")
    args = parser.parse_args()
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    done = {(row["images"], row["way"], row["seed"]) for row in map(json.loads, lines)}
    for seed in range(args.seeds):
        for way in WAYS:
            if (args.label, way, seed) in done:
                continue
            row = {"images": args.label, "way": way, "seed": seed, **run(args, WAYS[way], seed)}
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0


def run(args: argparse.Namespace, more: list[str], seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "finetune", "train", "resnet50_xray", "--data", args.data, "--output", f"{folder}/run"]
        line += ["--weights", args.weights, "--set", "backbone=resnet18", "--seed", str(seed), "--quiet", *more]
        subprocess.run(line, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    return {key: result[key] for key in KEPT}


if __name__ == "__main__":
    sys.exit(main())
