"""What each choice of a recipe is worth: the recipe with one thing changed at a time, on the same images, with the same seeds.

    python -m benchmarks.ablations --recipe efficientnet_lite0_digits
    python -m benchmarks.ablations --recipe efficientnet_lite0_cifar --data DIR --label "CIFAR-10, JPEG copy"

Each finished run is a line in --output, and is not run again. What is within chance is said so: a difference of less than two
standard errors, of the seeds or of the validation images, whichever is more (the same images are scored in all arms, so the
latter is on the safe side).
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

from accelerate.state import AcceleratorState

from finetune import run
from finetune.optim import param_groups
from finetune.recipe.load import load_recipe

ARMS = {  # what is appended to the recipe's file
    "the recipe": "",
    "one rate for all, the highest of the table": "rates(lambda row: max(other.lr for other in recipe.groups))",
    "no linear probe: everything from a random head": "change(linear_probe=None)",
    "no linear probe: the head alone for an epoch": "change(linear_probe=None); starts(lambda i: int(i > 0))",
    "linear probe, then a group more each epoch": "starts(lambda i: min(i, recipe.epochs - 1))",
    "linear probe, then the head only": "change(groups=(recipe.groups[0], Frozen('rest', '.')))",
    "batch-norm statistics move": "change(batch_norm='train')",
    "weight decay on biases and norms, too": "from finetune import param_groups; "
    "param_groups.no_weight_decay = lambda net: set()",
    "no weight decay": "change(optimizer=AdamW(weight_decay=0.0, **recipe.optimizer.options))",
    "step: a third of the rate after each third": "change(schedule=Step(every=max(1, recipe.epochs // 3), factor=1 / 3, "
    "warmup_epochs=recipe.schedule.warmup_epochs))",
    "plateau: a third of the rate after an epoch without gain": "change(schedule=Plateau(factor=1 / 3, patience=0, "
    "warmup_epochs=recipe.schedule.warmup_epochs))",
    "no warmup": "change(schedule=Cosine())",
    "no clipping": "change(clip_norm=None)",
}
APPENDED = """

from dataclasses import replace
from finetune.lr_schedule import *
from finetune.recipe import *


def change(**fields):
    global recipe
    recipe = replace(recipe, **fields)


def rates(of):
    change(groups=tuple(replace(row, lr=of(row)) for row in recipe.groups))


def starts(of):
    change(groups=tuple(replace(row, unfreeze_at=of(i)) for i, row in enumerate(recipe.groups)))


{change}
"""


def main() -> int:
    args = arguments()
    recipe, file = load_recipe(args.recipe)
    label = args.label or str(recipe.data.source)
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    done = [row for row in done if row["images"] == label]
    for seed in range(args.seeds if not args.report else 0):
        for arm in ARMS:
            if args.only in arm and not any((row["arm"], row["seed"]) == (arm, seed) for row in done):
                done.append({"images": label, "recipe": file.stem, "arm": arm, "seed": seed, **one_run(file, args, arm, seed)})
                with open(args.output, "a") as lines:
                    lines.write(json.dumps(done[-1]) + "\n")
                print(f"{arm}, seed {seed}: {done[-1]['score']:.2%} in {done[-1]['seconds']:.0f} s", flush=True)
    rows = compared(done)
    print(
        f"\n{label}: {done[0]['recipe']}, {done[0]['val_images']} validation images, {args.seeds} seeds\n\n"
        "| changed | top-1 | range | difference | |\n|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['arm']} | {row['mean']:.1%} | {row['low']:.1%} to {row['high']:.1%} | {100 * row['difference']:+.1f} | "
            f"{row['verdict']} |"
        )
    print(json.dumps({"images": label, "arms": rows}))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="efficientnet_lite0_digits")
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--label", help="how the images are called in the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="WORDS", help="arms with these words in them")
    parser.add_argument("--output", type=Path, default=Path("ablations.jsonl"))
    parser.add_argument("--report", action="store_true", help="the table of what is in --output, without running")
    return parser.parse_args()


def one_run(file: Path, args: argparse.Namespace, arm: str, seed: int) -> dict:
    """The score of the changed recipe, by the real command line."""
    decays = param_groups.no_weight_decay
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "changed.py"
        changed.write_text(file.read_text() + APPENDED.replace("{change}", ARMS[arm]))
        line = ["--recipe", str(changed), "--output", f"{folder}/run", "--quiet", "--seed", str(seed)]
        line += [word for assignment in args.assignments for word in ("--set", assignment)]
        with contextlib.redirect_stdout(io.StringIO()):
            code = run.main([*line, *(["--data", args.data] if args.data else [])])
        param_groups.no_weight_decay = decays
        AcceleratorState._reset_state(reset_partial_state=True)
        if code:
            raise SystemExit(f"{arm}: the run failed")
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    return {"score": result["top1"], "seconds": result["seconds"], "val_images": result["val_images"]}


def compared(done: list[dict]) -> list[dict]:
    """A row for each arm: its mean over seeds, the difference from the recipe's, and whether that is more than chance."""
    scores = {arm: [row["score"] for row in done if row["arm"] == arm] for arm in ARMS}
    base = scores["the recipe"]
    rows = []
    for arm, found in scores.items():
        if not found:
            continue
        mean, images = statistics.mean(found), done[0]["val_images"]
        difference = mean - statistics.mean(base)
        of_seeds = [statistics.variance(part) / len(part) for part in (found, base) if len(part) > 1]
        of_images = [share * (1 - share) / images for share in (mean, statistics.mean(base))]
        error = math.sqrt(max(sum(of_seeds), sum(of_images)))
        verdict = "within chance" if abs(difference) < 2 * error else "better" if difference > 0 else "worse"
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


if __name__ == "__main__":
    sys.exit(main())
