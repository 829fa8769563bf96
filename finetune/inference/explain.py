"""What in an image speaks for the class that a trained model predicts: heat maps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image

from finetune.inference.predict import Look, count_unreadable, predict_rows
from finetune.models.saved import SavedModel
from finetune.recipe.serialize import to_dict
from finetune.report.drawing import save_figure, shorten, style
from finetune.report.heat_maps import blend, find_places, heat_maps, to_pixels
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.text import readable
from finetune.utils.urls import as_path

WIDTH = 60  # characters of small print across a picture


class Explanation(NamedTuple):
    """The likeliest class of an image, its probability, and what speaks for it.

    `heat` is float32 [h, w] from 0 to 1 by place, `picture` shows it over `image`, which is the image as the network sees it.
    """

    predicted: str
    probability: float
    heat: torch.Tensor
    image: Image.Image
    picture: Image.Image


def explain_images(model: SavedModel, images: Sequence[Any], workers: int = 0) -> list[Explanation | None]:
    """What speaks for the likeliest class of each image; None for one that can't be read, which is said on stderr.

    Images are those of `predict_images`. With `flip_test`, heat is of the image and not of its mirror image.

    Raises:
        RecipeError: for a network without places, and if no image could be read.
    """
    found: list[Explanation | None] = [None] * len(images)
    for _ in predict_rows(model, images, 1, workers, explaining(model, found.__setitem__)):
        pass
    count_unreadable(found.count(None), len(images))
    return found


def explaining(model: SavedModel, give: Callable[[int, Explanation], Any]) -> Look:
    """What `predict_rows` is to call, so that `give` gets the explanation of each image by its index.

    Raises:
        RecipeError: for a network without places.
    """
    net, classes, preprocessing, recipe = model[:4]
    if recipe.of_numbers:
        raise RecipeError("a heat map shows what speaks for a class, and this network predicts numbers")
    name, why = to_dict(recipe.backbone), "no tensor in it has places of the image"
    try:
        places = find_places(net, torch.rand(1, *preprocessing["input_size"], generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # each network raises something else
        places, why = None, f"{type(error).__name__}: {first_line(error)}"
    if places is None:
        raise RecipeError(f"no heat maps can be made of {name}: {why}")

    def look(indices: Sequence[int], batch: torch.Tensor, probs: torch.Tensor) -> None:
        labels = probs.argmax(1)
        heats = heat_maps(net, batch, labels, places)
        assert heats is not None  # as places are known
        for i, normalised, label, prob, heat in zip(
            indices, batch, labels.tolist(), probs.amax(1).tolist(), heats, strict=True
        ):
            pixels = to_pixels(normalised, preprocessing)
            give(i, Explanation(classes[label], prob, heat, Image.fromarray(pixels.numpy()), blend(pixels, heat)))

    return look


def picture_writer(model: SavedModel, files: Sequence[Path | str], pictures: Sequence[Path]) -> Look:
    """What `predict_rows` is to call, so that each image's explanation is drawn into its picture's file.

    Raises:
        RecipeError: for a network without places.
    """
    look = explaining(model, lambda i, explanation: draw(explanation, files[i], pictures[i]))
    for folder in {picture.parent for picture in pictures}:
        folder.mkdir(parents=True, exist_ok=True)
    return look


def draw(explanation: Explanation, file: Path | str, picture: Path) -> Path:
    """Write an image as the network sees it, beside it the heat, below them what is predicted."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    shown = {"as the network sees it": explanation.image, "bright: speaks for the class": explanation.picture}
    for axes, (title, pixels) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        axes.imshow(pixels)
        axes.set_axis_off()
        axes.set_title(title, fontsize="small")
    name, predicted = shorten(readable(as_path(file).name), WIDTH), shorten(explanation.predicted, WIDTH - 17)
    text = f"{name}\npredicted {predicted} ({100 * explanation.probability:.0f} %)"
    figure.supxlabel(text, fontsize="small", **style(text))
    return save_figure(figure, [], picture)
