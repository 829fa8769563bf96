"""What a run will do, in text, before it does it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from finetune.data.dataset import ImageData, Images
from finetune.data.sources import data_and_size, is_downloaded, load_data
from finetune.models.backbone import meta_backbone
from finetune.optim.param_groups import ParamGroup, describe_param_groups, planned_lrs
from finetune.recipe import Recipe
from finetune.recipe.data import in_pixels
from finetune.recipe.serialize import to_dict
from finetune.report.class_sizes import plot_class_sizes
from finetune.report.drawing import shorten
from finetune.report.sheets import draw_augmented
from finetune.tools.memory_estimate import layer_table, memory_table
from finetune.training.setup import build_datasets, check_recipe
from finetune.utils.errors import RecipeError
from finetune.utils.text import WIDTH, align_columns, fill_lines, note


class Plan(NamedTuple):
    """A run that is still to come: its network on the meta device, its groups, its data's images and classes.

    `data` are the images, if they had to be looked at for their number.
    """

    net: nn.Module
    groups: Sequence[ParamGroup]
    size: tuple[int, int]
    data: ImageData | None


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a recipe, which is checked; no weights are read, and of image files no more than their headers.

    Raises:
        RecipeError: for a recipe that does not fit its network, and for data that is not there.
    """
    data, size = data_and_size(recipe)
    net = meta_backbone(recipe, size[1])
    return Plan(net, check_recipe(recipe, net), size, data)


def plot_images(folder: Path, name: str, recipe: Recipe, plan: Plan) -> list[Path]:
    """NAME-augmented.png and NAME-classes.png: training images as the network gets them, and the number of each class.

    Nothing is downloaded for them: of a set that may have to be there is none. Why there is none is said on stderr.
    """
    drawn = list[Path]()
    try:
        if plan.data is None and is_downloaded(recipe.data.source):
            raise RecipeError(f"{recipe.data.source} may have to be downloaded; a run draws augmented.png")
        data, title = plan.data or load_data(recipe), shorten(name, 60)
        images, _ = build_datasets(recipe, plan.net, data)
        images.on_bad_image = "skip"  # a run says which can't be read
        if sheet := draw_augmented(folder / f"{name}-augmented.png", title, images, recipe.epochs):
            drawn.append(sheet)
        drawn.append(plot_class_sizes(folder / f"{name}-classes.png", title, data))
    except RecipeError as error:
        note(f"no {'more pictures' if drawn else 'picture'} of the images: {error}")
    return drawn


def describe_run(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """Network, data and length of a run, in one line."""
    steps, probe = recipe.data.steps_per_epoch(num_images), recipe.linear_probe
    first = f"linear probe on features of {probe.views * num_images} images, then " if probe else ""
    kind = f"number{'s' * (num_classes > 1)}" if recipe.of_numbers else "classes"
    return (
        f"{to_dict(recipe.backbone)} on {to_dict(recipe.data.source)}, {num_images} images of {num_classes} {kind} at "
        f"{recipe.data.sizes}; {first}{recipe.epochs} epochs of {steps} steps of {recipe.data.batch_size} images"
    )


def describe_validation(recipe: Recipe, images: Images) -> str:
    """How many images validate, of which groups, and in which fold."""
    groups, folds = getattr(images, "groups", None), recipe.data.folds
    of_groups = f" of {len(set(groups))} groups" if groups else ""
    fold = f" (fold {recipe.data.fold} of 0 to {folds - 1})" if folds else ""
    return f"{len(images)} validation images{of_groups}{fold}"


def describe_classes(classes: Sequence[str], of_numbers: bool = False) -> str:
    """The names of the classes, or numbers, the first ten of many."""
    more = f", ... ({len(classes)} in all)" if len(classes) > 10 else ""
    return f"{'numbers' if of_numbers else 'classes'}: {', '.join(classes[:10])}{more}"


def describe_plan(name: str, recipe: Recipe, plan: Plan, wide: bool = False) -> str:
    """The plan: groups, learning rates, stages with their memory, layers; all of it if `wide`, else what 80 columns hold."""
    net, groups, size, _ = plan
    steps, width = recipe.data.steps_per_epoch(size[0]), math.inf if wide else WIDTH
    return "\n\n".join(
        [
            fill_lines(f"{name}: {describe_run(recipe, *size)}", width),
            describe_param_groups(groups, steps, recipe.epochs, wide),
            f"learning rate at the start of each epoch\n{lr_table(epoch_lrs(groups, steps, recipe.epochs), wide)}",
            *([fill_lines(f"image size\n{describe_sizes(recipe)}", width)] if recipe.data.start_size else []),
            f"stages\n{memory_table(recipe, net, groups, wide)}",
            f"layers, for one image\n{layer_table(recipe, net, groups, width)}",
        ]
    )


def describe_sizes(recipe: Recipe) -> str:
    """Which epochs train on images of which size, counted from 1."""
    sizes, texts = [in_pixels(recipe.sides_in(epoch)) for epoch in range(recipe.epochs)], list[str]()
    for size in dict.fromkeys(sizes):
        first, last = sizes.index(size) + 1, recipe.epochs - sizes[::-1].index(size)
        texts.append(f"{size} px in epoch{'s' * (first < last)} {first}{f' to {last}' * (first < last)}")
    test = f"; {in_pixels(recipe.data.test_sides)} px in evaluation"
    return f"{', '.join(texts)}{test}; a step has {recipe.data.batch_size} images at each size"


def epoch_lrs(groups: Sequence[ParamGroup], steps_per_epoch: int, epochs: int) -> dict[str, list[float]]:
    """Each group's learning rate at the start of each epoch, 0 while it is frozen."""
    return planned_lrs(groups, [epoch * steps_per_epoch for epoch in range(epochs)], steps_per_epoch, epochs)


def lr_table(lrs: dict[str, list[float]], wide: bool) -> str:
    """The learning rates as lines of text, epochs counted from 1; unless `wide`, the first that fit and the last."""
    epochs = range(len(next(iter(lrs.values()))))
    rows = [["group", *(str(epoch + 1) for epoch in epochs)]]
    rows += [[name, *(f"{lr:.1e}" if lr else "-" for lr in values)] for name, values in lrs.items()]
    fit = (WIDTH - max(len(row[0]) for row in rows)) // len("  1.0e-03")
    if not wide and len(epochs) > fit:
        rows = [[*row[: fit - 1], "...", row[-1]] for row in rows]
    return align_columns(rows, numbers=True, width=math.inf if wide else WIDTH)
