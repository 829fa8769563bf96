"""Sheets of images: as they are augmented, predicted, mistaken."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.loader import ImageDataset, is_unreadable, name_others
from finetune.images.read import as_pil
from finetune.metrics.calibration import in_parts
from finetune.recipe.data import in_pixels
from finetune.recipe.metrics import name_numbers
from finetune.report.drawing import run_title, save_figure, shorten, style
from finetune.report.heat_maps import heat_maps, overlay, to_pixels
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.text import print_error, readable
from finetune.utils.urls import as_path

NUMBER = 24  # images on a sheet
AUGMENTED = 6  # images that are shown as augmented
WIDTH = 108  # characters of small print across a sheet


class Tile(NamedTuple):
    """An image, and what is written below it."""

    image: Image.Image | np.ndarray
    text: str
    colour: str = "black"


def draw_sheet(tiles: Sequence[Tile], title: str, file: Path, columns: int = 4, wide: int = 1) -> Path:
    """Write the tiles as a sheet, row by row; `wide`: of how many squares side by side a tile is."""
    rows, lines = math.ceil(len(tiles) / columns), max(tile.text.count("\n") + 1 for tile in tiles)
    height = (8 / columns / wide + 0.1 + 0.17 * lines) * rows + 0.4 + 0.2 * (title.count("\n") + 1)
    figure = Figure(figsize=(8, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(tiles) :]:
        axes.set_axis_off()
    for axes, tile in zip(grid.flat, tiles, strict=False):
        axes.imshow(tile.image)
        axes.set(xticks=[], yticks=[], anchor="S")
        axes.spines[:].set_visible(False)
        axes.set_xlabel(tile.text, fontsize="small", color=tile.colour, **style(tile.text))
    figure.suptitle(title, fontsize="medium", **style(title))
    return save_figure(figure, [], file)


def plot_augmented(run: Path, images: ImageDataset, epochs: int) -> Path | None:
    """augmented.png of a run: see `draw_augmented`."""
    return draw_augmented(run / "augmented.png", run_title(run), images, epochs)


def draw_augmented(file: Path, title: str, images: ImageDataset, epochs: int) -> Path | None:
    """Some training images as they are, and as the network gets them in its first epochs, up to 3.

    These are the run's own augmentations, which depend on seed, epoch and image alone; mixup and cutmix come after them. None
    if no image can be read.
    """
    epochs = min(3, epochs)
    width, tiles = WIDTH // (1 + epochs), list[Tile]()
    for i in evenly_spaced(len(images), AUGMENTED):
        try:
            pixels, label = images.read(i)
        except RecipeError as error:
            if images.on_bad_image == "stop":
                raise name_others(error, images.images) from None
            continue
        except OSError:
            if images.on_bad_image == "stop":
                raise
            continue
        shown = as_pil(Image.fromarray(pixels) if images.kind is None else pixels)
        tiles.append(Tile(shown, f"{shorten(name_of_image(images, i), width)}\n{shorten(name_labels(images, label), width)}"))
        for epoch in range(epochs):
            augmented = as_augmented(images, epoch, i)
            size = f", {in_pixels(augmented.shape[:2])} px" if images.growing else ""
            tiles.append(Tile(augmented, f"epoch {epoch + 1}{size}\n"))
    if not tiles:
        return None
    seen = "in epoch 1" if epochs == 1 else f"in epochs 1 to {epochs}"
    return draw_sheet(tiles, f"{title}\ntraining images, and as augmented {seen}", file, 1 + epochs)


def as_augmented(images: ImageDataset, epoch: int, index: int) -> np.ndarray:
    """The pixels, uint8 [H, W, 3], that the network gets for an image in an epoch."""
    return to_pixels(images.transform.batch(images[epoch, index][0][None])[0], images.transform.preprocessing).numpy()


def plot_predictions(run: Path, logits: torch.Tensor, labels: torch.Tensor, images: ImageDataset) -> Path | None:
    """predictions.png: validation images drawn evenly, each with its prediction, green if right, else red; None if none."""
    seen = (~is_unreadable(labels)).nonzero()[:, 0].tolist()
    several = labels.ndim == 2
    right = ((logits > 0) == labels.bool()).all(1) if several else logits.argmax(1) == labels
    tiles = []
    for i in (seen[place] for place in evenly_spaced(len(seen), NUMBER)):
        guesses = (logits[i] > 0).nonzero()[:, 0].tolist() if several else [int(logits[i].argmax())]
        probs = logits[i].sigmoid() if several else logits[i].softmax(0)
        tiles.append(Tile(picture(images, i), describe(images, i, labels[i], guesses, probs), "C2" if right[i] else "C3"))
    if not tiles:
        return None
    total = int(right[seen].sum())
    counted = f"{len(tiles)} of {len(seen)} validation images; of all, {total} are predicted as labelled (green)"
    return draw_sheet(tiles, run_title(run, counted), run / "predictions.png")


def plot_mistakes(
    run: Path, logits: torch.Tensor, labels: torch.Tensor, images: ImageDataset, net: nn.Module | None = None
) -> Path | None:
    """mistakes.png: the wrongly classified images of the highest loss, worst first, as the data set has them; None if none.

    With the network that gave the logits, and a heat map can be had of it, beside each image stands what in it speaks for the
    predicted class, and what for the labelled one.
    """
    losses = torch.cat([cross_entropy(part, own, reduction="none") for part, own in in_parts(logits, labels)])
    guesses = logits.argmax(1)
    wrong = (guesses != labels) & ~is_unreadable(labels)
    worst = [i for i in losses.argsort(descending=True).tolist() if wrong[i]][:NUMBER]
    if not worst:
        return None
    asked = torch.stack([guesses[worst], labels[worst]])
    heats = heats_of(net, images, worst, asked) if net else None
    columns = max(2, min(4 if heats is None else 3, len(worst)))
    pictures, probs = [picture(images, i) for i in worst], dict(zip(worst, logits[worst].softmax(1), strict=True))
    if heats is not None:
        inputs = images.transform.preprocessing
        pictures = [
            side_by_side(one, [overlay(one, heat, inputs) for heat in both])
            for one, both in zip(pictures, heats.transpose(0, 1), strict=True)
        ]
    texts = [describe(images, i, labels[i], [int(guesses[i])], probs[i], columns) for i in worst]
    total = int(wrong.sum())
    shown_of = f"the {len(worst)} worst of {total} mistakes" if total > len(worst) else f"{total} mistake{'s' * (total > 1)}"
    title = run_title(run, f"{shown_of} in {len(labels)} images")
    if heats is not None:
        title += "\nthe image; what in it speaks for the predicted class (bright: most); for the labelled class"
    tiles = [Tile(one, text) for one, text in zip(pictures, texts, strict=True)]
    return draw_sheet(tiles, title, run / "mistakes.png", columns, 1 if heats is None else 3)


def heats_of(net: nn.Module, images: ImageDataset, indices: Sequence[int], classes: torch.Tensor) -> torch.Tensor | None:
    """Heat maps [k, n, h, w] of n images for classes [k, n]; None for a network without places, or where it fails."""
    try:
        pixels = images.transform.batch(torch.stack([images[0, i][0] for i in indices]))
        heats = heat_maps(net, pixels.repeat(len(classes), 1, 1, 1), classes.flatten())
    except Exception as error:  # the sheet is worth more than what is beside its images
        print_error(f"no heat maps of the mistakes: {type(error).__name__}: {first_line(error)}")
        return None
    return None if heats is None else heats.unflatten(0, classes.shape)


def side_by_side(image: Image.Image, others: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """An image, brought to the height of the others or as wide as high, and the others, on white."""
    side = max(others[0].size)
    whole = Image.new("RGB", (side + sum(gap + other.width for other in others), side), "white")
    fitting = ImageOps.contain(image, (side, side))
    whole.paste(fitting, ((side - fitting.width) // 2, (side - fitting.height) // 2))
    for i, other in enumerate(others):
        whole.paste(other, (side + gap + i * (gap + other.width), (side - other.height) // 2))
    return whole


def describe(
    images: ImageDataset, index: int, label: torch.Tensor, guesses: Sequence[int], probs: torch.Tensor, columns: int = 4
) -> str:
    """The file's name, its labels, and what is predicted: one class with its probability, or several."""
    width = WIDTH // columns
    labelled = shorten(name_labels(images, label.numpy()), width - 10)
    predicted = shorten(", ".join(images.classes[guess] for guess in guesses) or "none", width - 10)
    if len(guesses) == 1:
        predicted += f"{' ' if len(predicted) <= width - 18 else chr(10)}({100 * probs[guesses[0]]:.0f} %)"
    return f"{shorten(name_of_image(images, index), width)}\nlabelled {labelled},\npredicted {predicted}"


def name_labels(images: ImageDataset, label: int | np.ndarray) -> str:
    """The name of a label, or the names of several; or numbers."""
    if images.of_numbers:
        return name_numbers(np.atleast_1d(label).tolist(), images.classes)
    if np.ndim(label) == 0:
        return images.classes[int(label)]
    return ", ".join(name for name, there in zip(images.classes, np.asarray(label), strict=True) if there) or "none"


def picture(images: ImageDataset, index: int) -> Image.Image:
    """An image as the data set has it."""
    return as_pil(images.images[index][0], images.background)


def name_of_image(images: ImageDataset, index: int) -> str:
    """The name of an image's file, or its number in the data set."""
    items = getattr(images.images, "items", None)
    item = items[index] if isinstance(items, Sequence) else None
    return readable(as_path(item).name) if isinstance(item, str | Path) else f"image {index}"


def evenly_spaced(length: int, number: int) -> list[int]:
    """Up to `number` indices of so many items, from the first to the last."""
    number = min(number, length)
    return [i * (length - 1) // max(1, number - 1) for i in range(number)]
