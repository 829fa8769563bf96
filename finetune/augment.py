"""Transforms of training and evaluation images, made by timm."""

from collections.abc import Callable

import timm.data

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
            color_jitter=augment.color_jitter or None, auto_augment=augment.randaugment)
    except (AssertionError, ValueError) as error:
        raise RecipeError(f"augment: timm can't read randaugment={augment.randaugment!r}, written like "
                          f"'rand-m9-mstd0.5-inc1' {error}") from error
    return train, timm.data.create_transform(**preprocessing)
