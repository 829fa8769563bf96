"""The same recipe on the same images, read in two or three ways: three seeds of each.

    python -m benchmarks.inputs channels --data DIR --label "chest X-rays, PQF weights" --weights FILE
    python -m benchmarks.inputs shape --data DIR --label "magnetic tiles, PQF weights" --weights FILE
    python -m benchmarks.inputs sizes --data DIR --label "CIFAR-10, JPEG copy, 100 a class, PQF weights" --weights FILE

channels: grey images as three copies and in one channel, with a ResNet-18; the first layer then has the sum of its pretrained
weights over red, green and blue, and the mean and deviation are the images' own. shape: images of all shapes padded, cut and
squashed to a square. sizes: one size, a larger one to evaluate at, and sizes that grow, with more epochs for as many pixels.
Run folders go to --runs; a finished run is a line of --output, and is not run again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = {  # the command of both, and what each way adds
    "channels": (
        ["resnet50_xray", "--set", "backbone=resnet18"],
        {"three copies": [], "one channel": ["--set", "data.channels=1"]},
    ),
    "shape": (
        ["resnet18_tiles"],
        {"padded": [], "cut": ["--set", "data.resize=crop"], "squashed": ["--set", "data.resize=squash"]},
    ),
    "sizes": (
        ["resnet18_cifar", "--lr-scale", "0.33", "--set", "data.batch_size=32"],
        {
            "128 px, 8 epochs": ["--epochs", "8"],
            "128 px, evaluated at 160, 8 epochs": ["--epochs", "8", "--set", "data.test_size=160"],
            "64 to 128 px, 12 epochs": ["--epochs", "12", "--set", "data.start_size=64"],
            "64 to 128 px, evaluated at 160, 12 epochs": [
                *["--epochs", "12"],
                *["--set", "data.start_size=64", "--set", "data.test_size=160"],
            ],
        },
    ),
}
KEPT = ("top1", "macro_f1", "auroc", "linear_probe_macro_f1", "val_images", "seconds", "images_per_second", "versions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--label", required=True, help="what images and weights are called")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "inputs.jsonl")
    args = parser.parse_args()
    command, ways = QUESTIONS[args.question]
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    done = {(row["images"], row["way"], row["seed"]) for row in map(json.loads, lines)}
    for seed in range(args.seeds):
        for way, more in ways.items():
            if (args.label, way, seed) in done:
                continue
            what = {"question": args.question, "images": args.label, "way": way, "seed": seed}
            name = f"{args.question}-{'-'.join(re.findall('[a-z0-9]+', way))}-{seed}"
            row = {**what, **run(args, [*command, *more], name, seed)}
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0


def run(args: argparse.Namespace, command: list[str], name: str, seed: int) -> dict:
    folder = args.runs.resolve() / name
    line = [sys.executable, "-m", "finetune", "train", *command, "--data", args.data, "--weights", args.weights]
    line += ["--output", str(folder), "--seed", str(seed), "--quiet"]
    subprocess.run(line, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "result.json").read_text())
    return {key: result[key] for key in KEPT}


if __name__ == "__main__":
    sys.exit(main())
