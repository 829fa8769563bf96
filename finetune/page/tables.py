"""The tables of a run's page: confusions, classes, subgroups."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from finetune.metrics.classes import class_metrics
from finetune.page.gallery import MATRIX_CLASSES, Group
from finetune.recipe import Recipe
from finetune.recipe.metrics import METRICS, NO_SHARES, REPORTED_METRICS, write_number
from finetune.utils.text import readable

ROWS = 1000  # of the table of classes
CONFUSIONS = 200  # in the list of them, of more classes than a matrix has


def describe_classes(
    recipe: Recipe,
    result: dict[str, Any],
    logits: torch.Tensor,
    labels: torch.Tensor,
    groups: Sequence[Group],
    classes: Sequence[str],
    owners: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The tables: the confusion matrix or the largest confusions, the classes, the subgroups.

    `owners` names the group of each image, which its interval depends on, where there are such.
    """
    several, numbers = labels.ndim == 2, class_metrics(logits, labels, classes, owners)
    columns = {name: [row[name] for row in numbers] for name in ("precision", "recall", "f1")}
    if several:
        columns = {"average precision": result["class_average_precision"], **columns}
    mistaken = {number for group in groups for number in (group.label, group.guess) if group.label != group.guess}
    sorted_by = 0 if several else 2
    worst = sorted(range(len(classes)), key=lambda i: [*columns.values()][sorted_by][i])[:ROWS]
    rows = [
        {"name": classes[i], "number": i, "images": numbers[i]["images"], "mistaken": i in mistaken,
         "shares": [(column[i], interval_text(numbers[i]["intervals"].get(name))) for name, column in columns.items()]}
        for i in worst
    ]  # fmt: skip
    metrics = {
        name: word for name, word in {recipe.metric: METRICS[recipe.metric], **REPORTED_METRICS}.items() if name in result
    }
    subgroups = [
        {"name": readable(name), "images": part["val_images"],
         "cells": [value_text(metric, part[metric], part.get("intervals", {}).get(metric)) if metric in part else ("", "")
                   for metric in metrics]}
        for name, part in result.get("by_subgroup", {}).items()
    ]  # fmt: skip
    wrong = [(number, group) for number, group in enumerate(groups) if group.label != group.guess]
    labelled = [row["images"] for row in numbers]
    few = not several and len(classes) <= MATRIX_CLASSES
    return {
        "several": several,
        "classes": classes,
        "matrix": matrix_rows(groups, labelled, classes) if few else [],
        "confusions": [] if several else [
            {"group": number, "label": classes[group.label or 0], "guess": classes[group.guess or 0], "count": group.number,
             "share": group.number / labelled[group.label or 0]}
            for number, group in wrong[:CONFUSIONS]
        ],
        "num_confusions": len(wrong),
        "columns": ["F1" if name == "f1" else name for name in columns],
        "sorted_by": sorted_by,
        "rows": rows,
        "subgroups": subgroups,
        "subgroup_words": [*metrics.values()],
    }  # fmt: skip


def percent(share: float | None, digits: int = 2) -> str:
    """0.9876 as 98.76 %, with a space that does not break; a dash for what is not defined."""
    return "-" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def value_text(metric: str, value: float, interval: Sequence[float] | None) -> tuple[str, str]:
    """A metric and its interval as text: a share in percent, or of numbers as it is."""
    if metric in NO_SHARES:
        return write_number(value), " to ".join(map(write_number, interval or ()))
    return percent(value), interval_text(interval)


def interval_text(interval: Sequence[float] | None) -> str:
    """Like '97.2 to 99.6', in percent; "" without one."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""


def matrix_rows(groups: Sequence[Group], labelled: Sequence[int], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The confusion matrix by rows: of each cell its images, its group, and a shade of 0 to 10 by its share of the row."""
    at = {(group.label, group.guess): number for number, group in enumerate(groups)}
    rows = []
    for label, name in enumerate(classes):
        cells = []
        for guess in range(len(classes)):
            number = at.get((label, guess))
            images = groups[number].number if number is not None else 0
            shade = round(10 * math.sqrt(images / max(1, labelled[label])))
            cells.append({"count": images, "group": number, "right": label == guess, "shade": shade})
        rows.append({"name": name, "images": labelled[label], "cells": cells})
    return rows
