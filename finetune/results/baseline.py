"""What a recipe promises: the record of the runs behind its number, and whether it is about this very recipe."""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.recipe import Recipe
from finetune.recipe.load import RECIPES
from finetune.recipe.recipe import METRICS
from finetune.recipe.serialize import changes
from finetune.utils.errors import RecipeError

IMPORT = "from finetune.baseline import Baseline\n"
Record = dict[str, Any]  # a file of baselines/, which record_runs writes


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The number of a recipe, written beside it by `python -m finetune.baseline` from its kept runs, and by nobody else.

    `mean` of the `metric` over `seeds` runs, as a fraction of `val_images` images; between `low` and `high` one more run lies
    with a chance of 95 % (see `interval`). `minutes` is a run's mean.
    """

    metric: str
    mean: float
    low: float
    high: float
    seeds: int
    val_images: int
    minutes: float
    hardware: str
    versions: str


def baseline_of(record: Record) -> Baseline:
    """What a record promises."""
    runs, hardware = record["runs"], record["hardware"]
    (low, high), metric = interval(record, 1), metric_of(record)
    return Baseline(
        metric=metric,
        mean=round(statistics.mean(run[metric] for run in runs), 4),
        low=round(low, 4),
        high=round(high, 4),
        seeds=len(runs),
        val_images=runs[0]["val_images"],
        minutes=round(statistics.mean(run["seconds"] for run in runs) / 60, 1),
        hardware=place(hardware) + (f" ({hardware['name']})" if hardware["device"] == "cpu" else ""),
        versions=", ".join(f"{name} {version.partition('+')[0]}" for name, version in record["versions"].items()),
    )


def place(hardware: dict[str, Any]) -> str:
    """What a recorded run had: its processes, and each one's cores or GPU."""
    cores = f"{hardware['threads']} CPU core{'s' * (hardware['threads'] > 1)}"
    return f"{hardware['processes']} x {cores if hardware['device'] == 'cpu' else hardware['name']}"


def metric_of(record: Record) -> str:
    return record["recipe"].get("metric", "top1")


def spread(record: Record, new: int) -> tuple[float, float]:
    """(mean, standard error) of the difference between the mean of `new` runs and that of the recorded ones.

    The error of one run is the larger of two: the standard deviation over the recorded seeds, and the binomial error of as many
    validation images, each counted right or wrong by chance, with Agresti and Coull's two more of each so that it is never 0.
    The seeds alone would promise too much: three may agree by accident.
    """
    scores = [run[metric_of(record)] for run in record["runs"]]
    mean, images = statistics.mean(scores), record["runs"][0]["val_images"]
    share = (mean * images + 2) / (images + 4)
    of_images = math.sqrt(share * (1 - share) / images)
    of_seeds = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return mean, max(of_seeds, of_images) * math.sqrt(1 / len(scores) + 1 / new)


def interval(record: Record, new: int) -> tuple[float, float]:
    """Where the mean of `new` runs lies with a chance of 95 % if nothing has changed."""
    mean, error = spread(record, new)
    return max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error)


def odds(record: Record, scores: list[float]) -> float:
    """The chance that runs like the recorded ones differ from them at least as much as these `scores` do in the mean."""
    mean, error = spread(record, len(scores))
    return math.erfc(abs(statistics.mean(scores) - mean) / error / math.sqrt(2))


def kept_record(recipe_file: Path, recipe: Recipe) -> tuple[Record | None, list[str]]:
    """(the record that is about this recipe, what a record beside it differs in).

    A record lies in baselines/NAME.json beside the recipe; a recipe that was copied elsewhere has that of its original. It is
    about the recipe as recorded: any changed field, but for the seed, makes its number no promise. Where the images were given
    by --data, the record says in words which they were.
    """

    def changed(record: Record) -> list[str]:
        before = record["recipe"] | {"seed": recipe.seed}
        if "images" in record:
            before["data"] = before["data"] | {"source": recipe.data.source}
        return [change.partition(":")[0] for change in changes(before, recipe)]

    file = recipe_file.parent / "baselines" / f"{recipe_file.stem}.json"
    files = [file] if file.is_file() else sorted((RECIPES / "baselines").glob("*.json"))
    records = [json.loads(path.read_text()) for path in files]
    fitting = next((record for record in records if not changed(record)), None)
    return fitting, changed(records[0]) if file.is_file() else []


def promise(recipe_file: Path, recipe: Recipe) -> str:
    """The number measured with this recipe, its spread and its runs, in one sentence, or that there is none."""
    record, differing = kept_record(recipe_file, recipe)
    if record:
        return f"{METRICS[recipe.metric]} {summary(record)}"
    return f"nothing: {', '.join(differing)} differs from what was measured" if differing else "nothing: not measured"


def summary(record: Record) -> str:
    """A record's number, like '98.9 % (98.6 to 99.2, 3 seeds)'."""
    scores = [100 * run[metric_of(record)] for run in record["runs"]]
    ends = f"{min(scores):.1f} to {max(scores):.1f}, {len(scores)} seeds" if len(scores) > 1 else "1 seed"
    images = f" on {record['images']}" if "images" in record else ""
    return f"{statistics.mean(scores):.1f} % ({ends}){images}"


def record_runs(folders: list[Path]) -> Record:
    """The record of finished runs of one recipe that differ in their seeds alone.

    Raises:
        RecipeError: if they differ in more, repeat a seed, or are not finished.
    """
    missing = [folder for folder in folders if not (folder / "result.json").is_file()]
    if missing:
        raise RecipeError(f"no finished run in {missing[0]}")
    recipes = [json.loads((folder / "recipe.json").read_text()) for folder in folders]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    seeds = [recipe.pop("seed") for recipe in recipes]
    if any(recipe != recipes[0] for recipe in recipes) or len(set(seeds)) < len(seeds):
        raise RecipeError("the runs must be of one recipe with a seed each")
    if any(result.get("smoke") for result in results):
        raise RecipeError("a smoke run is no result")
    keys = (
        "seed",
        *METRICS,
        "loss",
        "val_images",
        *(f"{kind}_{score}" for kind in ("head", "best") for score in METRICS),
        "by_kind",
        "seconds",
        "images_per_second",
        "peak_memory_gib",
    )
    return {
        "recipe": recipes[0],
        "runs": [{key: result[key] for key in keys if key in result} for result in results],
        "versions": results[0]["versions"],
        "hardware": results[0]["hardware"],
    }


def with_baseline(text: str, baseline: Baseline) -> str:
    """A recipe's source with the baseline as its last statement, in place of one that is there."""
    head = text.partition("\nbaseline = Baseline(")[0].rstrip()
    if IMPORT not in head:
        head = head.replace("from finetune.", f"{IMPORT}from finetune.", 1)
    values = [f"{field.name}={getattr(baseline, field.name)!r}".replace("'", '"') for field in dataclasses.fields(baseline)]
    return f"{head}\n\nbaseline = Baseline(\n    {', '.join(values[:7])},\n    {values[7]},\n    {values[8]},\n)\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.baseline",
        description="Write the record behind a recipe's number from its finished runs, and the baseline into the recipe.",
        epilog="example: python -m finetune.baseline recipes/resnet18_cifar.py runs/resnet18_cifar-*",
    )
    parser.add_argument("recipe", type=Path, metavar="FILE.py", help="the recipe")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="its finished runs' folders")
    parser.add_argument("--images", metavar="WORDS", help="what --data was, if the runs were given one")
    args = parser.parse_args()
    try:
        record = record_runs(args.runs)
    except RecipeError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    if args.images:
        record["images"], record["recipe"]["data"]["source"] = args.images, "--data"
    file = args.recipe.parent / "baselines" / f"{args.recipe.stem}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    args.recipe.write_text(with_baseline(args.recipe.read_text(), baseline_of(record)))
    print(summary(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
