"""Images and labels as lists, and how one list is split in two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from finetune.utils.errors import RecipeError

Many = Sequence[Any] | np.ndarray  # of images: their items, or their labels, numbers [n] or 0 and 1 [n, classes]
Reader = Callable[[Any], Image.Image]  # makes the RGB image of an item


class Images(Protocol):
    """A map-style set of (PIL image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Any]: ...


@dataclass(frozen=True)
class ImageData:
    """Two map-style sets of (PIL image, label), labels counting from 0 in the order of `classes`."""

    train: Images
    val: Images
    classes: tuple[str, ...]


class ImageList:
    """A map-style set: `read(item)` makes the RGB image of an item when it is asked for.

    `subgroups` says what kind of image each is, beside its label; a run's result then has the scores of each kind, too.
    """

    def __init__(self, items: Many, labels: Many, read: Reader, subgroups: Sequence[str] | None = None):
        self.items, self.labels, self.read, self.subgroups = items, labels, read, subgroups

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        label = self.labels[index]
        return self.read(self.items[index]), label if np.ndim(label) else int(label)

    def part(self, indices: list[int]) -> "ImageList":
        """The list of these images alone."""

        def chosen(values: Many) -> Many:
            return values[indices] if isinstance(values, np.ndarray) else [values[i] for i in indices]

        subgroups = self.subgroups and [self.subgroups[i] for i in indices]
        return ImageList(chosen(self.items), chosen(self.labels), self.read, subgroups)


def stratified_split(strata: Sequence[Any], val_share: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, validation) indices with the same share of every stratum; the same split for a seed, everywhere, for ever."""
    random = np.random.RandomState(seed)  # numpy promises that this old generator's numbers never change
    members_of: dict[Any, list[int]] = {}
    for i, stratum in enumerate(strata):
        members_of.setdefault(stratum, []).append(i)
    train, val = [], []
    for stratum in sorted(members_of):
        members = random.permutation(members_of[stratum]).tolist()
        cut = round(len(members) * val_share)
        val += members[:cut]
        train += members[cut:]
    return sorted(train), sorted(val)


def split(images: ImageList, strata: Sequence[Any], val_share: float, seed: int = 0) -> tuple[ImageList, ImageList]:
    """A list of images as training and validation images; without a seed by a split that no recipe changes."""
    train, val = (images.part(indices) for indices in stratified_split(strata, val_share, seed))
    return train, val


def from_lists(parts: list[ImageList], classes: Sequence[str], where: str | Path, seed: int) -> ImageData:
    """The lists of the training and the validation images; of one alone a fifth of each class validates.

    Raises:
        RecipeError: for a class with too few images for that, a set without images, or a single class.
    """
    if len(parts) == 1:
        labels = np.asarray(parts[0].labels)
        # of several labels the rarest counts, so that each class can have its share
        strata = labels if labels.ndim == 1 else np.where(labels, labels.sum(0, dtype=int), len(labels) + 1).argmin(1)
        parts = [*split(parts[0], strata.tolist(), 0.2, seed)]
        kept = np.asarray(parts[1].labels)
        seen = [(kept == i).any() if labels.ndim == 1 else kept[:, i].any() for i in range(len(classes))]
        if not all(seen):
            raise RecipeError(
                f"data: class '{classes[seen.index(False)]}' in {where} has too few images to keep a fifth for "
                "validation (3 are enough); add some, or split them yourself"
            )
    sizes = [len(part) for part in parts]
    if not all(sizes) or len(classes) < 2:
        raise RecipeError(f"data: {where} has {sizes[0]} training and {sizes[1]} validation images of {len(classes)} classes")
    return ImageData(parts[0], parts[1], tuple(classes))


def held_out(data: ImageData, share: float) -> ImageData:
    """For choosing a recipe: that share of each class of the training images, in place of the validation images.

    A number that is reported must not have been chosen on the images it is told for. The split is the same for every seed.

    Raises:
        RecipeError: if there is no list of the training images' labels, or a class has too few.
    """
    labels = labels_of(data.train)
    if labels.ndim > 1:
        raise RecipeError("data: holdout needs one label an image")
    images = ImageList(range(len(labels)), labels.tolist(), partial(image_of, data.train))
    train, val = split(images, labels.tolist(), share)
    if set(val.labels) != set(labels.tolist()):
        raise RecipeError(f"data: holdout={share} leaves nothing of a class with {np.bincount(labels).min()} training images")
    return ImageData(train, val, data.classes)


def image_of(images: Images, index: int) -> Image.Image:
    return images[index][0]


def labels_of(images: Images) -> np.ndarray:
    """The label of every image, without reading one.

    Raises:
        RecipeError: if the data set has no such list.
    """
    for name in ("labels", "targets"):  # ours, torchvision's
        if len(there := getattr(images, name, ())) == len(images):
            return np.asarray(there)
    raise RecipeError(
        "balanced sampling, class weights and a holdout need to know every label: give the data set that the "
        "recipe's function returns a list `targets`"
    )
