"""Statistics of a set of images: how many, how large, in colour or grey, how many a class."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.dataset import ImageList
from finetune.data.decode import open_file, orientation
from finetune.data.sources import load_data
from finetune.recipe.load import check_source
from finetune.recipe.recipe import minimal_recipe


@dataclass(frozen=True)
class ImageStats:
    """Statistics of a set of images; sizes and colours are those of a sample."""

    source: str  # a named set, or the absolute path of a folder
    train: int  # training images
    val: int
    classes: tuple[str, ...]
    smallest: int  # training images of the smallest class
    largest: int
    side: int  # median of the shorter sides, in pixels
    least: int  # the shortest side
    aspect: float  # median of long side / short side
    grey: bool  # no image has colours


def compute_image_stats(source: str) -> ImageStats:
    """Statistics of the images that a recipe with that source would train on.

    Sizes are those of 500 images, colours those of 50, spread evenly over the training images.
    """
    check_source(source)
    source = str(Path(source).resolve()) if Path(source).exists() else source
    data = load_data(minimal_recipe("resnet18", source, image_size=32))
    assert isinstance(data.train, ImageList)  # as of every source but a function
    sizes = np.array([image_size(data.train, i) for i in range(0, len(data.train), -(-len(data.train) // 500))])
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


def image_size(images: ImageList, position: int) -> tuple[int, int]:
    """Width and height in pixels; of a file only the header is read."""
    item = images.items[position]
    if isinstance(item, str | Path):
        with open_file(item) as image:
            return image.size[::-1] if (orientation(image) or 1) >= 5 else image.size
    return images[position][0].size


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has no colours; scanners and JPEG leave a trace of some."""
    return float(np.ptp(np.asarray(image, dtype=np.int16), axis=2).mean()) < 3
