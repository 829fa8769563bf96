"""Finished runs side by side: metrics, whether chance explains the differences, curves, and how their recipes differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from matplotlib.ticker import MaxNLocator

from finetune.metrics.numbers import to_grades
from finetune.models.linear_probe import Units
from finetune.recipe.metrics import METRICS, NO_SHARES, OF_GRADES, REPORTED_METRICS, scale_of, unit_of, write_value
from finetune.recipe.serialize import diff, flatten, to_dict
from finetune.report.drawing import legend_above, new_figure, save_figure, shorten
from finetune.results.paired import compare, in_points, interval_of
from finetune.results.runs import Run
from finetune.training.run_dir import started
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json
from finetune.utils.text import WIDTH, align_columns, fill_lines

SHOWN = {"loss": "loss", **REPORTED_METRICS, "seconds": "seconds", "peak_memory_gib": "peak GiB"}  # of result.json
VERDICTS = {"gain": "better", "loss": "worse", "chance": "within chance"}


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """What the last epochs of finished runs reached, against the first of them.

    Returns {"metric", "runs": a row each with its metrics, the "interval" of the metric and, where the images are those of the
    first, "minus_first" as of `paired.compare`, else the reason in "not_compared"; "fields": those of the recipes that differ,
    with the value of each run}.

    Raises:
        RecipeError: for fewer than two runs, the same run twice, and runs of different metrics.
    """
    runs = [Run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise RecipeError("compare needs two different runs or more")
    recipes = [run.recipe for run in runs]
    metric = recipes[0].metric
    for run, recipe in zip(runs, recipes, strict=True):
        if recipe.metric != metric:
            raise RecipeError(
                f"{run.folder} is measured by {recipe.metric}, {runs[0].folder} by {metric}: name runs of one metric"
            )
    known = [predictions_of(run.folder) for run in runs]
    rows = []
    for run, recipe, (logits, labels) in zip(runs, recipes, known, strict=True):
        row: dict[str, Any] = {
            "run": run.folder.name,
            **{key: run.metrics[key] for key in {**SHOWN, metric: ""} if key in run.metrics},
        }
        row["interval"] = interval_of(recipe, logits, labels)
        if run is not runs[0]:
            if fault := why_other(runs[0].folder, run.folder, known[0], (logits, labels)):
                row["not_compared"] = fault
            else:
                row["minus_first"] = compare(recipe, logits, [known[0][0]], labels)
        rows.append(row)
    changed = list(dict.fromkeys(field for recipe in recipes[1:] for field, _, _ in diff(recipes[0], recipe)))
    flat = [flatten(to_dict(recipe)) for recipe in recipes]
    fields = [{"field": field, "values": [one.get(field, "-") for one in flat]} for field in changed]
    return {"metric": metric, "runs": rows, "fields": fields}


def predictions_of(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of the validation images after a run's last epoch; of numbers that are grades, the grades predicted."""
    try:
        kept = safetensors.torch.load_file(run / "predictions.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise RecipeError(f"can't read the predictions of {run}: {error}") from error
    labels, logits, own = kept["labels"], kept["logits"], Run(run).recipe
    if labels.is_floating_point() and not own.of_numbers:
        labels = labels.where(labels >= 0, torch.nan)  # an earlier version had -100 for what can't be read
    if own.of_numbers and own.metric in OF_GRADES:
        units = Units(**read_json(run / "model" / "config.json")["training_labels"])
        grades = to_grades(logits, units)
        return logits if grades is None else grades, labels
    return logits, labels


def why_other(
    first: Path, run: Path, ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]
) -> str:
    """Why the validation images of two runs are not the same, if they are not."""
    images = [started(folder).get("images", {}).get("validation") for folder in (first, run)]
    if images[0] != images[1] or not torch.equal(ours[1], theirs[1]):
        return "other validation images"
    if ours[0].shape != theirs[0].shape:
        return "other classes"
    return ""


def plot_runs(folders: Sequence[Path], metric: str, file: Path) -> Path:
    """Draw each run's validation metric by epoch; the linear probe's stands at 0."""
    figure, axes = new_figure()
    for folder in folders:
        rows = [row for row in Run(folder).history if metric in row]
        axes.plot(
            [row["epoch"] + 1 for row in rows],
            [scale_of(metric) * row[metric] for row in rows],
            "o-",
            markersize=3,
            label=shorten(folder.name, 30),
        )
    axes.set(xlabel="epochs", ylabel=f"validation {METRICS[metric]}{unit_of(metric)}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, columns=2)
    return save_figure(figure, [axes], file)


def comparison_as_text(found: dict[str, Any]) -> str:
    """Three tables of 80 columns: the metric and its differences, the other metrics, the fields that differ."""
    metric, runs = found["metric"], found["runs"]
    table = [["run", f"{METRICS[metric]}, 95 % interval", "minus the first", ""]]
    for row in runs:
        ends = " to ".join(write_value(metric, end, 1, "") for end in row["interval"])
        table.append([row["run"], f"{write_value(metric, row[metric])} ({ends})", *difference_of(row, metric)])
    others = [name for name in SHOWN if name != metric and all(name in row for row in runs)]
    more = [["run", *(SHOWN[name] for name in others)]]
    more += [[row["run"], *(cell_of(name, row[name]) for name in others)] for row in runs]
    fields = [["field", *(row["run"] for row in runs)]]
    fields += [[row["field"], *map(str, row["values"])] for row in found["fields"]]
    test = "McNemar's exact test" if metric == "top1" else "the bootstrap of the images"
    said = f"differences by {test}, on the same validation images, after the last epoch; other seeds can differ by more"
    parts = [align_columns(table, width=WIDTH), align_columns(more, width=WIDTH)]
    parts.append(align_columns(fields, width=WIDTH) if found["fields"] else "the recipes do not differ")
    return "\n\n".join([*parts, fill_lines(said)])


def difference_of(row: dict[str, Any], metric: str) -> tuple[str, str]:
    """A difference in points, or of numbers, with its interval, and the verdict or the reason why there is none."""
    if "minus_first" not in row:
        return "", row.get("not_compared", "")
    found = row["minus_first"]
    chance = f", p = {found['p_value']:.2g}" if "p_value" in found else ""
    return in_points(found, metric), f"{VERDICTS[found['verdict']]}{chance}"


def cell_of(name: str, value: float) -> str:
    """A share in percent, all else in three digits."""
    if name in NO_SHARES:
        return write_value(name, value)
    return f"{value:.2%}" if name in REPORTED_METRICS else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
