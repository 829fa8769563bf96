"""Data sets that come with a package, generated images for --smoke, those of a recipe's function, and labels as grades."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.dataset import ImageData, ImageList, labels_of
from finetune.images.decode import WHITE, Colour
from finetune.images.read import read_image
from finetune.recipe import Data, Recipe
from finetune.recipe.metrics import NUMBER_LOSSES
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import as_number


def digits() -> ImageData:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels (UCI, CC BY 4.0); a fixed fifth of each class is for validation."""
    require_package("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images * 255 / 16).round().astype(np.uint8)
    train, val = split(ImageList(images, scans.target, partial(read_image, load=Image.fromarray)), scans.target.tolist(), 0.2)
    return ImageData(train, val, tuple("0123456789"))


def elpv() -> ImageData:
    """2,624 electroluminescence photographs of solar cells, 300 px (package elpv-dataset, CC BY-NC-SA 4.0): defective or not.

    A cell counts as defective from a stated probability of 0.5. A fixed quarter of each label and cell type is for validation.
    """
    folder = require_package("elpv_dataset", "elpv-dataset") / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    paths, labels = [folder / path for path, _, _ in rows], [int(float(probability) >= 0.5) for _, probability, _ in rows]
    cell_types = [cell_type for _, _, cell_type in rows]
    train, val = split(ImageList(paths, labels, read_image, cell_types), list(zip(labels, cell_types, strict=True)), 0.25)
    return ImageData(train, val, ("functional", "defective"))


def split(images: ImageList, strata: Sequence[Any], val_share: float) -> tuple[ImageList, ImageList]:
    """(training, validation) images with the same share of every stratum; this split never changes, as results stand on it."""
    random = np.random.RandomState(0)  # numpy promises that this old generator's numbers never change
    members_of: dict[Any, list[int]] = {}
    for i, stratum in enumerate(strata):
        members_of.setdefault(stratum, []).append(i)
    train, val = list[int](), list[int]()
    for stratum in sorted(members_of):
        members = random.permutation(members_of[stratum]).tolist()
        cut = round(len(members) * val_share)
        val += members[:cut]
        train += members[cut:]
    return images.part(sorted(train)), images.part(sorted(val))


def generated() -> ImageData:
    """Coloured patches for --smoke, to see that everything runs."""
    train, val = (ImageList(numbers, [number % 10 for number in numbers], patch) for numbers in (range(22), range(22, 32)))
    return ImageData(train, val, tuple(f"patch {i}" for i in range(10)))


def patch(number: int, channels: int | None = None, background: Colour = WHITE) -> Any:
    """A PIL image, or with `channels` an array; nothing of it is transparent."""
    noise = np.random.RandomState(number).randint(0, 64, (16, 16, channels or 3))
    values = (noise + 19 * (number % 10)).astype(np.uint8)
    return values if channels else Image.fromarray(values)


def numbered(data: ImageData) -> ImageData:
    """The generated images, with the numbers of their classes as labels."""
    train, val = (
        ImageList(part.items, np.array(part.labels, float)[:, None], part.read)
        for part in (data.train, data.val)
        if isinstance(part, ImageList)
    )
    return ImageData(train, val, ("label",))


def from_names(parts: list[ImageList], classes: Sequence[str], source: str) -> tuple[list[ImageList], Sequence[str]]:
    """The images of class folders that are named by numbers, with these as labels, [n, 1], and the name of such a label.

    Raises:
        RecipeError: for a folder that is named by none.
    """
    numbers = [as_number(name) for name in classes]
    if other := [name for name, number in zip(classes, numbers, strict=True) if number is None]:
        raise RecipeError(
            f"data: labels that are numbers need numbers: a CSV, or folders named by them; {source} has {other[0]}/"
        )
    values = np.array(numbers, float)[:, None]
    return [ImageList(part.items, values[np.asarray(part.labels)], part.read) for part in parts], ("label",)


def from_function(source: Callable[[], Any], loss: str, data: Data) -> ImageData:
    """The images that a function of the recipe file returns, checked."""
    of_numbers = loss in NUMBER_LOSSES
    try:
        train, val = source()
        classes, sizes = tuple(map(str, train.classes)), (len(train), len(val))
        image, label = train[0]
        read_image(image, lambda image: image, lambda _: "0", data.background, channels=data.channels)
        np.asarray(label, dtype=float)
        if fault := wrong_shape(np.shape(label), len(classes), loss):
            raise ValueError(fault)
    except (TypeError, ValueError, AttributeError, IndexError, RecipeError) as error:
        raise RecipeError(
            f"data: {to_dict(source)} must return (train, validation), two data sets of (PIL "
            f"image, label) with a length, the first with a list `classes`: {error}"
        ) from error
    if not all(sizes) or len(classes) < 2 - of_numbers:
        raise RecipeError(
            f"data: {to_dict(source)} gave {sizes[0]} training and {sizes[1]} validation images "
            f"of {len(classes)} classes; there must be some of each, and {'a number' if of_numbers else '2 classes'}"
        )
    return ImageData(train, val, classes)


def wrong_shape(shape: tuple[int, ...], classes: int, loss: str) -> str:
    """What is wrong with a label of this shape; "" if nothing is. `classes` may be numbers, by their names."""
    if loss in NUMBER_LOSSES:
        fits, more = shape == (classes,) or (shape, classes) == ((), 1), f", and `classes` names {classes} numbers"
    elif loss == "multi_label":
        fits, more = shape in ((), (classes,)), f", not that of {classes} classes"
    else:
        fits, more = not shape, "; several labels an image: loss='multi_label'"
    return "" if fits else f"a label has the shape {shape}{more}"


def graded(data: ImageData, recipe: Recipe) -> ImageData:
    """The same images, where the metric asks for grades with classes in their order, "10" after "9"; numbers must be whole.

    Raises:
        RecipeError: for labels that are no grades, and for classes that are not one step apart.
    """
    if recipe.metric != "quadratic_kappa" or recipe.data.source == "generated":
        return data
    need = "data: metric='quadratic_kappa' needs grades, which are whole numbers"
    if recipe.of_numbers:
        for part in (data.train, data.val):
            table = labels_of(part).reshape(len(part), -1)
            for i, j in np.argwhere(table != table.round())[:1].tolist():
                raise RecipeError(f"{need}; '{data.classes[j]}' is {table[i, j]:g} in one image: name another metric")
        return data
    grades = {name: as_number(name) for name in data.classes}
    if other := [name for name, grade in grades.items() if grade is None or not grade.is_integer()]:
        raise RecipeError(f"{need}; the class '{other[0]}' is named by none: rename it, or name another metric")
    classes = sorted(grades, key=lambda name: (grades[name], name))
    steps = np.diff([grades[name] or 0.0 for name in classes])
    for one, two, step in zip(classes, classes[1:], steps, strict=False):
        if step == 0:
            raise RecipeError(f"{need}; the classes '{one}' and '{two}' are the same grade: give them one name")
        if step > steps.min() > 0:
            raise RecipeError(f"{need}, one step apart; there is none between '{one}' and '{two}': loss='mse' takes them so")
    if classes == [*data.classes]:
        return data
    if not isinstance(data.train, ImageList) or not isinstance(data.val, ImageList):
        raise RecipeError(f"{need}, in order: of {to_dict(recipe.data.source)} `classes` must be {', '.join(classes)}")
    place = np.array([classes.index(name) for name in data.classes])
    train, val = (
        ImageList(part.items, place[np.asarray(part.labels)].tolist(), part.read, part.subgroups, part.groups)
        for part in (data.train, data.val)
    )
    return replace(data, train=train, val=val, classes=tuple(classes))


def require_package(module: str, package: str, install: str = "") -> Path:
    """The folder of an optional package; raises RecipeError, with the pip line, if it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RecipeError(
            f"this data set needs the package {package}, which is not installed: pip install {install or package}"
        )
    return Path(spec.origin).parent
