"""What each choice of a recipe is worth: the recipe with one thing changed at a time, on the same images, with the same seeds.

    python -m benchmarks.ablations --recipe efficientnet_lite0_digits
    python -m benchmarks.ablations --recipe efficientnet_lite0_cifar --data DIR --label "CIFAR-10, JPEG copy"

Each finished run is a line in --output, and is not run again. "Within noise" is a difference of less than two standard errors,
of the seeds or of the validation images, whichever is larger. All arms share their validation images, so this errs on the safe
side.
"""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]

ARMS = {  # what is appended to the recipe's file
    "the recipe": "",
    "one learning rate for all groups, the highest": "lrs(lambda row: max(other.lr for other in recipe.groups))",
    "no linear probe: all layers from a random head": "change(linear_probe=None)",
    "no linear probe: only the head in the first epoch": "change(linear_probe=None); starts(lambda i: int(i > 0))",
    "linear probe, then one more group each epoch": "starts(lambda i: min(i, recipe.epochs - 1))",
    "linear probe, then only the head": "change(groups=(recipe.groups[0], Group('rest', '.', lr=0)))",
    "batch norm in train mode": "change(batch_norm='train')",
    "weight decay on biases and norms too": "from finetune.optim import param_groups; "
    "param_groups.no_weight_decay = lambda net: set()",
    "no weight decay": "change(optimizer=AdamW(weight_decay=0.0, **recipe.optimizer.options))",
    "step schedule: a third of the learning rate after each third": "change(schedule=Step("
    "every=max(1, recipe.epochs // 3), factor=1 / 3, warmup_epochs=recipe.schedule.warmup_epochs))",
    "plateau schedule: a third after an epoch without gain": "change(schedule=Plateau(factor=1 / 3, patience=0, "
    "warmup_epochs=recipe.schedule.warmup_epochs))",
    "no warmup": "change(schedule=Cosine())",
    "no clipping": "change(clip_norm=None)",
    "layer decay in place of the rows": "change(groups=LayerDecay(head_lr=recipe.groups[0].lr, stem_ratio=0.1))",
    "SGD with momentum, at ten times the learning rates": "lrs(lambda row: 10 * row.lr); "
    "change(optimizer=SGD(momentum=0.9, weight_decay=1e-4))",
    "SGD, and one more group each epoch": "lrs(lambda row: 10 * row.lr); starts(lambda i: min(i, recipe.epochs - 1)); "
    "change(optimizer=SGD(momentum=0.9, weight_decay=1e-4))",
    "a third of the learning rates": "lrs(lambda row: row.lr / 3)",
    "a third of the learning rates, and one more group each epoch": "lrs(lambda row: row.lr / 3); "
    "starts(lambda i: min(i, recipe.epochs - 1))",
    "three times the learning rates": "lrs(lambda row: 3 * row.lr)",
    "three times the learning rates, and one more group each epoch": "lrs(lambda row: 3 * row.lr); "
    "starts(lambda i: min(i, recipe.epochs - 1))",
    "three times every learning rate": "change(lr_scale=3.0)",
    "average of the weights, decay 0.99": "change(ema_decay=0.99)",
    "mixup, 0.2": "change(augment=replace(recipe.augment, mixup=0.2))",
    "no label smoothing": "change(label_smoothing=0.0)",
}
APPENDED = """

from dataclasses import replace
from finetune import *


def change(**fields):
    global recipe
    recipe = replace(recipe, **fields)


def lrs(of):
    change(groups=tuple(replace(row, lr=of(row)) for row in recipe.groups))


def starts(of):
    change(groups=tuple(replace(row, unfreeze_at=of(i)) for i, row in enumerate(recipe.groups)))


{change}
"""


def main() -> int:
    args = arguments()
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    if not args.report:
        done = run_missing(args, done)
    done = [row for row in done if row["images"] == args.label]
    rows = compare(done)
    print(f"\n{args.label}: {done[0]['recipe']}, {done[0]['val_images']} validation images\n\n{table(rows)}")
    print(json.dumps({"images": args.label, "arms": rows}))
    return 0


def run_missing(args: argparse.Namespace, done: list[dict]) -> list[dict]:
    """Run what is not done yet, and add each run to --output; all runs."""
    from finetune.recipe.load import load_recipe

    _, file = load_recipe(args.recipe)
    there = {(row["images"], row["arm"], row["seed"]) for row in done}
    for seed in range(args.seeds) if args.seed is None else [args.seed]:
        for arm in ARMS:
            if not any(words in arm for words in args.only.split("|")) or (args.label, arm, seed) in there:
                continue
            row = {"images": args.label, "recipe": file.stem, "arm": arm, "seed": seed, **one_run(file, args, arm, seed)}
            done.append(row)
            with open(args.output, "a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(f"{arm}, seed {seed}: {row['top1']:.2%} in {row['seconds']:.0f} s", flush=True)
    return done


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="efficientnet_lite0_digits")
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--label", help="what the table calls the images (default: the recipe)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="this one alone, where others run beside it")
    parser.add_argument("--workers", default="0", help="loader processes of each run")
    parser.add_argument("--only", default="", metavar="WORDS", help="arms with such words in them: a|b")
    parser.add_argument("--output", type=Path, default=Path("ablations.jsonl"))
    parser.add_argument("--report", action="store_true", help="the table of what is in --output, without running")
    args = parser.parse_args()
    args.label = args.label or args.recipe
    return args


def one_run(file: Path, args: argparse.Namespace, arm: str, seed: int) -> dict:
    """Top-1 of the changed recipe."""
    from finetune.optim import param_groups

    decays = param_groups.no_weight_decay
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "changed.py"
        changed.write_text(file.read_text() + APPENDED.replace("{change}", ARMS[arm]))
        line = ["--recipe", str(changed), "--seed", str(seed), "--workers", args.workers]
        line += [word for assignment in args.assignments for word in ("--set", assignment)]
        result = result_of([*line, *(["--data", args.data] if args.data else [])])
    param_groups.no_weight_decay = decays
    return {"top1": result["top1"], "seconds": result["seconds"], "val_images": result["val_images"]}


def result_of(line: list[str]) -> dict:
    """What a run ends with, by the real command line; SystemExit if it fails."""
    from finetune.run import main as finetune

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        code = finetune([*line, "--output", f"{folder}/run", "--quiet"])
        from accelerate.state import AcceleratorState  # not before: the command sets how threads wait, and then loads torch

        AcceleratorState._reset_state(reset_partial_state=True)
        if code:
            raise SystemExit(f"the run failed: {' '.join(line)}")
        return json.loads((Path(folder) / "run" / "result.json").read_text())


def compare(done: list[dict]) -> list[dict]:
    """A row for each arm: its mean over seeds, the difference from the recipe's, and whether that is more than noise."""
    by_arm = {arm: [row["top1"] for row in done if row["arm"] == arm] for arm in ARMS}
    base = by_arm["the recipe"]
    rows = []
    for arm, found in by_arm.items():
        if not found:
            continue
        mean, images = statistics.mean(found), done[0]["val_images"]
        difference = mean - statistics.mean(base)
        of_seeds = [statistics.variance(part) / len(part) for part in (found, base) if len(part) > 1]
        of_images = [share * (1 - share) / images for share in (mean, statistics.mean(base))]
        error = math.sqrt(max(sum(of_seeds), sum(of_images)))
        verdict = "within noise" if abs(difference) < 2 * error else "better" if difference > 0 else "worse"
        rows.append(
            {
                "arm": arm,
                "seeds": len(found),
                "mean": mean,
                "low": min(found),
                "high": max(found),
                "difference": difference,
                "verdict": verdict if arm != "the recipe" else "",
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows of `compare` in Markdown."""
    lines = ["| changed | top-1 | range | difference | |", "|---|---|---|---|---|"]
    for row in rows:
        difference = "" if row["arm"] == "the recipe" else f"{100 * row['difference']:+.1f}"
        lines.append(
            f"| {row['arm']} | {row['mean']:.1%} | {row['low']:.1%} to {row['high']:.1%} | {difference} | {row['verdict']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
