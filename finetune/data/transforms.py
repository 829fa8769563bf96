"""Transforms: augmentation for training, preprocessing for evaluation, mixup and cutmix."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from finetune.recipe import Augment, Recipe
from finetune.utils.errors import RecipeError
from finetune.utils.seed import seed_all


class Pixels:
    """Crop, resize and mirror, image by image on uint8, then the batch as normalised floats: what timm's transforms do.

    It draws what they draw from the same seed; values are as theirs, which pass through PIL, but for rounding. Without
    `augment` images are preprocessed for evaluation: resized and cropped in the middle.
    """

    def __init__(self, preprocessing: dict[str, Any], augment: Augment | None = None):
        self.preprocessing, self.augment, self.size = preprocessing, augment, preprocessing["input_size"][-1]
        self.resized = math.floor(self.size / preprocessing["crop_pct"])
        self.interpolation = InterpolationMode(preprocessing["interpolation"])
        self.mean, self.std = (255 * torch.tensor(preprocessing[name]) for name in ("mean", "std"))

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """Of uint8 pixels [H, W, 3] the uint8 input [size, size, 3] of the network."""
        if self.augment is None:
            image = functional.resize_image(channels_first(pixels), [self.resized], self.interpolation, antialias=True)
            return functional.center_crop_image(image, [self.size, self.size]).permute(1, 2, 0)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            channels_first(pixels), self.augment.crop_scale, self.augment.crop_ratio
        )
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        image = functional.resize_image(channels_first(crop), [self.size, self.size], self.interpolation, antialias=True)
        image = image.permute(1, 2, 0)
        return image.flip(1) if self.augment.hflip and torch.rand(1) < self.augment.hflip else image

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        """Of uint8 [n, H, W, 3] the normalised floats [n, 3, H, W], channels last in memory."""
        rows = images.flatten(2).float()  # [n, H, 3 W]: long rows are what makes this fast
        mean, std = (of.to(images.device).repeat(images.shape[2]) for of in (self.mean, self.std))
        return rows.sub_(mean).div_(std).view(images.shape).permute(0, 3, 1, 2)


class Timm:
    """Any of timm's transforms, of PIL images one by one to normalised floats."""

    def __init__(self, preprocessing: dict[str, Any], transform: Callable[[Image.Image], torch.Tensor]):
        self.preprocessing, self.transform = preprocessing, transform

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """Of uint8 pixels [H, W, 3] the floats [3, size, size]."""
        return self.transform(Image.fromarray(pixels))

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        return images


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def training_transform(recipe: Recipe, preprocessing: dict[str, Any]) -> Pixels | Timm:
    """How a recipe augments its training images.

    Raises:
        RecipeError: if timm can't read the `randaugment` text.
    """
    augment = recipe.augment
    if matches_timm(preprocessing) and not (augment.randaugment or augment.color_jitter or augment.erasing):
        return Pixels(preprocessing, augment)
    try:
        return Timm(
            preprocessing,
            create_transform(
                **preprocessing | {"color_jitter": augment.color_jitter or None},
                is_training=True,
                scale=augment.crop_scale,
                ratio=augment.crop_ratio,
                hflip=augment.hflip,
                auto_augment=augment.randaugment,
                re_prob=augment.erasing,
                re_mode="pixel",
            ),
        )
    except (AssertionError, ValueError) as error:
        raise RecipeError(
            f"augment: timm can't read randaugment={augment.randaugment!r}, written like 'rand-m9-mstd0.5-inc1' {error}"
        ) from error


def eval_transform(preprocessing: dict[str, Any]) -> Pixels | Timm:
    """The preprocessing of images for evaluation."""
    return Pixels(preprocessing) if matches_timm(preprocessing) else Timm(preprocessing, create_transform(**preprocessing))


def matches_timm(preprocessing: dict[str, Any]) -> bool:
    """Whether `Pixels` knows how these images are resized and cropped."""
    _, height, width = preprocessing["input_size"]
    return (
        preprocessing["interpolation"] in ("bilinear", "bicubic") and preprocessing["crop_mode"] == "center" and height == width
    )


def make_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's Mixup with one draw for a whole step, or None; labels are smoothed later, by the loss."""
    augment = recipe.augment
    if not augment.mixes:
        return None
    return Mixup(
        augment.mixup,
        augment.cutmix,
        mode="batch",
        label_smoothing=0.0,
        num_classes=num_classes,
        multi_label=recipe.loss == "multi_label",
    )


def mix_neighbours(
    mixup: Mixup, images: torch.Tensor, labels: torch.Tensor, key: tuple[int | str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 3, H, W], each mixed with its neighbour (0 with 1, 2 with 3, ...), and their mixed targets [n, classes].

    timm mixes the first image of a batch with the last. Laid out so that these are neighbours, and drawn by `key` alone, the
    mix is the same however a batch is cut into micro-batches. A last image without a neighbour is mixed with itself.
    """
    n = len(images)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2)) + [n - 1] * (n % 2)
    seed_all("mix", *key)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    images, targets = mixup(images[even + odd[::-1]], labels[even + odd[::-1]])
    kept = [i for i in range(len(images)) if i != len(even)] if n % 2 else slice(None)
    return images[kept].contiguous(memory_format=layout), targets[kept]
