"""The images of a recipe's source: a named data set, a folder, a table or a function of the recipe."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.builtin import digits, elpv, generated
from finetune.data.dataset import ImageData, from_lists, held_out
from finetune.data.external import TORCHVISION, from_hub, from_shards, from_torchvision
from finetune.data.folders import from_csv, from_folder
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest


def load_data(recipe: Recipe) -> ImageData:
    """The recipe's images, downloaded if need be; with a holdout, training images alone."""
    data = whole_data(recipe)
    return held_out(data, recipe.data.holdout) if recipe.data.holdout else data


def whole_data(recipe: Recipe) -> ImageData:
    """The training and validation images of the recipe's source."""
    source, multi_label = recipe.data.source, recipe.loss == "multi_label"
    if callable(source):
        return from_function(source, multi_label)
    if source in NAMED:
        return NAMED[source]()
    if source.startswith("torchvision/"):
        return torchvision_data(source.removeprefix("torchvision/"))
    if source.startswith("hf/"):
        return from_lists(*from_hub(source.removeprefix("hf/")), source, seed=0)
    if source.lower().endswith(".csv"):
        return from_lists(*from_csv(Path(source), multi_label), source, recipe.seed)
    if any(Path(source).glob("train-*.tar")):
        return from_lists(*from_shards(Path(source)), source, recipe.seed)
    if Path(source).is_dir():
        return from_folder(Path(source), recipe.seed, check=recipe.data.on_bad_image == "stop")
    raise RecipeError(
        f"data: no data set or folder '{source}'.{nearest(source, [*NAMED, *DOWNLOADED])} Named sets: "
        f"{', '.join(NAMED)}, torchvision/NAME, hf/NAME"
    )


def torchvision_data(name: str) -> ImageData:
    """A data set that torchvision reads; if it comes in one part, the same split for every seed."""
    return from_lists(*from_torchvision(name), f"torchvision/{name}", seed=0)


def known_size(recipe: Recipe) -> tuple[int, int] | None:
    """Training images and classes of a named set, as far as they are known without having it."""
    known = {"digits": (1438, 10), "elpv": (1969, 2), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}
    known |= {f"torchvision/{name}": row[2:4] for name, row in TORCHVISION.items()}
    return None if callable(recipe.data.source) else known.get(recipe.data.source)


def data_size(recipe: Recipe) -> tuple[int, int]:
    """Training images and classes, without having a named set that is still to be downloaded."""
    if (known := known_size(recipe)) and not recipe.data.holdout:
        return known
    data = load_data(recipe)
    return len(data.train), len(data.classes)


NAMED: dict[str, Callable[[], ImageData]] = {
    "digits": digits,
    "elpv": elpv,
    "cifar10": partial(torchvision_data, "CIFAR10"),
    "cifar100": partial(torchvision_data, "CIFAR100"),
    "generated": generated,
}
DOWNLOADED = ("cifar10", "cifar100", *(f"torchvision/{name}" for name in TORCHVISION))  # the others come with packages


def is_downloaded(source: str | Callable[[], Any]) -> bool:
    """Whether images may come over a network."""
    return source in DOWNLOADED or (isinstance(source, str) and source.startswith("hf/") and not Path(source[3:]).is_dir())


def from_function(source: Callable[[], Any], multi_label: bool) -> ImageData:
    """The images that a function of the recipe file returns, checked."""
    try:
        train, val = source()
        classes, sizes = tuple(train.classes), (len(train), len(val))
        image, label = train[0]
        image.convert, np.asarray(label, dtype=float)
        if np.shape(label) not in (((), (len(classes),)) if multi_label else ((),)):
            raise ValueError(
                f"a label has the shape {np.shape(label)}"
                + (f", not that of {len(classes)} classes" if multi_label else "; several labels an image: loss='multi_label'")
            )
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"data: {to_dict(source)} must return (train, validation), two data sets of (PIL "
            f"image, label) with a length, the first with a list `classes`: {error}"
        ) from error
    if not all(sizes) or len(classes) < 2:
        raise RecipeError(
            f"data: {to_dict(source)} gave {sizes[0]} training and {sizes[1]} validation images "
            f"of {len(classes)} classes; there must be some of each, and 2 classes"
        )
    return ImageData(train, val, classes)
