"""Runs: one in a program or a notebook, and the list of all in a folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.metrics.intervals import wilson
from finetune.recipe import Recipe
from finetune.recipe.metrics import METRICS, direction, write_value
from finetune.recipe.serialize import from_dict, to_dict
from finetune.report.curves import draw_curves
from finetune.training.run_dir import lock, newest_checkpoint, run_name, started
from finetune.utils.errors import RecipeError
from finetune.utils.text import WIDTH, align_columns


@dataclass(frozen=True)
class Run:
    """A run's folder, read when asked."""

    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it ran to its end; else finetune.train(resume=...) goes on with it."""
        return (self.folder / "result.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """result.json: the last epoch's metrics, the best epoch, seconds, versions. Empty for a run that is not finished."""
        return json.loads((self.folder / "result.json").read_text()) if self.finished else {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch, the linear probe's, as of epoch -1, first."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "val_images" in row]

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was run."""
        return from_dict(json.loads((self.folder / "recipe.json").read_text()))

    def plot(self) -> Figure:
        """Loss, metric, gradient norm and learning rates by epoch; a notebook shows the figure."""
        return draw_curves(self.folder, self.recipe.metric)


def list_runs(folder: Path, order: str = "started") -> list[dict[str, Any]]:
    """A row for each run; a folder whose recipe can't be read is a row with its fault.

    The last is the newest, or by `order` "result" the one with the best metric, by "run" the last of the alphabet.
    """
    files = sorted(folder.glob("*/recipe.json"), key=lambda file: (file.stat().st_mtime, file.parent.name))
    rows = [describe_run(file.parent) for file in files]
    if order == "run":
        rows.sort(key=lambda row: row["run"])
    if order == "result":  # unlike metrics can't be compared, and stand apart
        rows.sort(
            key=lambda row: ("value" in row, row.get("metric", ""), direction(row.get("metric", "")) * row.get("value", 0))
        )
    return rows


def describe_run(run: Path) -> dict[str, Any]:
    """{"run", "recipe", "state", "metric", "value", "interval", "best", "data", "epochs", "started"} of a run's folder.

    "interval" is the 95 % interval of the metric: what another set of as many validation images could give. Of runs of earlier
    versions only top-1 has one.
    """
    row: dict[str, Any] = {"run": run.name, "recipe": run_name(run), "state": state(run)}
    try:
        recipe = from_dict(json.loads((run / "recipe.json").read_text()))
    except (RecipeError, ValueError, TypeError, KeyError) as error:
        return row | {"state": f"unreadable: {error}"}
    source = str(to_dict(recipe.data.source))
    row |= {"metric": recipe.metric, "data": Path(source).name or source, "epochs": recipe.epochs, "started": start_time(run)}
    if (run / "result.json").is_file():
        result = json.loads((run / "result.json").read_text())
        value = result[recipe.metric]
        row |= {"value": value, "best": result.get(f"best_{recipe.metric}", value)}
        if known := result.get("intervals", {}).get(recipe.metric):
            row["interval"] = tuple(known)
        elif recipe.metric == "top1":  # a run of an earlier version
            row["interval"] = wilson(value, result["val_images"])
    return row


def state(run: Path) -> str:
    """finished, smoke run, running, or after which step it stopped."""
    if (run / "result.json").is_file():
        return "smoke run" if json.loads((run / "result.json").read_text()).get("smoke") else "finished"
    try:
        lock(run).close()
    except RecipeError:
        return "running"
    checkpoint = newest_checkpoint(run)
    return f"stopped after {int(checkpoint.name.split('-')[1])} steps" if checkpoint else "stopped"


def start_time(run: Path) -> str:
    """When the run was started, if it was written down."""
    return str(started(run).get("started", ""))


def runs_as_table(rows: list[dict[str, Any]], wide: bool = False) -> str:
    """A line a run: its name and result, and as many more columns as 80 hold, or all."""
    if not rows:
        return "no runs here: finetune train NAME"
    table = [["run", "result", "best", "epochs", "data", "started"]]
    table += [[cell(row, column) for column in table[0]] for row in rows]
    while not wide and len(table[0]) > 2 and max(map(len, align_columns(table).splitlines())) > WIDTH:
        table = [line[:-1] for line in table]
    return align_columns(table, width=math.inf if wide else WIDTH)


def cell(row: dict[str, Any], column: str) -> str:
    """What stands in a column for a run; a run without a result has its state there."""
    if column == "best":
        return write_value(row["metric"], row["best"], 1) if "best" in row else ""
    if column != "result":
        return str(row.get(column, ""))
    if row["state"] != "finished":
        return str(row["state"])
    metric, ends = row["metric"], row.get("interval", ())
    chance = f" ({' to '.join(write_value(metric, end, 1, '') for end in ends)})" if ends else ""
    return f"{METRICS[metric]} {write_value(metric, row['value'], 1)}{chance}"
