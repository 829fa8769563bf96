"""Progressive unfreezing against all layers at once, in the same time: its first stage is cheap, since frozen layers are kept.

    python -m benchmarks.unfreezing --data DIR --label flowers --weights FILE

ResNet-18 on DIR/train and DIR/val. Each way's learning rates are the better of two scales, with one seed on a fifth of the
training images. Then each is run with three seeds, in turns. Each finished run is a line in --output, and is not run again.
The numbers of epochs were set by the time that they take, not by what they reach; nothing else should run on the machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.ablations import result_of

RECIPE = """
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18",
    weights={weights!r},
    data=Data({data!r}, image_size=128, batch_size=16, crop_pct=1.0),
    augment=Augment(crop_scale=(0.5, 1.0), color_jitter=0.0, frozen_views={views}),
    linear_probe=LinearProbe(),
    groups=(  # about as layer decay has them in what finetune suggest writes
        Group("head", r"fc\\.", lr=7e-4),
        Group("layer4", r"layer4\\.", lr=3.5e-4),
        Group("layer3", r"layer3\\.", lr=7e-5, unfreeze_at={start}),
        Group("stem", ".", lr=1.4e-5, unfreeze_at={start}),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",
    epochs={epochs},
    label_smoothing=0.1,
    ema_decay=0.99,
)
"""
ARMS = {
    "all layers for 6 epochs": {"epochs": 6, "start": 0, "views": 0},
    "layer4 for 8 epochs on 2 kept views, then all for 3": {"epochs": 11, "start": 8, "views": 2},
}
SCALES, SEEDS, CHOICE_SEED = (1.0, 3.0), range(3), 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--label", required=True, help="what the table calls the images")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("unfreezing.jsonl"))
    args = parser.parse_args()
    chosen = {}
    for arm in ARMS:
        tried = {scale: run(args, arm, CHOICE_SEED, scale, held_out=True)["top1"] for scale in SCALES}
        chosen[arm] = max(tried, key=tried.__getitem__)
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, runs in found.items():
            runs.append(run(args, arm, seed, chosen[arm], held_out=False))
    print(
        json.dumps(
            {
                arm: {
                    "lr_scale": chosen[arm],
                    "top1": statistics.mean(row["top1"] for row in runs),
                    "seconds": statistics.mean(row["seconds"] for row in runs),
                }
                for arm, runs in found.items()
            }
        )
    )
    return 0


def run(args: argparse.Namespace, arm: str, seed: int, lr_scale: float, held_out: bool) -> dict:
    """The line of one run, unless it is in --output already."""
    key = {"images": args.label, "arm": arm, "seed": seed, "lr_scale": lr_scale, "held_out": held_out}
    for line in args.output.read_text().splitlines() if args.output.is_file() else []:
        if key.items() <= (row := json.loads(line)).items():
            return row
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.py"
        file.write_text(RECIPE.format(data=args.data, weights=args.weights, **ARMS[arm]))
        line = ["--recipe", str(file), "--seed", str(seed), "--lr-scale", str(lr_scale)]
        result = result_of(line + ["--set", "data.holdout=0.2"] * held_out)
    row = key | {name: result[name] for name in ("top1", "macro_f1", "seconds", "val_images") if name in result}
    with open(args.output, "a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(row, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
