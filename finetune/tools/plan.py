"""What a run will do, before it does it: the plan in text, and any recipe cut down to a smoke run."""

import dataclasses
import math
from collections.abc import Sequence

from torch import nn

from finetune.augment import training_transform
from finetune.backbone import outline, preprocessing
from finetune.linear_probe import head_layer
from finetune.lr_schedule import Schedule
from finetune.memory_plan import layers, memory_table
from finetune.optimizers import build_optimizer
from finetune.param_groups import split_parameters, table
from finetune.recipe import Data, Frozen, Group, LayerDecay, Recipe, RecipeError
from finetune.recipe_file import as_dict, in_columns, override


def check(recipe: Recipe, net: nn.Module) -> None:
    """Raise RecipeError for whatever is wrong with the recipe's groups, optimizers or transforms on this network."""
    for epoch in {0, recipe.optimizer_begins(recipe.epochs)}:
        build_optimizer(split_parameters(recipe, net, epoch))
    training_transform(recipe, preprocessing(recipe, net))
    if recipe.linear_probe:
        head_layer(recipe, net)


def in_one_line(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """Network, data and length of a run."""
    updates, probe = recipe.data.updates(num_images), recipe.linear_probe
    head = f"the head alone on features of {probe.views * num_images} images, then " if probe else ""
    return (
        f"{as_dict(recipe.backbone)} on {as_dict(recipe.data.source)}, {num_images} images of {num_classes} classes at "
        f"{recipe.data.image_size} px; {head}{recipe.epochs} epochs of {updates} updates of {recipe.data.batch_size} "
        "images"
    )


def text(recipe: Recipe, net: nn.Module, num_images: int, num_classes: int) -> str:
    """The whole plan: groups, rates, stages with their memory, layers. `net` may lie on the meta device."""
    epochs, updates = range(recipe.epochs), recipe.data.updates(num_images)
    planned = planned_rates(recipe, net, [epoch * updates for epoch in epochs], updates)
    by_epoch = [("group", *map(str, epochs))]
    by_epoch += [(name, *(f"{rate:.1e}" if rate else "-" for rate in row)) for name, row in planned.items()]
    return "\n\n".join(
        [
            in_one_line(recipe, num_images, num_classes),
            group_tables(recipe, net, num_images),
            f"rate at the start of each epoch\n{in_columns(by_epoch, numbers=True)}",
            f"stages\n{memory_table(recipe, net, recipe.data.batch_size)}",
            f"layers, for one image\n{layers(recipe, net)}",
        ]
    )


def group_tables(recipe: Recipe, net: nn.Module, num_images: int) -> str:
    """The table of groups, and the one after a switch of optimizers."""
    begun = sorted({0, recipe.optimizer_begins(recipe.epochs)})
    updates = recipe.data.updates(num_images)
    texts = []
    for start, stop in zip(begun, [*begun[1:], recipe.epochs], strict=True):
        groups = split_parameters(recipe, net, start)
        steps = sorted({*shown_steps(start * updates, stop * updates), stop * updates - 1})
        rates = {group.name: [rate for step in steps if (rate := group.rate(step, updates, recipe.epochs))] for group in groups}
        texts.append((f"from epoch {start}:\n" if start else "") + table(groups, rates))
    return "\n\n".join(texts)


def planned_rates(recipe: Recipe, net: nn.Module, steps: Sequence[int], steps_per_epoch: int) -> dict[str, list[float]]:
    """Every group's rate at the updates `steps`, 0 while it is frozen. Scores, not known yet, are taken never to stall."""
    found: dict[str, list[float]] = {}
    groups = {begun: split_parameters(recipe, net, begun) for begun in {0, recipe.optimizer_begins(recipe.epochs)}}
    for step in steps:
        for group in groups[recipe.optimizer_begins(step // steps_per_epoch)]:
            found.setdefault(group.name, []).append(group.rate(step, steps_per_epoch, recipe.epochs))
    return found


def shown_steps(start: int, stop: int, most: int = 2000) -> range:
    """The updates whose rates are looked at or drawn: all of a short run, evenly spaced ones of a long one."""
    return range(start, stop, math.ceil((stop - start) / most))


def smoke(recipe: Recipe, parts: int) -> Recipe:
    """The recipe cut down to seconds: a stage an epoch, a batch that divides by `parts`, small generated images."""
    rows = [recipe.groups] if isinstance(recipe.groups, LayerDecay) else recipe.groups
    stages = sorted({0} | {row.unfreeze_at for row in rows if not isinstance(row, Frozen)})

    def early(row: Group) -> Group:
        """The row with its stage's epoch, and no time to lose on warmup."""
        own = row.schedule and quick(row.schedule)
        return dataclasses.replace(
            row, unfreeze_at=stages.index(row.unfreeze_at), schedule=own, warmup_epochs=min(0.5, row.warmup_epochs)
        )

    def quick(schedule: Schedule) -> Schedule:
        return dataclasses.replace(schedule, warmup_epochs=min(0.5, schedule.warmup_epochs))

    groups: tuple[Group | Frozen, ...] | LayerDecay
    if isinstance(recipe.groups, LayerDecay):
        groups = dataclasses.replace(recipe.groups, unfreeze_at=stages.index(recipe.groups.unfreeze_at))
    else:
        groups = tuple(row if isinstance(row, Frozen) else early(row) for row in recipe.groups)
    switch = recipe.switch and dataclasses.replace(recipe.switch, at=stages.index(recipe.switch.at))
    weights = None if isinstance(recipe.class_weights, tuple) else recipe.class_weights  # for other classes
    small = dataclasses.replace(
        recipe,
        weights="none",
        groups=groups,
        switch=switch,
        schedule=quick(recipe.schedule),
        epochs=len(stages) + 1,
        class_weights=weights,
        early_stop=None,
        data=Data("generated", 32, parts * -(-8 // parts), recipe.data.crop_pct, recipe.data.sampling),
    )
    try:
        outline(small)
    except RecipeError:  # a network for one size only
        small = override(small, [f"data.image_size={recipe.data.image_size}"])
    return small
