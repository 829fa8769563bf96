"""A trained model measured on labelled images."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.builtin import from_names
from finetune.data.dataset import ImageList, Values, check_files, digests_of, fingerprint, recorded_digests
from finetune.data.external import has_shards
from finetune.data.folders import class_difference, class_folders
from finetune.data.loader import is_unreadable
from finetune.data.sources import from_csv, load_data
from finetune.data.split import evaluation_folder, from_folder, note_missing_classes
from finetune.images.remote import list_folder
from finetune.inference.numbers import evaluate_numbers, numbers_as_text
from finetune.inference.predict import compute_logits
from finetune.metrics.classes import class_metrics
from finetune.metrics.compute import defined_metrics, subgroup_metrics
from finetune.metrics.counts import confusion_matrix
from finetune.metrics.coverage import coverage_table
from finetune.metrics.measure import NAMES, NUMBERS, measure
from finetune.metrics.thresholds import over_thresholds
from finetune.models.saved import SavedModel, find_model, load_model
from finetune.recipe import Data, Recipe
from finetune.recipe.data import NAMED_SETS
from finetune.recipe.load import check_source
from finetune.recipe.metrics import NO_SHARES, REPORTED_METRICS, write_value
from finetune.recipe.serialize import to_dict
from finetune.report.confusion import plot_confusion_matrix
from finetune.report.coverage import plot_coverage
from finetune.report.drawing import shorten
from finetune.training.run_dir import started
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder
from finetune.utils.text import align_columns, note
from finetune.utils.urls import is_table, is_url, tidy

COLUMNS = ("items", "labels", "subgroups", "groups", "digests")  # of an ImageList
MATRIX_CLASSES = 1000  # up to which a result has the confusion matrix: it grows with their square


def evaluate(source: str | Path, data: str | Path, output: Path | None = None, workers: int = 0) -> dict[str, Any]:
    """Measure a model on labelled images, which are chosen as `load_labelled_images` says.

    Returns what `measure` and compute_metrics do, "classes" (see class_metrics), of a table with that column "by_subgroup" and,
    of one label an image and up to 1,000 classes, "confusion" (images by label and by predicted class), of any number drawn as
    confusion.png in `output`.

    Raises:
        RecipeError: if model, images or classes are not in order, or `output` has such a picture.
    """
    if output:
        check_folder(output)
    for name in ("confusion.png", "numbers.png"):
        if output and (output / name).exists():
            raise RecipeError(f"{output / name} is there already; name another --output")
    model, (_, run) = load_model(source), find_model(source)
    return {"model": str(source), **evaluate_model(model, data, output, workers, run)}


def evaluate_model(
    model: SavedModel, data: str | Path, output: Path | None = None, workers: int = 0, run: Path | None = None
) -> dict[str, Any]:
    """`evaluate` of a model that is loaded already, and of the run that it comes from, if it does."""
    recipe, classes = model.recipe, model.classes
    images = load_labelled_images(str(data), recipe, classes, run)
    logits, labels = compute_logits(model, images, recipe.data.on_bad_image, workers)
    title = shorten(f"{to_dict(recipe.backbone)} on {Path(data).name}", 80)
    if recipe.of_numbers:
        return {"data": str(data), **evaluate_numbers(model, images, logits, labels, output, title)}
    result = {
        "data": str(data),
        **measure(recipe, logits, labels, images.groups, (model.temperature, model.thresholds)),
        **defined_metrics(recipe, logits, labels),
    }
    if model.thresholds:
        margins = over_thresholds(logits / model.temperature, model.thresholds)
        rows = class_metrics(margins, labels, classes, images.groups)
        result["classes"] = [row | {"threshold": least} for row, least in zip(rows, model.thresholds, strict=True)]
    else:
        result["classes"] = class_metrics(logits, labels, classes, images.groups)
    result.pop("class_accuracy", None)  # recall
    if labels.ndim == 1:
        result["coverage"] = coverage_table(recipe.loss, logits, labels, model.temperature)
    if images.subgroups:
        result["by_subgroup"] = subgroup_metrics(recipe, logits, labels, images.subgroups, images.groups)
    if labels.ndim == 1:
        seen = ~is_unreadable(labels)
        if len(classes) <= MATRIX_CLASSES:
            result["confusion"] = confusion_matrix(logits[seen], labels[seen]).tolist()
        if output:
            output.mkdir(parents=True, exist_ok=True)
            plot_confusion_matrix(output, logits, labels, classes, title)
            plot_coverage(output, recipe.loss, logits, labels, model.temperature, title)
    return result


def load_labelled_images(data: str, recipe: Recipe, classes: tuple[str, ...], run: Path | None = None) -> ImageList:
    """The validation images of a source, else its test images, else all that it has, with labels in the order of `classes`.

    Of the images that `run` was trained on, wherever they lie by now, only those that it kept for validation.
    """
    check_source(data)
    own, record = recipe.data.source, run and run / "images.csv"
    remote = is_url(tidy(data))
    same = isinstance(own, str) and (remote or os.path.exists(data)) and place_of(own) == place_of(data)
    recorded = record is not None and record.is_file()
    if not (remote or Path(data).exists()) or (same and not recorded) or Path(data).is_dir() and has_shards(Path(data)):
        images, names = load_named(data, recipe, run if same or data == own else None)
    else:
        images, names = load_files(data, recipe, whole=same)
    if recipe.of_numbers and len(names) == len(classes) == 1:
        names = classes  # a single number may have no name of its own
    check_same_classes(data, names, classes)
    if record and recorded and isinstance(images.items[0], str | Path):
        images = leave_out_trained(images, record, same)
    place, own_labels = np.array([classes.index(name) for name in names]), np.asarray(images.labels)
    if own_labels.ndim == 1:
        labels: Values = place[own_labels].tolist()
    else:
        labels = np.zeros((len(images), len(classes)), own_labels.dtype)  # 0 and 1 of classes, or numbers
        labels[:, place] = own_labels
    found = ImageList(images.items, labels, images.read, images.subgroups, images.groups)
    if not recipe.of_numbers:
        note_missing_classes({"labelled": found}, classes, data)
    return found.read_as(recipe.data)


def place_of(source: str) -> str:
    """Where a source lies, whatever links lead there."""
    return tidy(source) if is_url(tidy(source)) else os.path.realpath(source)


def check_same_classes(data: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """Raise RecipeError unless the classes are the model's; a table may lack some, as it can't name what it has no image of."""
    if not names:
        raise RecipeError(f"no row of {data} has a label")
    if set(names) != set(classes) and not (is_table(data) and set(names) < set(classes)):
        difference = class_difference(classes, names, ("the model has", f"{data} has"))
        raise RecipeError(f"the classes of the model and of {data} differ: {difference}")


def load_named(data: str, recipe: Recipe, run: Path | None) -> tuple[ImageList, Sequence[str]]:
    """(validation images, classes) of a source as a run has them; of the `run` whose images these are, as it had them."""
    options = replace(recipe.data, source=data)
    if run is None:  # the fields that split the run's images are not for others
        kept = {name: getattr(options, name) for name in ("on_bad_image", "channels")}
        options = Data(data, options.image_size, options.batch_size, **kept)
    loaded = load_data(replace(recipe, data=options))
    assert isinstance(loaded.val, ImageList)  # as of every source but a function
    before = started(run).get("images", {}).get("validation") if run else None
    if run and (before or data not in NAMED_SETS) and before != fingerprint(loaded.val, loaded.classes):
        why = "were others" if before else "are not known: it is of an earlier version"
        note(f"the images that the run kept for validation {why}: it may have trained on some of these")
    return loaded.val, loaded.classes


def load_files(data: str, recipe: Recipe, whole: bool) -> tuple[ImageList, Sequence[str]]:
    """(images, classes) of a table or a folder: all of it if `whole`, else its validation or test part, if it has one."""
    names: Sequence[str]
    folder = list_folder(data) if is_url(tidy(data)) and not is_table(data) else Path(data)
    if is_table(data):
        parts, names = from_csv(data, recipe.loss)
    elif isinstance(folder, Path) and not folder.is_dir():
        raise RecipeError(f"--data {data} is neither a folder nor a CSV")
    elif whole:
        parts, names = from_folder(folder)
    else:
        images, names = class_folders(evaluation_folder(folder))
        parts = [images]
    if recipe.of_numbers and not is_table(data):
        parts, names = from_names(parts, names, data)
    parts = parts if whole else parts[-1:]
    check_files(parts, recipe.data.on_bad_image, recipe.data.channels)
    columns = ([value for part in parts if (own := getattr(part, name)) is not None for value in own] for name in COLUMNS)
    items, labels, subgroups, groups, digests = columns
    return ImageList(items, labels, parts[0].read, subgroups or None, groups or None, digests or None), names


def leave_out_trained(images: ImageList, record: Path, same: bool) -> ImageList:
    """Those of a run's own images that it kept for validation, told by their content; of other images, all."""
    digests = digests_of(images)
    trained, missing, kept = set(recorded_digests(record, "train")), Counter(recorded_digests(record, "val")), list[int]()
    for i, digest in enumerate(digests):
        if missing[digest] > 0:
            missing[digest] -= 1
            kept.append(i)
    seen = sum(digests[i] in trained for i in {*range(len(digests))} - {*kept})
    if kept and (seen or same):
        if more := [f"{n} {what}" for n, what in ((seen, "trained on"), (len(images) - len(kept) - seen, "new")) if n]:
            note(f"evaluated: the {len(kept)} images that the run kept for validation; left out: {', '.join(more)}")
        if gone := missing.total():
            note(f"{gone} of the images that the run kept for validation are not there any more")
        return images.part(kept)
    if seen:
        note(f"{seen} of these {len(images)} images were trained on: the metrics will be better than on new ones")
    return images


def describe_metrics(result: dict[str, Any]) -> str:
    """A line for each metric: its value and its 95 % interval."""
    rows = [("metric", "value", "95 % interval")]
    for name, words in NAMES.items():
        if name in result:
            value, *ends = (
                f"{number:.4f}" if name in NUMBERS else f"{number:.2%}"
                for number in (result[name], *result["intervals"].get(name, ()))
            )
            rows.append((words, value, " to ".join(ends)))
    temperature = result["calibration"]["used"]
    at = f"\nlog loss, Brier score and calibration error at the model's temperature, {temperature:.2f}" * (temperature != 1)
    return align_columns(rows, numbers=True) + at


def ends(row: dict[str, Any], name: str) -> str:
    """The interval of a metric in percent, like "79-85"; "-" without one. Of what is no share it is like "0.71-0.85"."""
    interval = row["intervals"].get(name)
    if name in NO_SHARES:
        return "-".join(f"{end:.2f}" for end in interval or ()) or "-"
    return "-".join(f"{100 * end:.0f}" for end in interval) if interval else "-"


def evaluation_as_text(result: dict[str, Any]) -> str:
    """The metrics in a line, a table of the classes and, of few classes, the confusion matrix; of numbers their tables."""
    if "numbers" in result:
        return numbers_as_text(result)
    known = {name: word for name, word in REPORTED_METRICS.items() if name in result}
    reached = ", ".join(f"{word} {write_value(name, result[name])}" for name, word in known.items())
    at = ["threshold"] * ("threshold" in result["classes"][0])
    rows: list[tuple[str, ...]] = [("class", "images", *at, "precision", "95 %", "recall", "95 %", "F1", "95 %")]
    for row in result["classes"]:
        cells = (cell for key in ("precision", "recall", "f1") for cell in (f"{row[key]:.1%}", ends(row, key)))
        rows.append((row["class"], str(row["images"]), *(f"{row[key]:.1%}" for key in at), *cells))
    text = f"{reached}, loss {result['loss']:.4f}; {result['val_images']} images\n\n{describe_metrics(result)}"
    text += f"\n\n{align_columns(rows, numbers=True)}"
    if parts := result.get("by_subgroup"):
        rows = [("subgroup", "images", *(cell for word in known.values() for cell in (word, "95 %")))]
        for name, part in parts.items():
            values = {key: write_value(key, part[key], 1) if key in part else "-" for key in known}
            cells = (cell for key, value in values.items() for cell in (value, ends(part, key)))
            rows.append((name, str(part["val_images"]), *cells))
        text += f"\n\n{align_columns(rows, numbers=True)}"
    if kept := result.get("coverage"):
        rows = [("images kept", "probability from", "wrong among them")]
        rows += [tuple(f"{row[key]:.2%}" for key in ("coverage", "threshold", "error")) for row in kept]
        text += f"\n\n{align_columns(rows, numbers=True)}"
    names = [row["class"] for row in result["classes"]]
    if "confusion" in result and len(names) <= 20:
        counts = [(name, *map(str, row)) for name, row in zip(names, result["confusion"], strict=True)]
        text += f"\n\n{align_columns([('labelled, as', *names), *counts], numbers=True)}"
    return text
