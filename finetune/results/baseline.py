"""A recipe's number: the record of the runs behind it, and whether it is about this very recipe."""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from finetune.recipe import Recipe
from finetune.recipe.legacy import new_names
from finetune.recipe.load import RECIPES
from finetune.recipe.metrics import METRICS, NO_SHARES, write_value
from finetune.recipe.serialize import diff, from_dict, to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import print_error

Record = dict[str, Any]  # a file of recipes/baselines/, which record_runs writes


def describe_hardware(hardware: dict[str, Any]) -> str:
    """What a recorded run had: its processes, and each one's cores or GPU."""
    cores = f"{hardware['threads']} CPU core{'s' * (hardware['threads'] > 1)}"
    return f"{hardware['processes']} x {cores if hardware['device'] == 'cpu' else hardware['name']}"


def metric_of(record: Record) -> str:
    """The name of the metric that the recorded recipe is measured by."""
    return str(new_names(record["recipe"], warn=False).get("metric", "top1"))


def mean_and_error(record: Record, new: int) -> tuple[float, float]:
    """(recorded mean, standard error of the difference between it and the mean of `new` runs).

    The error of one run is the larger of two: the standard deviation over the recorded seeds, and the binomial error of as many
    validation images, with Agresti and Coull's two more of each so that it is never 0. The seeds alone would give too narrow an
    interval: three may agree by accident.
    """
    values = [run[metric_of(record)] for run in record["runs"]]
    mean, images = statistics.mean(values), record["runs"][0]["val_images"]
    if metric_of(record) in NO_SHARES:  # whose spread the seeds alone tell
        return mean, statistics.stdev(values) * math.sqrt(1 / len(values) + 1 / new)
    share = (mean * images + 2) / (images + 4)
    of_images = math.sqrt(share * (1 - share) / images)
    of_seeds = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean, max(of_seeds, of_images) * math.sqrt(1 / len(values) + 1 / new)


def prediction_interval(record: Record, new: int) -> tuple[float, float]:
    """Where the mean of `new` runs of the same recipe lies with a probability of 95 %: its lower and upper end."""
    mean, error = mean_and_error(record, new)
    low, high = mean - 1.96 * error, mean + 1.96 * error
    return (low, high) if metric_of(record) in NO_SHARES else (max(0.0, low), min(1.0, high))


def p_value(record: Record, values: list[float]) -> float:
    """The probability that the mean of runs like the recorded ones differs from theirs at least as much as that of `values`."""
    mean, error = mean_and_error(record, len(values))
    return math.erfc(abs(statistics.mean(values) - mean) / error / math.sqrt(2))


def find_record(recipe_file: Path | None, recipe: Recipe) -> tuple[Record | None, list[str]]:
    """(the record of this very recipe, the fields in which the record beside its file differs).

    A record lies in baselines/NAME.json beside the recipe; a recipe that was copied elsewhere has that of its original. The
    number of a recipe with any other field than the seed changed is not recorded. Where the images were given by --data, or the
    weights by --weights, the record says in words which they were.
    """

    def changed(record: Record) -> list[str]:
        words = {"data.source": "images", "weights": "weights"}  # what says in words which they were
        given = {"seed", *(path for path, name in words.items() if name in record)}
        paths = [path for path, _, _ in diff(from_dict(record["recipe"]), recipe) if path not in given]
        return list(dict.fromkeys(path.partition(".")[0] for path in paths))

    file = recipe_file and recipe_file.parent / "baselines" / f"{recipe_file.stem}.json"
    files = [file] if file and file.is_file() else sorted((RECIPES / "baselines").glob("*.json"))
    records, network = [json.loads(path.read_text()) for path in files], to_dict(recipe.backbone)
    same = (record for record in records if record["recipe"]["backbone"] == network)  # only these are built, which takes time
    fitting = next((record for record in same if not changed(record)), None)
    return fitting, changed(records[0]) if file and file.is_file() else []


def describe_baseline(recipe_file: Path | None, recipe: Recipe) -> str:
    """The number measured with this recipe, its spread and its runs, in one sentence, or that there is none."""
    record, differing = find_record(recipe_file, recipe)
    if record:
        return f"{METRICS[recipe.metric]} {describe_record(record)}"
    return f"none: {', '.join(differing)} differ from the measured recipe" if differing else "none: not measured"


def describe_verdict(recipe_file: Path | None, recipe: Recipe, value: float) -> str:
    """Whether chance explains that a run of this recipe reached `value`, in words; or that there is nothing to compare with."""
    record, differing = find_record(recipe_file, recipe)
    if record is None:
        *most, last = differing or [""]
        return f"not measured{' with your ' * bool(last)}{', '.join(most)}{' and ' * bool(most)}{last}"
    low, high = prediction_interval(record, 1)
    verdict, metric = (
        "as expected" if low <= value <= high else f"{'lower' if value < low else 'higher'} than expected",
        recipe.metric,
    )
    values = [run[metric_of(record)] for run in record["runs"]]
    seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
    images = f", on {measured_with(record)}" if measured_with(record) else ""
    return (
        f"{verdict}: {write_value(metric, low, 1, '')} to {write_value(metric, high, 1, ' %')} is what chance allows "
        f"({write_value(metric, statistics.mean(values), 1, ' %')} in {seeds}{images})"
    )


def describe_record(record: Record) -> str:
    """A record's number, like '98.9 % (98.6 to 99.2, 3 seeds)'."""
    metric = metric_of(record)
    values = [run[metric] for run in record["runs"]]
    ends = f"{write_value(metric, min(values), 1, '')} to {write_value(metric, max(values), 1, '')}"
    seeds = f"{ends}, {len(values)} seeds" if len(values) > 1 else "1 seed"
    images = f" on {measured_with(record)}" if measured_with(record) else ""
    return f"{write_value(metric, statistics.mean(values), 1, ' %')} ({seeds}){images}"


def measured_with(record: Record) -> str:
    """The images, and the weights, of a record in words, where they were not those that the recipe names."""
    return ", ".join(record[name] for name in ("images", "weights") if name in record)


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
    if len(recipes) < 2 and metric_of({"recipe": recipes[0]}) in NO_SHARES:
        raise RecipeError("a record of numbers needs runs of two seeds or more, which tell what chance does")
    if any(result.get("smoke") for result in results):
        raise RecipeError("a smoke run is no result")
    if any("soup" in result for result in results):
        raise RecipeError("a soup is no run of its recipe: name the runs that it was made of")
    keys = (
        "seed",
        *METRICS,
        "loss",
        "val_images",
        *(f"{kind}_{metric}" for kind in ("linear_probe", "best") for metric in METRICS),
        "by_subgroup",
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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.results.baseline",
        description="Write the record behind a recipe's number from its finished runs.",
        epilog="example: python -m finetune.results.baseline recipes/resnet18_cifar.py runs/resnet18_cifar-*",
    )
    parser.add_argument("recipe", type=Path, metavar="FILE.py", help="the recipe")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="its finished runs' folders")
    parser.add_argument("--images", metavar="WORDS", help="what --data was, if the runs were given one")
    parser.add_argument("--weights", metavar="WORDS", help="likewise for --weights")
    args = parser.parse_args()
    try:
        record = record_runs(args.runs)
    except RecipeError as error:
        print_error(error)
        return 2
    if args.images:
        record["images"], record["recipe"]["data"]["source"] = args.images, "--data"
    if args.weights:
        record["weights"], record["recipe"]["weights"] = args.weights, "--weights"
    file = args.recipe.parent / "baselines" / f"{args.recipe.stem}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(describe_record(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
