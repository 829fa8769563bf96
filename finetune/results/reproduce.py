"""Run a recipe again and compare its number with the baseline."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.recipe.load import HERE, load_recipe
from finetune.recipe.recipe import METRICS
from finetune.results.baseline import describe_baseline, describe_record, kept_record, metric_of, p_value, prediction_interval
from finetune.utils.errors import RecipeError


def reproduce(name: str, seeds: int, output: Path | None = None, data: str | None = None) -> bool:
    """Run the recipe with as many seeds, the recorded ones first, and print each value beside the prediction interval.

    Runs lie in `output`/seed-N and go on where they were cut off; a finished one is not run again. Returns whether the mean
    lies inside the interval that the record predicts for the mean of so many runs.

    Raises:
        RecipeError: if the recipe has no number, or a run fails.
    """
    recipe, file = load_recipe(name)
    record, _ = kept_record(file, recipe)
    if record is None:
        raise RecipeError(f"{file.stem} has no baseline to compare with ({describe_baseline(file, recipe)})")
    if "images" in record and not data:
        raise RecipeError(f"{file.stem} was measured on {record['images']}: name their folder, --data DIR")
    metric = metric_of(record)
    recorded = {run["seed"]: run[metric] for run in record["runs"]}
    chosen = [*recorded, *(seed for seed in range(seeds + len(recorded)) if seed not in recorded)][:seeds]
    output = output or Path("runs") / f"{file.stem}-reproduce"
    values = []
    for seed in chosen:
        value = result_of_run(file, seed, output / f"seed-{seed}", data)[metric]
        print(f"seed {seed}: {value:.2%}" + (f", recorded {recorded[seed]:.2%}" if seed in recorded else ""), flush=True)
        values.append(value)
    low, high = prediction_interval(record, len(values))
    inside = low <= statistics.mean(values) <= high
    print(
        f"{METRICS[metric]} {statistics.mean(values):.2%}, the mean of {len(values)}, lies {'inside' if inside else 'OUTSIDE'} "
        f"the 95 % prediction interval, {low:.1%} to {high:.1%} (p = {p_value(record, values):.2f}); the baseline is "
        f"{describe_record(record)}. The runs: {output}"
    )
    return inside


def result_of_run(file: Path, seed: int, folder: Path, data: str | None) -> dict[str, Any]:
    """The result of one run, which goes on if it was started, on what Accelerate finds: every GPU, or the CPU."""
    line = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        str(HERE / "run.py"),
        "--recipe",
        str(file),
        "--seed",
        str(seed),
        "--output",
        str(folder),
        "--resume",
        "auto",
        *(["--data", data] if data else []),
    ]
    if not (folder / "result.json").is_file():
        print(f"finetune/run.py {' '.join(line[4:])}", flush=True)
        subprocess.run(line, env={"ACCELERATE_LOG_LEVEL": "error", **os.environ}, check=False)
    if not (folder / "result.json").is_file():
        raise RecipeError(f"the run in {folder} did not finish; what it said stands above. The same command goes on with it")
    return json.loads((folder / "result.json").read_text())
