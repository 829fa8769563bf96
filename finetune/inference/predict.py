"""The classes that a trained model predicts for images."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune.data.dataset import ImageList, Images
from finetune.data.decode import open_file, read_image
from finetune.data.folders import find_images
from finetune.data.loader import ImageDataset, is_unreadable
from finetune.data.transforms import eval_transform
from finetune.models.backbone import memory_format
from finetune.models.saved import SavedModel, load_model
from finetune.training.evaluate import predict_logits
from finetune.training.setup import RunOptions, make_accelerator
from finetune.utils.errors import RecipeError
from finetune.utils.text import align_columns


def compute_logits(model: SavedModel, images: Images, on_bad_image: str, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], labels) of a map-style set of (PIL image, label), as the run's own evaluation computes them.

    A run in fp16 is evaluated in float32 where there is no GPU.
    """
    net, classes, preprocessing, recipe = model
    if recipe.mixed_precision == "fp16" and not torch.accelerator.is_available():
        recipe = replace(recipe, mixed_precision="no")
    accelerator, layout = make_accelerator(recipe), memory_format(recipe, net)
    net.to(accelerator.device).to(memory_format=layout)
    several = recipe.loss == "multi_label"
    background, transform = recipe.data.background, eval_transform(preprocessing)
    dataset = ImageDataset(images, transform, recipe.seed, classes, on_bad_image, several, layout, background)
    return predict_logits(recipe, net, dataset, accelerator, RunOptions(workers=workers))


def predict(source: str | Path, paths: Iterable[str | Path], top: int = 5, workers: int = 0) -> list[dict[str, Any]]:
    """What `predict_images` says of these files, folders and globs.

    Raises:
        RecipeError: for what load_model and find_images refuse, and if no image could be read.
    """
    if top < 1:
        raise RecipeError(f"--top starts at 1, not {top}")
    files = find_images(paths)
    return predict_images(load_model(source), files, top, workers)


def predict_images(model: SavedModel, images: Sequence[Any], top: int = 5, workers: int = 0) -> list[dict[str, Any]]:
    """The likeliest classes of each image: {"file", "predicted", "probability", "top": [[class, probability], ...]}.

    Images are paths, PIL images, or numpy arrays and torch tensors of uint8 [H, W, 3] or [H, W]; "file" is a path's own.

    Probabilities are a softmax over the classes, or sigmoids where the loss is binary or multi_label. With several labels an
    image, "predicted" lists the classes above 0.5, and "probability" theirs. An image that can't be read is named on stderr,
    left out and counted there.

    Raises:
        RecipeError: if no image could be read.
    """
    classes, loss = model.classes, model.recipe.loss
    read = partial(read_image, load=open_any, where=name_of, background=model.recipe.data.background)
    logits, labels = compute_logits(model, ImageList(images, [0] * len(images), read), "skip", workers)
    seen = ~is_unreadable(labels)
    probs = logits.double().softmax(1) if loss == "cross_entropy" else logits.double().sigmoid()
    rows = []
    for i in seen.nonzero()[:, 0].tolist():
        ranked = [[classes[label], probs[i, label].item()] for label in probs[i].argsort(descending=True, stable=True)]
        file = str(images[i]) if isinstance(images[i], str | Path) else ""
        row = {"file": file, "predicted": ranked[0][0], "probability": ranked[0][1], "top": ranked[:top]}
        if loss == "multi_label":
            yes = [pair for pair in ranked if pair[1] > 0.5]
            row |= {"predicted": [name for name, _ in yes], "probability": [prob for _, prob in yes]}
        rows.append(row)
    return rows


def open_any(item: Any) -> Image.Image:
    """Pillow's image of a path, a PIL image, an array or a tensor."""
    if isinstance(item, str | Path):
        return open_file(item)
    if isinstance(item, Image.Image):
        return item
    pixels = np.asarray(item)
    if pixels.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ValueError(f"an array of {pixels.dtype}, not of uint8")
    return Image.fromarray(pixels)


def name_of(item: Any) -> str:
    """A path as it is; of all else, what it is."""
    return str(item) if isinstance(item, str | Path) else f"given as {type(item).__name__}"


def predictions_as_table(rows: Sequence[dict[str, Any]]) -> str:
    """An aligned line an image: the file, what is predicted, and the likeliest classes with their probabilities."""
    lines: list[tuple[str, ...]] = [("file", "predicted", "probabilities")]
    for row in rows:
        predicted = row["predicted"] if isinstance(row["predicted"], str) else ", ".join(row["predicted"]) or "-"
        lines.append((row["file"], predicted, ", ".join(f"{name} {prob:.1%}" for name, prob in row["top"])))
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
