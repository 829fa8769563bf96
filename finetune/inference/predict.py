"""A fine-tuned network, loaded again, and what it says of images."""

import csv
import glob
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from finetune.data.dataset import ImageList, Images
from finetune.data.folders import read_image
from finetune.data.loader import ImageDataset, is_unreadable
from finetune.data.transforms import eval_transform
from finetune.models.backbone import memory_format
from finetune.models.saved import SavedModel, load_model
from finetune.train.evaluate import predict_logits
from finetune.train.setup import RunOptions, make_accelerator
from finetune.utils.errors import RecipeError
from finetune.utils.text import align_columns


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
    inputs = ImageDataset(
        images, eval_transform(preprocessing), settings.seed, classes, on_bad_image, settings.loss == "multi_label"
    )
    return predict_logits(settings, net, inputs, accelerator, RunOptions(workers=workers))


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
    seen = ~is_unreadable(labels)
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
    return align_columns(lines)


def predictions_as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A header and a row an image: file, predicted (several joined by ;), class_1, probability_1, class_2, ..."""
    table = csv.writer(text := io.StringIO(), lineterminator="\n")
    ranks = range(1, len(rows[0]["top"]) + 1)
    table.writerow(["file", "predicted", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for row in rows:
        predicted = row["predicted"] if isinstance(row["predicted"], str) else ";".join(row["predicted"])
        table.writerow([row["file"], predicted, *(value for pair in row["top"] for value in pair)])
    return text.getvalue()
