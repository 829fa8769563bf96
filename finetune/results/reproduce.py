"""Run a recipe again and compare its number with the baseline."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from finetune.recipe.load import HERE, load_recipe
from finetune.recipe.metrics import METRICS
from finetune.results.baseline import describe_baseline, describe_record, find_record, metric_of, p_value, prediction_interval
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder


def reproduce(
    name: str,
    seeds: int,
    output: Path | None = None,
    data: str | None = None,
    weights: str | None = None,
    progress: TextIO | None = None,
) -> dict[str, Any]:
    """Run the recipe with as many seeds, the recorded ones first, and compare their mean with the prediction interval.

    Returns {"recipe", "metric", "values" by seed, "mean", "interval", "p_value", "inside", "baseline", "runs"}. Each run says
    what it does on `progress`, stdout or stderr. Runs lie in `output`/seed-N and go on where they were cut off; a finished one
    is not run again.

    Raises:
        RecipeError: if the recipe has no number, or a run fails.
    """
    recipe, file = load_recipe(name)
    record, _ = find_record(file, recipe)
    if record is None:
        raise RecipeError(f"{file.stem} has no baseline to compare with ({describe_baseline(file, recipe)})")
    if "images" in record and not data:
        raise RecipeError(f"{file.stem} was measured on {record['images']}: name their folder, --data DIR")
    if "weights" in record and not weights:
        raise RecipeError(f"{file.stem} was measured with {record['weights']}: name their file, --weights FILE")
    metric = metric_of(record)
    recorded = {run["seed"]: run[metric] for run in record["runs"]}
    chosen = [*recorded, *(seed for seed in range(seeds + len(recorded)) if seed not in recorded)][:seeds]
    output = output or Path("runs") / f"{file.stem}-reproduce"
    check_folder(output)
    progress, values = progress or sys.stdout, {}
    given = [*(["--data", data] if data else []), *(["--weights", weights] if weights else [])]
    for seed in chosen:
        values[seed] = run_seed(file, seed, output / f"seed-{seed}", given, progress)[metric]
        known = f", recorded {recorded[seed]:.2%}" if seed in recorded else ""
        print(f"seed {seed}: {values[seed]:.2%}{known}", file=progress, flush=True)
    low, high = prediction_interval(record, len(values))
    mean = statistics.mean(values.values())
    return {
        "recipe": file.stem,
        "metric": metric,
        "values": values,
        "mean": mean,
        "interval": [low, high],
        "p_value": p_value(record, list(values.values())),
        "inside": low <= mean <= high,
        "baseline": describe_record(record),
        "runs": str(output),
    }


def describe_reproduction(found: dict[str, Any]) -> str:
    """What `reproduce` has found, in a sentence."""
    low, high = found["interval"]
    return (
        f"{METRICS[found['metric']]} {found['mean']:.2%}, the mean of {len(found['values'])}, lies "
        f"{'inside' if found['inside'] else 'OUTSIDE'} the 95 % prediction interval, {low:.1%} to {high:.1%} "
        f"(p = {found['p_value']:.2f}); the baseline is {found['baseline']}. The runs: {found['runs']}"
    )


def run_seed(file: Path, seed: int, folder: Path, given: list[str], progress: TextIO) -> dict[str, Any]:
    """The result of one run, resumed if it was started, on what Accelerate finds: every GPU, or the CPU."""
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
        *given,
    ]
    if not (folder / "result.json").is_file():
        print(f"finetune/run.py {' '.join(line[4:])}", file=progress, flush=True)
        output = 2 if progress is sys.stderr else None  # the run's, where stdout is for the result
        subprocess.run(line, env={"ACCELERATE_LOG_LEVEL": "error", **os.environ}, check=False, stdout=output)
    if not (folder / "result.json").is_file():
        raise RecipeError(f"the run in {folder} did not finish; what it said stands above. The same command goes on with it")
    return json.loads((folder / "result.json").read_text())
