"""LoRA beside full fine-tuning and the linear probe: top-1, memory and seconds of a step.

    python -m benchmarks.lora steps
    python -m benchmarks.lora scores --data DIR --label "CIFAR-10, JPEG copy" --weights resnet18_cifar=FILE

`scores`: each way's learning rates are the best of as many tried on a fifth of the training images held out (one seed); then
three seeds of it are scored on the validation images. Each finished run is a line in --output, and is not run again. `steps`
are on random images and weights, each way in a process of its own, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import frozen
from finetune.recipe import Group, Lora, Recipe
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {  # of the recipes: Linear and Conv2d without groups
    "efficientnet_lite0_cifar": r"conv_head\.|blocks\..*\.(conv_pw|conv_pwl)\.",
    "resnet18_cifar": r"layer\d\.\d\.(conv\d|downsample\.0)\.",
}
WAYS = {  # factors on the rows' learning rates; learning rates
    "full": (0.1, 0.33, 1.0, 3.0, 10.0),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
APPENDED = """
from dataclasses import replace
from benchmarks.lora import changed
recipe = changed(recipe, "{name}", "{way}", {lr})
"""


def changed(recipe: Recipe, name: str, way: str, lr: float) -> Recipe:
    """The recipe at these learning rates, of the way "full" or "lora"; on few images its batch is one for few."""
    recipe = replace(recipe, data=replace(recipe.data, batch_size=32))
    if way == "full":
        return replace(recipe, lr_scale=lr)
    head = next(row for row in recipe.groups if row.name == "head")
    return replace(recipe, groups=(head, Lora("layers", LAYERS[name], lr=lr), Group("rest", ".", lr=0)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "scores"))
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--label", help="what the images are called")
    parser.add_argument("--weights", action="append", default=[], metavar="RECIPE=FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lora.jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, way = args.worker.split()
        recipe = replace(changed(load_recipe(name)[0], name, way, 1e-3), weights="none")
        print(json.dumps(frozen.steps(recipe, 8)))
        return 0
    if args.what == "steps":
        steps(args)
    else:
        for name in LAYERS:
            scores(args, name)
    return 0


def steps(args: argparse.Namespace) -> None:
    """Add a line for each recipe: seconds and memory of a step of either way, medians of three processes in turns."""
    for name in LAYERS:
        found = {way: [worker(f"{name} {way}") for _ in range(3)] for way in WAYS}
        row = {"recipe": name, "what": "steps"}
        for way, parts in found.items():
            row[way] = {key: statistics.median(part[key] for part in parts) for key in ("seconds", "gib")}
        add(args, row)


def worker(what: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lora", "steps", "--worker", what],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def scores(args: argparse.Namespace, name: str) -> None:
    """The runs of one recipe that are missing: learning rates on held-out images, then the seeds of the best."""
    for way, lrs in WAYS.items():
        tried = {lr: run(args, name, way, lr, seed=0, holdout=0.2)["top1"] for lr in lrs}
        best = max(tried, key=lambda lr: tried[lr])
        for seed in range(args.seeds):
            run(args, name, way, best, seed, holdout=0.0)


def run(args: argparse.Namespace, name: str, way: str, lr: float, seed: int, holdout: float) -> dict:
    """One run by the command line, or what --output has of it."""
    key = {"recipe": name, "images": args.label, "way": way, "lr": lr, "seed": seed, "holdout": holdout}
    kept = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    if found := next((row for row in kept if key.items() <= row.items()), None):
        return found
    weights = dict(pair.split("=", 1) for pair in args.weights).get(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "changed.py"
        file.write_text(load_recipe(name)[1].read_text() + APPENDED.format(name=name, way=way, lr=lr))
        line = [sys.executable, "-m", "finetune", "train", str(file), "--data", args.data, "--output", f"{folder}/run"]
        line += ["--seed", str(seed), "--set", f"data.holdout={holdout}", "--quiet", "--workers", "0", "--processes", "1"]
        line += ["--weights", weights] if weights else []
        process = subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        _, code, used = os.wait4(process.pid, 0)
        if code:
            raise SystemExit(f"{name}, {way}, {lr}: the run failed")
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    names = ("top1", "linear_probe_top1", "val_images", "seconds")
    row = key | {word: result.get(word) for word in names} | {"peak_gib": used.ru_maxrss / 2**20}
    add(args, row)
    return row


def add(args: argparse.Namespace, row: dict) -> None:
    with open(args.output, "a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
