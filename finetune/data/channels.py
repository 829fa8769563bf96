"""What arrays of a data set have in common: the type of their numbers, the mean and the deviation of each channel."""

from functools import partial
from typing import Any

import numpy as np

from finetune.data.dataset import ImageList, Images
from finetune.images.cache import PixelKind
from finetune.images.read import read_image
from finetune.images.remote import ahead
from finetune.recipe import Data
from finetune.utils.errors import RecipeError

LOOKED_AT = 500  # images, evenly spaced: of more the mean would hardly differ


def kind_of(preprocessing: dict[str, Any]) -> PixelKind | None:
    """What a network's preprocessing says of arrays; None of photographs."""
    return PixelKind(preprocessing["input_size"][0], preprocessing["pixels"]) if "pixels" in preprocessing else None


def fit_preprocessing(preprocessing: dict[str, Any], images: Images, data: Data) -> dict[str, Any]:
    """The preprocessing with the type, the mean and the deviation of these training images; of photographs as it is.

    Each image counts as much as any other, whatever its size. As in timm's, 255 is taken for 1.

    Raises:
        RecipeError: for an image that can't be read, unless such are skipped, and for two types of numbers.
    """
    if not data.channels:
        return preprocessing
    moments, dtype = list[np.ndarray](), ""
    indices = sorted({round(i) for i in np.linspace(0, len(images) - 1, LOOKED_AT)})
    for index in ahead(images.items if isinstance(images, ImageList) else (), indices):
        try:
            where = partial(name_of, images, index)
            pixels = read_image(images[index][0], unchanged, where, data.background, channels=data.channels)
        except (OSError, RecipeError):
            if data.on_bad_image == "stop":
                raise
            continue
        if dtype not in ("", pixels.dtype.name):
            first = f"others hold {dtype}: save them in one type"
            raise RecipeError(f"data: {name_of(images, index)} holds {pixels.dtype.name}, {first}", one_process=True)
        dtype, values = pixels.dtype.name, pixels.astype(np.float64) / 255
        moments.append(np.stack([values.mean((0, 1)), np.square(values).mean((0, 1))]))
    if not moments:
        raise RecipeError("data: no image could be read")
    mean, square = np.mean(moments, 0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    deviation[deviation < 1e-6 * np.maximum(np.abs(mean), 1e-12)] = 1  # a channel that is the same everywhere
    return preprocessing | {"mean": tuple(mean.tolist()), "std": tuple(deviation.tolist()), "pixels": dtype}


def unchanged(image: Any) -> Any:
    """What is read already."""
    return image


def name_of(images: Images, index: int, image: Any = None) -> str:
    """A file's path, or an image's number."""
    return str(images.items[index]) if isinstance(images, ImageList) else f"image {index}"
