"""A trained model measured on labelled images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import one_hot

from finetune.data.dataset import ImageList
from finetune.data.folders import class_folders
from finetune.data.loader import is_unreadable
from finetune.data.sources import NAMED, load_data
from finetune.inference.predict import compute_logits
from finetune.models.saved import SavedModel, load_model
from finetune.recipe import Recipe
from finetune.recipe.recipe import REPORTED_METRICS
from finetune.recipe.serialize import to_dict
from finetune.results.plots import plot_confusion_matrix
from finetune.training.evaluate import compute_metrics, confusion_matrix
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder
from finetune.utils.text import align_columns


def evaluate(source: str | Path, data: str | Path, output: Path | None = None, workers: int = 0) -> dict[str, Any]:
    """Measure a model on labelled images, which are chosen as `load_labelled_images` says.

    Returns what compute_metrics does, "classes" (images, precision, recall and F1 of each, 0 where that is 0 / 0) and, of one
    label an image, "confusion" (images by label and by predicted class), drawn as confusion.png in `output`.

    Raises:
        RecipeError: if model, images or classes are not in order, or `output` has such a picture.
    """
    if output:
        check_folder(output)
    if output and (output / "confusion.png").exists():
        raise RecipeError(f"{output / 'confusion.png'} is there already; name another --output")
    return {"model": str(source), **evaluate_model(load_model(source), data, output, workers)}


def evaluate_model(model: SavedModel, data: str | Path, output: Path | None = None, workers: int = 0) -> dict[str, Any]:
    """`evaluate` of a model that is loaded already."""
    recipe, classes = model.recipe, model.classes
    images = load_labelled_images(str(data), recipe, classes)
    logits, labels = compute_logits(model, images, recipe.data.on_bad_image, workers)
    result = {
        "data": str(data),
        **compute_metrics(recipe, logits, labels),
        "classes": class_metrics(logits, labels, classes),
    }
    result.pop("class_accuracy", None)  # recall
    if labels.ndim == 1:
        seen = ~is_unreadable(labels)
        result["confusion"] = confusion_matrix(logits[seen], labels[seen]).tolist()
        if output:
            output.mkdir(parents=True, exist_ok=True)
            plot_confusion_matrix(output, logits, labels, classes, f"{to_dict(recipe.backbone)} on {Path(data).name}")
    return result


def load_labelled_images(data: str, recipe: Recipe, classes: tuple[str, ...]) -> ImageList:
    """The val/ of a folder, else its test/, else its class folders, with labels in the order of `classes`.

    Of a named set, and of the folder that the run was trained on, the validation images only.
    """
    own = recipe.data.source
    if data in NAMED or (isinstance(own, str) and Path(data).is_dir() and Path(own).absolute() == Path(data).absolute()):
        loaded = load_data(replace(recipe, data=replace(recipe.data, source=data)))
        assert isinstance(loaded.val, ImageList)  # as of every source but a function
        names, images = loaded.classes, loaded.val
    elif Path(data).is_dir():
        part = next((Path(data) / name for name in ("val", "test") if (Path(data) / name).is_dir()), Path(data))
        images, names = class_folders(part, check=recipe.data.on_bad_image == "stop")
    else:
        raise RecipeError(f"--data {data}: no such folder. Wanted: val/CLASS/*.jpg, test/CLASS/*.jpg or CLASS/*.jpg in it")
    if set(names) != set(classes):
        only = [", ".join(sorted(set(a) - set(b))[:10]) or "none" for a, b in ((classes, names), (names, classes))]
        raise RecipeError(
            f"the classes of the model and of {data} differ: only the model has: {only[0]}; only {data} has: {only[1]}"
        )
    return ImageList(images.items, [classes.index(names[label]) for label in images.labels], images.read)


def class_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images, precision, recall and F1 of each class, of labels [n], or [n, classes] of 0 and 1, that could be read."""
    seen = ~is_unreadable(labels)
    logits, labels = logits[seen], labels[seen]
    several = labels.ndim == 2
    truth = labels.bool() if several else one_hot(labels, len(classes)).bool()
    guess = logits.sigmoid() > 0.5 if several else one_hot(logits.argmax(1), len(classes)).bool()
    true_positives, labelled, predicted = (part.sum(0) for part in (truth & guess, truth, guess))
    columns = {
        "images": labelled,
        "precision": true_positives / predicted.clamp(min=1),
        "recall": true_positives / labelled.clamp(min=1),
        "f1": 2 * true_positives / (predicted + labelled).clamp(min=1),
    }
    return [
        {"class": name, **{key: column[label].item() for key, column in columns.items()}} for label, name in enumerate(classes)
    ]


def evaluation_as_text(result: dict[str, Any]) -> str:
    """The metrics in a line, a table of the classes and, of few classes, the confusion matrix."""
    reached = ", ".join(f"{word} {result[name]:.2%}" for name, word in REPORTED_METRICS.items() if name in result)
    rows: list[tuple[str, ...]] = [("class", "images", "precision", "recall", "F1")]
    rows += [
        (row["class"], str(row["images"]), *(f"{row[key]:.2%}" for key in ("precision", "recall", "f1")))
        for row in result["classes"]
    ]
    text = f"{reached}, loss {result['loss']:.4f}; {result['val_images']} images\n\n{align_columns(rows, numbers=True)}"
    names = [row["class"] for row in result["classes"]]
    if "confusion" in result and len(names) <= 20:
        counts = [(name, *map(str, row)) for name, row in zip(names, result["confusion"], strict=True)]
        text += f"\n\n{align_columns([('labelled, as', *names), *counts], numbers=True)}"
    return text
