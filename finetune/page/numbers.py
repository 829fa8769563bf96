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
    drawn = {run / "numbers.png": "predicted numbers over labelled ones, a dot an image"}
    if units.lowest:
        drawn[run / "confusion.png"] = "images by labelled and by predicted grade"
    shown = [(data_address(file), words) for file, words in drawn.items() if file.is_file()]
    known = [metric for metric in OF_NUMBERS if metric in result]
    return {
        "numbers": {"pictures": shown, "heads": [OF_NUMBERS[name] for name in known], "rows": number_rows(result, known)},
        "worst": figures,
        "unsure": [],
        "several": True,
        "classes": names,
        "subgroups": [],
        "data": {"classes": [], "groups": [], "images": []},
        "wrong": 0,
        "unreadable": int((~seen).sum()),
    }


def data_address(picture: Path) -> str:
    """A picture as part of a page."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def number_rows(result: dict[str, Any], metrics: Sequence[str]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(what, images, the value and interval of each metric): of the mean, each number, each subgroup, the training mean."""
    images, rows = result["val_images"], result["numbers"]
    parts = [("mean of the numbers" if len(rows) > 1 else "all images", images, result)]
    parts += [(row["name"], images, row) for row in rows if len(rows) > 1]
    parts += [(name, part["val_images"], part) for name, part in result.get("by_subgroup", {}).items()]
    parts += [("always the training images' mean", images, result["baseline"])] if "baseline" in result else []
    return [(readable(name), f"{number:,}", [cell(part, metric) for metric in metrics]) for name, number, part in parts]


def cell(part: dict[str, Any], metric: str) -> tuple[str, str]:
    """A metric and its interval as text; empty where there is none."""
    interval = " to ".join(map(write_number, part.get("intervals", {}).get(metric, ())))
    return (write_number(part[metric]) if metric in part else "", interval)
