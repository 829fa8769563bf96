"""A network of numbers, measured: what `evaluate` returns, draws and says of one."""

from pathlib import Path
from typing import Any

import torch

from finetune.data.dataset import ImageList
from finetune.metrics.compute import defined_metrics, subgroup_metrics
from finetune.metrics.measure import measure
from finetune.metrics.numbers import describe_numbers
from finetune.models.saved import SavedModel
from finetune.recipe.metrics import OF_NUMBERS, write_number
from finetune.report.numbers import plot_numbers
from finetune.utils.text import align_columns


def evaluate_numbers(
    model: SavedModel, images: ImageList, outputs: torch.Tensor, labels: torch.Tensor, output: Path | None, title: str
) -> dict[str, Any]:
    """The metrics of outputs [n, numbers], their intervals, the baseline and, of a table with that column, "by_subgroup".

    In `output` it draws numbers.png and, of a grade, confusion.png.
    """
    recipe = model.recipe
    result = {
        **defined_metrics(recipe, outputs, labels, model.units),
        **measure(recipe, outputs, labels, images.groups, names=model.classes, units=model.units),
    }
    if images.subgroups:
        result["by_subgroup"] = subgroup_metrics(recipe, outputs, labels, images.subgroups, images.groups, model.units)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        plot_numbers(output, outputs, labels, model.classes, title, model.units)
    return result


def numbers_as_text(result: dict[str, Any]) -> str:
    """The metrics with their intervals, in a table; of several numbers one for each; and of subgroups."""
    loss = f"loss {result['loss']:.4f}; " if "loss" in result else ""
    base = describe_numbers({"baseline": result["baseline"]}) if "baseline" in result else []
    rows = result["numbers"] if len(result["numbers"]) > 1 else []
    parts = [{"name": "mean of the numbers" if rows else "", **result}, *rows]
    tables = [f"{loss}{result['val_images']} images", *base, *(metrics_table(part) for part in parts)]
    parts = [{"name": f"{name}, {part['val_images']} images", **part} for name, part in result.get("by_subgroup", {}).items()]
    return "\n\n".join([*tables, *map(metrics_table, parts)])


def metrics_table(part: dict[str, Any]) -> str:
    """A line for each metric: its value and its 95 % interval."""
    rows = [(part["name"] or "metric", "value", "95 % interval")]
    for name, words in OF_NUMBERS.items():
        if name in part:
            rows.append((words, write_number(part[name]), " to ".join(map(write_number, part["intervals"].get(name, ())))))
    return align_columns(rows, numbers=True)
