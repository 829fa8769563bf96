"""What a folder of images is like: how many, how large, how coloured, how evenly spread over its classes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.dataset import ImageList
from finetune.data.sources import load_data
from finetune.recipe import AdamW, Cosine, Data, LayerDecay, Recipe


@dataclass(frozen=True)
class ImageStats:
    """What a set of images is like: a named set, or the absolute path of a folder.

    `smallest` and `largest` class are in training images, `side` is the median of the images' shorter sides and `least` the
    shortest, in pixels, `aspect` the median of long side to short side; `grey`: no image of the sample has colours.
    """

    source: str
    train: int
    val: int
    classes: tuple[str, ...]
    smallest: int
    largest: int
    side: int
    least: int
    aspect: float
    grey: bool


def look(source: str) -> ImageStats:
    """The stats of the images that a recipe with that source would train on.

    Sizes are those of 500 images, colours those of 50, spread evenly over the training images.

    Raises:
        RecipeError: as a run would, and for an image of the sample that can't be read.
    """
    source = str(Path(source).resolve()) if Path(source).exists() else source
    data = load_data(trial("resnet18", source, 32))
    assert isinstance(data.train, ImageList)  # as of every source but a function
    sizes = np.array([pixels(data.train, i) for i in range(0, len(data.train), -(-len(data.train) // 500))])
    counts = Counter(map(int, data.train.labels))
    return ImageStats(
        source,
        len(data.train),
        len(data.val),
        data.classes,
        min(counts.values()),
        max(counts.values()),
        side=int(np.median(sizes.min(1))),
        least=int(sizes.min()),
        aspect=round(float(np.median(sizes.max(1) / sizes.min(1))), 2),
        grey=all(is_grey(data.train[i][0]) for i in range(0, len(data.train), -(-len(data.train) // 50))),
    )


def trial(backbone: str, source: str, size: int) -> Recipe:
    """A recipe with only what is decided so far."""
    return Recipe(
        backbone=backbone,
        data=Data(source, size, 1),
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.01),
        optimizer=AdamW(),
        schedule=Cosine(),
        epochs=1,
        batch_norm="frozen",
    )


def pixels(images: ImageList, position: int) -> tuple[int, int]:
    """Width and height in pixels; of a file only the header is read."""
    item = images.items[position]
    if isinstance(item, str | Path):
        with Image.open(item) as image:
            return image.size
    return images[position][0].size


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has no colours; scanners and JPEG leave a trace of some."""
    return float(np.ptp(np.asarray(image, dtype=np.int16), axis=2).mean()) < 3
