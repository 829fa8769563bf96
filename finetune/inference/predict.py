"""A fine-tuned network, loaded again, and what it says of images."""

import csv
import glob
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import one_hot
from torchvision.datasets.folder import IMG_EXTENSIONS

from finetune import train_loop
from finetune.assemble import make_accelerator
from finetune.augment import scoring_transform
from finetune.backbone import memory_format
from finetune.batches import SeededImages, unreadable
from finetune.data_sources import read_image
from finetune.image_data import NAMED, class_folders, load_data
from finetune.image_lists import ImageList, Images
from finetune.plots import confusion
from finetune.recipe import TOLD, RecipeError
from finetune.recipe_file import in_columns
from finetune.saved_model import SavedModel, Settings, load_model
from finetune.scores import confusion_matrix, scores


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, folders' images (by torchvision's list of suffixes) however deep, and globs; each file once.

    Raises:
        RecipeError: for a path that leads to no image.
    """
    found = []
    for path in map(str, paths):
        matches = map(Path, [path] if Path(path).exists() else glob.glob(path, recursive=True))
        files = {file for match in matches for file in (match.rglob("*") if match.is_dir() else [match])}
        images = sorted(file for file in files if file.suffix.lower() in IMG_EXTENSIONS or file == Path(path))
        if not images:
            raise RecipeError(f"no images in {path} (looked for {', '.join(IMG_EXTENSIONS)})")
        found += images
    return list(dict.fromkeys(found))


def logits_of(model: SavedModel, images: Images, on_bad_image: str, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], labels) of a map-style set of (PIL image, label), computed as the run's own evaluation does."""
    net, classes, preprocessing, settings = model
    accelerator = make_accelerator(settings)
    net.to(accelerator.device).to(memory_format=memory_format(settings))
    inputs = SeededImages(
        images, scoring_transform(preprocessing), settings.seed, classes, on_bad_image, settings.loss == "multi_label"
    )
    return train_loop.evaluate(settings, net, inputs, accelerator, workers=workers)


def predict(source: str | Path, paths: Iterable[str | Path], top: int = 5, workers: int = 0) -> list[dict[str, Any]]:
    """What a model says of images: {"file", "predicted", "probability", "top": [[class, probability], ...]} for each.

    Probabilities are a softmax over the classes, or where the loss asked a yes or no of each class, its sigmoid. With
    several labels an image "predicted" lists the classes above 0.5, and "probability" theirs. An image that can't be read is
    named on stderr, left out and counted there.

    Raises:
        RecipeError: for what load_model and find_images refuse, and if no image could be read.
    """
    if top < 1:
        raise RecipeError(f"--top starts at 1, not {top}")
    files = find_images(paths)
    model = _, classes, _, settings = load_model(source)
    logits, labels = logits_of(model, ImageList(files, [0] * len(files), read_image), "skip", workers)
    seen = ~unreadable(labels)
    if not seen.all():
        print(f"finetune: {int((~seen).sum())} of {len(files)} images could not be read and were left out", file=sys.stderr)
    if not seen.any():
        raise RecipeError("no image could be read")
    chances = logits.double().softmax(1) if settings.loss == "cross_entropy" else logits.double().sigmoid()
    rows = []
    for i in seen.nonzero()[:, 0].tolist():
        ranked = [[classes[label], chances[i, label].item()] for label in chances[i].argsort(descending=True, stable=True)]
        row = {"file": str(files[i]), "predicted": ranked[0][0], "probability": ranked[0][1], "top": ranked[:top]}
        if settings.loss == "multi_label":
            yes = [pair for pair in ranked if pair[1] > 0.5]
            row |= {"predicted": [name for name, _ in yes], "probability": [chance for _, chance in yes]}
        rows.append(row)
    return rows


def predictions_as_table(rows: Sequence[dict[str, Any]]) -> str:
    """An aligned line an image: the file, what was predicted, and the likeliest classes with their probabilities."""
    lines: list[tuple[str, ...]] = [("file", "predicted", "probabilities")]
    for row in rows:
        predicted = row["predicted"] if isinstance(row["predicted"], str) else ", ".join(row["predicted"]) or "-"
        lines.append((row["file"], predicted, ", ".join(f"{name} {chance:.1%}" for name, chance in row["top"])))
    return in_columns(lines)


def predictions_as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A header and a row an image: file, predicted (several joined by ;), class_1, probability_1, class_2, ..."""
    table = csv.writer(text := io.StringIO(), lineterminator="\n")
    ranks = range(1, len(rows[0]["top"]) + 1)
    table.writerow(["file", "predicted", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for row in rows:
        predicted = row["predicted"] if isinstance(row["predicted"], str) else ";".join(row["predicted"])
        table.writerow([row["file"], predicted, *(value for pair in row["top"] for value in pair)])
    return text.getvalue()


def evaluate(source: str | Path, data: str | Path, output: Path | None = None, workers: int = 0) -> dict[str, Any]:
    """Count a model's right and wrong on labelled images, which are chosen as `labelled_images` says.

    Returns the scores of finetune.scores, "classes" (images, precision, recall and F1 of each, 0 where that is 0 / 0) and,
    of one label an image, "confusion" (images by label and by predicted class), drawn as confusion.png in `output`.

    Raises:
        RecipeError: if model, images or classes are not in order, or `output` has such a picture.
    """
    if output and (output / "confusion.png").exists():
        raise RecipeError(f"{output / 'confusion.png'} is there already; name another --output")
    model = _, classes, _, settings = load_model(source)
    images = labelled_images(str(data), settings, classes)
    logits, labels = logits_of(model, images, settings.data.on_bad_image, workers)
    result = {
        "model": str(source),
        "data": str(data),
        **scores(settings, logits, labels),
        "classes": class_table(logits, labels, classes),
    }
    result.pop("class_accuracy", None)  # recall
    if labels.ndim == 1:
        seen = ~unreadable(labels)
        result["confusion"] = confusion_matrix(logits[seen], labels[seen]).tolist()
        if output:
            output.mkdir(parents=True, exist_ok=True)
            confusion(output, logits, labels, classes)
    return result


def labelled_images(data: str, settings: Settings, classes: tuple[str, ...]) -> ImageList:
    """The val/ of a folder, else its test/, else its class folders, with labels in the order of `classes`.

    Of the images that the run was trained on itself, by name or folder, it is those that the run kept for validation.
    """
    own = settings.data.source
    if data in NAMED or (isinstance(own, str) and Path(data).is_dir() and Path(own).absolute() == Path(data).absolute()):
        split: Settings = SimpleNamespace(
            **vars(settings) | {"data": SimpleNamespace(**vars(settings.data) | {"source": data})}
        )
        loaded = load_data(split)
        assert isinstance(loaded.val, ImageList)  # as of every source but a function
        names, images = loaded.classes, loaded.val
    elif Path(data).is_dir():
        part = next((Path(data) / name for name in ("val", "test") if (Path(data) / name).is_dir()), Path(data))
        images, names = class_folders(part, check=settings.data.on_bad_image == "stop")
    else:
        raise RecipeError(f"--data {data}: no such folder. Wanted: val/CLASS/*.jpg, test/CLASS/*.jpg or CLASS/*.jpg in it")
    if set(names) != set(classes):
        only = [", ".join(sorted(set(a) - set(b))[:10]) or "none" for a, b in ((classes, names), (names, classes))]
        raise RecipeError(
            f"the classes of the model and of {data} differ: only the model has: {only[0]}; only {data} has: {only[1]}"
        )
    return ImageList(images.items, [classes.index(names[label]) for label in images.labels], images.read)


def class_table(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images, precision, recall and F1 of each class, of labels [n], or [n, classes] of 0 and 1, that could be read."""
    seen = ~unreadable(labels)
    logits, labels = logits[seen], labels[seen]
    several = labels.ndim == 2
    truth = labels.bool() if several else one_hot(labels, len(classes)).bool()
    said = logits.sigmoid() > 0.5 if several else one_hot(logits.argmax(1), len(classes)).bool()
    right, there, predicted = (part.sum(0) for part in (truth & said, truth, said))
    columns = {
        "images": there,
        "precision": right / predicted.clamp(min=1),
        "recall": right / there.clamp(min=1),
        "f1": 2 * right / (predicted + there).clamp(min=1),
    }
    return [
        {"class": name, **{key: column[label].item() for key, column in columns.items()}} for label, name in enumerate(classes)
    ]


def evaluation_as_text(result: dict[str, Any]) -> str:
    """The scores in a line, a table of the classes and, of few classes, the confusion matrix."""
    reached = ", ".join(f"{word} {result[name]:.2%}" for name, word in TOLD.items() if name in result)
    rows: list[tuple[str, ...]] = [("class", "images", "precision", "recall", "F1")]
    rows += [
        (row["class"], str(row["images"]), *(f"{row[key]:.2%}" for key in ("precision", "recall", "f1")))
        for row in result["classes"]
    ]
    text = f"{reached}, loss {result['loss']:.4f}; {result['val_images']} images\n\n{in_columns(rows, numbers=True)}"
    names = [row["class"] for row in result["classes"]]
    if "confusion" in result and len(names) <= 20:
        counts = [(name, *map(str, row)) for name, row in zip(names, result["confusion"], strict=True)]
        text += f"\n\n{in_columns([('labelled, as', *names), *counts], numbers=True)}"
    return text
