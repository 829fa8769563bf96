"""Transforms of training and evaluation images, made by timm."""

from collections.abc import Callable

import timm.data
import torch

from finetune.batches import SeededImages, seed_all
from finetune.image_lists import ImageData
from finetune.recipe import Recipe, RecipeError


def transforms(recipe: Recipe, preprocessing: dict) -> tuple[Callable, Callable]:
    """(training, evaluation): functions from a PIL image to a normalised float tensor [3, H, W].

    Raises:
        RecipeError: if timm can't read the `randaugment` text.
    """
    augment = recipe.augment
    try:
        train = timm.data.create_transform(
            **preprocessing, is_training=True, scale=augment.crop_scale, ratio=augment.crop_ratio, hflip=augment.hflip,
            color_jitter=augment.color_jitter or None, auto_augment=augment.randaugment, re_prob=augment.erasing,
            re_mode="pixel")
    except (AssertionError, ValueError) as error:
        raise RecipeError(f"augment: timm can't read randaugment={augment.randaugment!r}, written like "
                          f"'rand-m9-mstd0.5-inc1' {error}") from error
    return train, timm.data.create_transform(**preprocessing)


def image_sets(recipe: Recipe, data: ImageData, preprocessing: dict) -> tuple[SeededImages, SeededImages]:
    """The training images as they are varied, and the validation images as they are scored."""
    return tuple(SeededImages(part, transform, recipe.seed, data.classes, recipe.data.on_bad_image,
                              multi_label=recipe.loss == "multi_label")
                 for part, transform in zip((data.train, data.val), transforms(recipe, preprocessing), strict=True))


def make_mixup(recipe: Recipe, num_classes: int) -> timm.data.Mixup | None:
    """timm's Mixup with one draw for a whole update, or None; labels are smoothed later, by the loss."""
    augment = recipe.augment
    if not augment.mixes:
        return None
    return timm.data.Mixup(augment.mixup, augment.cutmix, mode="batch", label_smoothing=0.0, num_classes=num_classes,
                           multi_label=recipe.loss == "multi_label")


def mix_neighbours(mixup: timm.data.Mixup, images: torch.Tensor, labels: torch.Tensor,
                   key: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 3, H, W], each mixed with its neighbour (0 with 1, 2 with 3, ...), and their mixed targets [n, classes].

    timm mixes the first image of a batch with the last. Laid out so that these are neighbours, and drawn by `key` alone, the
    mix is the same however an update is cut into micro-batches. A last image without a neighbour is mixed with itself.
    """
    n = len(images)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2)) + [n - 1] * (n % 2)
    seed_all("mix", *key)
    images, targets = mixup(images[even + odd[::-1]], labels[even + odd[::-1]])
    kept = [i for i in range(len(images)) if i != len(even)] if n % 2 else slice(None)
    return images[kept], targets[kept]
