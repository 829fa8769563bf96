"""Run a recipe again, and say whether its promised number came out."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.recipe.load import HERE, load_recipe
from finetune.recipe.recipe import METRICS
from finetune.results.baseline import interval, kept_record, metric_of, odds, promise, summary
from finetune.utils.errors import RecipeError


def reproduce(name: str, seeds: int, output: Path | None = None, data: str | None = None) -> bool:
    """Run the recipe with as many seeds, the recorded ones first, and print each score beside the promised interval.

    Runs lie in `output`/seed-N and go on where they broke off; a finished one is not run again. Returns whether the mean lies
    inside the interval that the record gives for the mean of so many runs.

    Raises:
        RecipeError: if the recipe promises nothing, or a run fails.
    """
    recipe, file = load_recipe(name)
    record, _ = kept_record(file, recipe)
    if record is None:
        raise RecipeError(f"{file.stem} promises {promise(file, recipe)}, so there is nothing to compare with")
    if "images" in record and not data:
        raise RecipeError(f"{file.stem} was measured on {record['images']}: name their folder, --data DIR")
    recorded = {run["seed"]: run[metric_of(record)] for run in record["runs"]}
    chosen = [*recorded, *(seed for seed in range(seeds + len(recorded)) if seed not in recorded)][:seeds]
    output = output or Path("runs") / f"{file.stem}-reproduce"
    scores = []
    for seed in chosen:
        score = score_of_run(file, seed, output / f"seed-{seed}", data)[metric_of(record)]
        print(f"seed {seed}: {score:.2%}" + (f", recorded {recorded[seed]:.2%}" if seed in recorded else ""), flush=True)
        scores.append(score)
    low, high = interval(record, len(scores))
    inside = low <= statistics.mean(scores) <= high
    print(
        f"{METRICS[metric_of(record)]} {statistics.mean(scores):.2%}, the mean of {len(scores)}, lies "
        f"{'inside' if inside else 'OUTSIDE'} {low:.1%} to {high:.1%}; promised was {summary(record)}. By chance alone "
        f"{odds(record, scores):.1%} of such tries would differ as much. The runs: {output}"
    )
    return inside


def score_of_run(file: Path, seed: int, folder: Path, data: str | None) -> dict[str, Any]:
    """The result of one run, which goes on if it was begun, on what Accelerate finds: every GPU, or the CPU."""
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
