"""Statistics of a set of images: how many, how large, in colour or grey, how many a class; what the pixels of one say."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from finetune.data.dataset import ImageData, ImageList
from finetune.data.sources import leave_out_idle, load_data, read_columns
from finetune.data.split import has_files, names_of
from finetune.images.decode import open_file, orientation
from finetune.images.read import as_pil
from finetune.images.remote import ahead
from finetune.recipe import Recipe
from finetune.recipe.load import check_source
from finetune.recipe.metrics import NUMBER_LOSSES
from finetune.recipe.recipe import minimal_recipe
from finetune.tools.similar import thumbnail
from finetune.utils.text import as_number, note, readable
from finetune.utils.urls import as_path, is_table, is_url

MANY = 50  # different whole numbers, from which on they may be no names of classes
SHARP_SIDE = 256  # pixels of the longer side at which sharpness is measured


@dataclass(frozen=True)
class ImageStats:
    """Statistics of a set of images; sizes and colours are those of a sample."""

    source: str  # a named set, or the absolute path of a folder
    train: int  # training images
    val: int
    classes: tuple[str, ...]
    smallest: int  # images of the smallest class, of both parts: a split leaves more or fewer to train on by chance
    largest: int
    side: int  # median of the shorter sides, in pixels
    least: int  # the shortest side
    aspect: float  # median of long side / short side
    longest: float  # the same of the longest tenth, at least
    grey: bool  # no image has colours
    loss: str = "cross_entropy"  # for labels as these are
    ranges: tuple[tuple[float, float], ...] = ()  # of labels that are numbers: the ends of each, in place of sizes of classes
    channels: int | None = None  # of arrays; None of photographs


def compute_image_stats(source: str, loss: str | None = None, channels: int | None = None) -> ImageStats:
    """Statistics of the images that a recipe with that source would train on, with a `loss` or the one that fits its labels.

    With `channels` they are arrays.
    """
    check_source(source)
    source = str(Path(source).resolve()) if Path(source).exists() else source
    recipe = recipe_for(source, loss)
    if not recipe.of_numbers:  # several labels an image are refused, with what to do
        recipe = minimal_recipe("resnet18", source, image_size=32)
    recipe = replace(recipe, data=replace(recipe.data, channels=channels))
    return sample_stats(load_data(recipe), source, recipe.loss, channels)


def sample_stats(data: ImageData, source: str, loss: str = "cross_entropy", channels: int | None = None) -> ImageStats:
    """Statistics of the images of a source, whose labels are those of a loss.

    Sizes are those of 500 images, colours those of 50, spread evenly over the training images.
    """
    assert isinstance(data.train, ImageList) and isinstance(data.val, ImageList)  # as of every source but a function
    some = range(0, len(data.train), -(-len(data.train) // 500))
    sizes = np.array([image_size(data.train, i, channels) for i in ahead(data.train.items, some)])
    labels, numbers = np.concatenate([data.train.labels, data.val.labels]), loss in NUMBER_LOSSES
    counts = [len(labels)]
    if not numbers:
        counts = labels.sum(0).tolist() if labels.ndim > 1 else [*Counter(map(int, labels)).values()]
    return ImageStats(
        source,
        len(data.train),
        len(data.val),
        data.classes,
        min(counts),
        max(counts),
        side=int(np.median(sizes.min(1))),
        least=int(sizes.min()),
        aspect=at_quantile(sizes.max(1) / sizes.min(1), 0.5),
        longest=at_quantile(sizes.max(1) / sizes.min(1), 0.9),
        grey=all(is_grey(as_pil(data.train[i][0])) for i in range(0, len(data.train), -(-len(data.train) // 50))),
        channels=channels,
        loss=loss,
        ranges=tuple(zip(labels.min(0).tolist(), labels.max(0).tolist(), strict=True)) if numbers else (),
    )


def at_quantile(ratios: np.ndarray, share: float) -> float:
    """What so large a share of long sides / short sides are at most."""
    return round(float(np.quantile(ratios, share)), 2)


def recipe_for(source: str, loss: str | None = None) -> Recipe:
    """A minimal recipe with these images, and with a `loss` or the one that fits the labels of a table."""
    if loss is None:
        loss, said = loss_for(source)
        if said:
            note(said)
    options: dict[str, Any] = {"loss": loss, "metric": "top1"}
    if loss in NUMBER_LOSSES:
        options["metric"] = "r2"  # as the units of several may differ
    elif loss == "multi_label":
        options["metric"] = "mean_average_precision"
    return replace(minimal_recipe("resnet18", source, image_size=32), **options)


def loss_for(source: str) -> tuple[str, str]:
    """(the loss for labels as a table has them, what is to be said of that choice); "cross_entropy" of all else, as of classes.

    Numbers, with "huber", are those in columns label_NAME, and those in a column label where one is not whole. Whole ones are
    classes, which are often called so; of more than 50 they are numbers where one of them has a single image.
    """
    if not is_table(source) or not (is_url(source) or Path(source).is_file()):
        return "cross_entropy", ""
    columns, _ = leave_out_idle(*read_columns(source, ("path",)))
    if not columns["label"] and any(name.startswith("label_") for name in columns):
        return "huber", ""
    if any(re.search("[;|]", cell) for cell in columns["label"]):
        return "multi_label", ""
    numbers = Counter(as_number(cell) for cell in columns["label"])
    whole = all(number is not None and number.is_integer() for number in numbers)
    if None in numbers or whole and len(numbers) <= MANY:
        return "cross_entropy", ""
    found, other = ("numbers", "classes") if not whole or min(numbers.values()) < 2 else ("classes", "numbers")
    losses = {"numbers": "huber", "classes": "cross_entropy"}
    return losses[found], (
        f"the column label of {as_path(source).name} has {len(numbers)} different {'whole ' * whole}numbers, taken as {found}; "
        f"as {other}: --loss {losses[other]}, of train --set loss={losses[other]}"
    )


def image_size(images: ImageList, position: int, channels: int | None = None) -> tuple[int, int]:
    """Width and height in pixels; of a photograph's file only the header is read."""
    item = images.items[position]
    if isinstance(item, str | Path) and not channels:
        with open_file(item) as image:
            return image.size[::-1] if (orientation(image) or 1) >= 5 else image.size
    return as_pil(images[position][0]).size


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has no colours; scanners and JPEG leave a trace of some."""
    return float(np.ptp(np.asarray(image, dtype=np.int16), axis=2).mean()) < 3


class Look(NamedTuple):
    """What one image's pixels say."""

    digest: bytes
    thumb: np.ndarray
    size: tuple[int, int]
    sharpness: float  # variance of the Laplacian, of that of the grey levels


def look_at(image: Image.Image) -> Look:
    """What an image's pixels say."""
    pixels = np.asarray(image)
    digest = hashlib.blake2b(pixels.tobytes(), key=str(pixels.shape).encode(), digest_size=16).digest()
    small = image.convert("L")
    small.thumbnail((SHARP_SIDE, SHARP_SIDE), Image.Resampling.BOX)
    grey = np.pad(np.asarray(small, np.float32), 1, mode="edge")
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return Look(digest, thumbnail(image), image.size, float(laplacian.var() / max(grey.var(), 1e-6)))


@dataclass
class Collection(Dataset[tuple[Image.Image, Any]]):
    """The training and then the validation images of a source, as one map-style set."""

    data: ImageData
    source: str

    def __post_init__(self) -> None:
        self.parts: list[ImageList] = [self.data.train, self.data.val]  # type: ignore[list-item]  # as of every source
        self.labels: list[Any] = [label for part in self.parts for label in part.labels]
        self.split = ["train"] * len(self.parts[0]) + ["val"] * len(self.parts[1])
        files = has_files(self.parts[0])
        self.names = [
            readable(name) if files else f"{split} {name}"
            for split, part in zip(("train", "val"), self.parts, strict=True)
            for name in names_of(part, self.source)
        ]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        first = len(self.parts[0])
        return self.parts[0][index] if index < first else self.parts[1][index - first]

    def label(self, index: int) -> str:
        """The name of an image's class, or of its classes."""
        label = self.labels[index]
        numbers = [int(label)] if np.ndim(label) == 0 else np.flatnonzero(label).tolist()
        return ";".join(self.data.classes[number] for number in numbers)


def count_classes(images: Collection, looks: dict[int, Look]) -> list[dict[str, Any]]:
    """Images, training and validation images, and the range of the shorter sides, of each class."""
    members: list[list[int]] = [[] for _ in images.data.classes]
    for i, label in enumerate(images.labels):
        for number in np.flatnonzero(label).tolist() if np.ndim(label) else [int(label)]:
            members[number].append(i)
    rows = []
    for name, own in zip(images.data.classes, members, strict=True):
        counts, sides = Counter(images.split[i] for i in own), [min(looks[i].size) for i in own if i in looks]
        numbers = {"images": len(own), "train": counts["train"], "val": counts["val"]}
        rows.append({"class": name, **numbers, "side": [min(sides), max(sides)] if sides else None})
    return rows


def stats_of(images: Collection, looks: dict[int, Look]) -> ImageStats:
    """Statistics of images that were all looked at."""
    counts = [row["images"] for row in count_classes(images, looks)]
    sides = np.array([sorted(look.size) for look in looks.values()], float)
    return ImageStats(
        images.source,
        len(images.parts[0]),
        len(images.parts[1]),
        images.data.classes,
        min(counts),
        max(counts),
        side=int(np.median(sides[:, 0])),
        least=int(sides.min()),
        aspect=at_quantile(sides[:, 1] / sides[:, 0], 0.5),
        longest=at_quantile(sides[:, 1] / sides[:, 0], 0.9),
        grey=all(float(np.ptp(look.thumb.astype(np.int16), axis=2).mean()) < 3 for look in looks.values()),
    )
