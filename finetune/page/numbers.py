"""What a run's page says of numbers: the diagram, the largest errors, a table."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.data.loader import is_unreadable
from finetune.models.linear_probe import Units
from finetune.page import gallery
from finetune.page.gallery import Pictures
from finetune.recipe.metrics import OF_NUMBERS, name_numbers, write_number
from finetune.report.numbers import number_errors
from finetune.utils.files import read_json
from finetune.utils.text import readable


def describe_numbers(
    run: Path, result: dict[str, Any], outputs: torch.Tensor, labels: torch.Tensor, names: Sequence[str], pictures: Pictures
) -> dict[str, Any]:
    """What page.html shows in place of classes, confusions and mistakes."""
    units = Units(**read_json(run / "model" / "config.json")["training_labels"])
    errors, seen = number_errors(outputs, labels, units.deviation), ~is_unreadable(labels)
    worst = errors.argsort(descending=True, stable=True)[: min(gallery.WORST, int(seen.sum()))].tolist()
    figures = [
        {
            "picture": pictures.picture(i, gallery.LARGE),
            "heat": "",
            "name": pictures.name(i),
            "labelled": name_numbers(labels[i].tolist(), names),
            "predicted": name_numbers(outputs[i].tolist(), names),
            "right": None,
        }
        for i in worst
    ]
    drawn = run / "numbers.png"
    picture = f"data:image/png;base64,{base64.b64encode(drawn.read_bytes()).decode()}" if drawn.is_file() else ""
    return {
        "numbers": {"picture": picture, "heads": [*OF_NUMBERS.values()], "rows": number_rows(result)},
        "worst": figures,
        "unsure": [],
        "several": True,
        "classes": names,
        "subgroups": [],
        "data": {"classes": [], "groups": [], "images": []},
        "wrong": 0,
        "unreadable": int((~seen).sum()),
    }


def number_rows(result: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(what, images, the value and interval of each metric): of the mean, each number, each subgroup, the training mean."""
    images, rows = result["val_images"], result["numbers"]
    parts = [("mean of the numbers" if len(rows) > 1 else "all images", images, result)]
    parts += [(row["name"], images, row) for row in rows if len(rows) > 1]
    parts += [(name, part["val_images"], part) for name, part in result.get("by_subgroup", {}).items()]
    parts += [("always the training images' mean", images, result["baseline"])] if "baseline" in result else []
    return [(readable(name), f"{number:,}", [cell(part, metric) for metric in OF_NUMBERS]) for name, number, part in parts]


def cell(part: dict[str, Any], metric: str) -> tuple[str, str]:
    """A metric and its interval as text; empty where there is none."""
    interval = " to ".join(map(write_number, part.get("intervals", {}).get(metric, ())))
    return (write_number(part[metric]) if metric in part else "", interval)
