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

ImageTransform = Callable[[Image.Image], Any]


class Pixels:
    """timm's basic transforms, faster: crop, resize and flip uint8 images one by one, then normalise the batch.

    From the same seed the results are timm's but for rounding, since timm's pass through PIL. Without `augment`, images are
    preprocessed for evaluation: resized and cropped in the middle. `colours`, of timm, changes the crop as a PIL image.
    """

    def __init__(self, preprocessing: dict[str, Any], augment: Augment | None = None, colours: ImageTransform | None = None):
        self.preprocessing, self.augment, self.size = preprocessing, augment, preprocessing["input_size"][-1]
        self.colours = colours
        self.resized = math.floor(self.size / preprocessing["crop_pct"])
        self.interpolation = InterpolationMode(preprocessing["interpolation"])
        self.mean, self.std = (255 * torch.tensor(preprocessing[name]) for name in ("mean", "std"))

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 pixels [H, W, 3] -> uint8 [size, size, 3]."""
        augment, square = self.augment, [self.size, self.size]
        if augment is None:
            image = functional.resize_image(channels_first(pixels), [self.resized], self.interpolation, antialias=True)
            return functional.center_crop_image(image, square).permute(1, 2, 0)
        box = RandomResizedCropAndInterpolation.get_params(channels_first(pixels), augment.crop_scale, augment.crop_ratio)
        top, left, height, width = box
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        image = functional.resize_image(channels_first(crop), square, self.interpolation, antialias=True).permute(1, 2, 0)
        if augment.hflip and torch.rand(1) < augment.hflip:
            image = image.flip(1)
        return torch.from_numpy(np.array(self.colours(Image.fromarray(image.numpy())))) if self.colours else image

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, H, W, 3] -> normalised floats [n, 3, H, W], channels last in memory."""
        rows = images.flatten(2).float()  # [n, H, 3 W]: long rows are what makes this fast
        mean, std = (values.to(images.device).repeat(images.shape[2]) for values in (self.mean, self.std))
        return rows.sub_(mean).div_(std).view(images.shape).permute(0, 3, 1, 2)


class Timm:
    """Any of timm's transforms, which turn one PIL image into normalised floats."""

    def __init__(self, preprocessing: dict[str, Any], transform: ImageTransform):
        self.preprocessing, self.transform = preprocessing, transform

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 pixels [H, W, 3] -> floats [3, size, size]."""
        return self.transform(Image.fromarray(pixels))

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        return images


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def training_transform(recipe: Recipe, preprocessing: dict[str, Any]) -> Pixels | Timm:
    """The augmentation of the training images."""
    augment = recipe.augment
    options = preprocessing | {
        "is_training": True,
        "color_jitter": augment.color_jitter or None,
        "scale": augment.crop_scale,
        "ratio": augment.crop_ratio,
        "hflip": augment.hflip,
        "auto_augment": augment.randaugment,
        "re_prob": augment.erasing,
        "re_mode": "pixel",
    }
    try:
        if not matches_timm(preprocessing) or augment.erasing:  # which draws noise among normalised floats
            return Timm(preprocessing, create_transform(**options))
        _, colours, _ = create_transform(**options, separate=True)
        return Pixels(preprocessing, augment, colours if colours.transforms else None)
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
    centred = preprocessing["crop_mode"] == "center" and height == width
    return centred and preprocessing["interpolation"] in ("bilinear", "bicubic")


def make_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's Mixup, which draws once for a batch; None without mixup and cutmix. The loss smooths labels, not this."""
    augment = recipe.augment
    if not augment.mixes:
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=num_classes)


def mix_neighbours(
    mixup: Mixup, images: torch.Tensor, labels: torch.Tensor, key: tuple[int | str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [n, 3, H, W], targets [n, classes]), each image mixed with its neighbour: 0 with 1, 2 with 3, ...

    The draw depends on `key` alone, so the result is the same however a batch is cut into micro-batches. A last image without
    a neighbour is mixed with itself. Images come back in another order, with their targets.
    """
    n = len(images)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2)) + [n - 1] * (n % 2)
    order = even + odd[::-1]  # timm mixes the first image with the last, the second with the last but one, ...
    seed_all("mix", *key)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    if labels.ndim == 1:
        images, targets = mixup(images[order], labels[order])
    else:  # timm mixes several labels an image from 1.0.31 on only: here it mixes their places, whose shares mix the labels
        mixup.num_classes = len(order)
        images, shares = mixup(images[order], torch.arange(len(order), device=labels.device))
        targets = shares @ labels[order].float()
    if n % 2:  # the last image came twice
        images, targets = (torch.cat([part[: len(even)], part[len(even) + 1 :]]) for part in (images, targets))
    return images.contiguous(memory_format=layout), targets
