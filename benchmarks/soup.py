"""Soups of runs that differ in their seeds, against the mean and the best of the runs.

    python -m benchmarks.soup --cifar DIR --signs DIR --runs DIR

Five seeds of efficientnet_lite0_cifar, as it is, and five of the recipe that `finetune suggest` writes for the second set, at
96 px for 4 epochs, with a fifth of the training images held out. What is finished is neither trained nor averaged again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from finetune.training.run_dir import new_run_dir
from finetune.tuning.soup import make_soup
from finetune.utils.files import write_file

RESULTS = Path(__file__).resolve().parent / "results" / "soup.json"
SEEDS = range(5)
SETS = {"cifar": "CIFAR-10, JPEG copy, 100 a class", "signs": "hand signs, 10 classes"}
SHORT = ["--set", "epochs=4", "--set", "data.image_size=96", "--set", "data.holdout=0.2"]
SOUPS = {  # the runs, and make_soup's options
    "cifar": [("uniform", 3, {}), ("uniform", 5, {})],
    "signs": [
        ("uniform", 3, {}),
        ("uniform", 5, {}),
        ("greedy", 5, {"greedy": True}),
        ("uniform, towards pretrained", 5, {"toward": True}),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SETS:
        parser.add_argument(f"--{name}", metavar="DIR", required=True, help=f"{SETS[name]}: class folders")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", default=Path("runs"), help="where runs lie, NAME-SEED (default: runs)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE.json", help="the record")
    args = parser.parse_args()
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []
    done = {(row["images"], row["soup"], row["runs"]) for row in rows}
    for name, soups in SOUPS.items():
        for kind, number, options in soups:
            if (SETS[name], kind, number) not in done:
                for seed in SEEDS[:number]:
                    train(name, seed, getattr(args, name), args.runs)
                rows.append(soup(name, kind, number, options, args.runs))
                write_file(args.output, json.dumps(rows, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    return 0


def train(name: str, seed: int, data: str, runs: Path) -> None:
    """One run, unless it is there."""
    folder = runs / f"{name}-{seed}"
    if (folder / "result.json").is_file():
        return
    new_run_dir(name, folder)
    recipe, more = "efficientnet_lite0_cifar", ["--data", data]
    if name == "signs":
        recipe, more = str(runs / "signs.py"), SHORT
        if not Path(recipe).is_file():
            runs.mkdir(parents=True, exist_ok=True)
            run("suggest", "--data", data, "--output", recipe)
    run("train", recipe, *more, "--set", f"seed={seed}", "--output", str(folder), "--processes", "1", "--quiet")


def run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "finetune", *words], check=True, stdout=sys.stderr)


def soup(name: str, kind: str, number: int, options: dict, runs: Path) -> dict:
    """A row of the record: in shares, with 95 % intervals of the differences."""
    folder = runs / f"soup-{name}-{kind.replace(', ', '-').replace(' ', '-')}-{number}"
    if not (folder / "result.json").is_file():
        make_soup([runs / f"{name}-{seed}" for seed in SEEDS[:number]], folder, **options)
    result = json.loads((folder / "result.json").read_text())
    made = result["soup"]
    return {
        "images": SETS[name],
        "soup": kind,
        "runs": number,
        "averaged": sum(row["share"] > 0 for row in made["runs"] if row["run"] != "start"),
        "share_of_start": made["share_of_start"],
        "val_images": result["val_images"],
        "measured_on": made["measured_on"],
        "top1_of_runs": [row["top1"] for row in made["runs"] if row["run"] != "start"],
        "top1": result["top1"],
        "minus_mean": made["soup_minus_mean"],
        "minus_best": made["soup_minus_best"],
        "seconds": result["seconds"],
        "versions": result["versions"],
        "hardware": result["hardware"],
    }


if __name__ == "__main__":
    sys.exit(main())
