"""What a run will do, before it does it: the plan in text, and any recipe cut down to a smoke run."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from finetune.backbone import outline
from finetune.param_groups import aligned, split_parameters, table
from finetune.recipe import Data, Frozen, LayerDecay, Recipe, RecipeError
from finetune.recipe_file import as_dict, override


def in_one_line(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """Network, data and length of a run."""
    updates = updates_per_epoch(recipe, num_images)
    return (f"{as_dict(recipe.backbone)} on {as_dict(recipe.data.source)}, {num_images} images of {num_classes} classes at "
            f"{recipe.data.image_size} px; {recipe.epochs} epochs of {updates} updates of {recipe.data.batch_size} images")


def group_tables(recipe: Recipe, net: nn.Module) -> str:
    """The table of groups, and the one after a switch of optimizers."""
    texts = [table(split_parameters(recipe, net))]
    if recipe.switch:
        texts.append(f"from epoch {recipe.switch.at}:\n{table(split_parameters(recipe, net, recipe.switch.at))}")
    return "\n\n".join(texts)


def planned_rates(recipe: Recipe, net: nn.Module, steps: Sequence[int], steps_per_epoch: int) -> dict[str, list[float]]:
    """Every group's rate at the updates `steps`, 0 while it is frozen. Scores, not known yet, are taken never to stall."""
    found: dict[str, list[float]] = {}
    groups = {begun: split_parameters(recipe, net, begun) for begun in {0, recipe.optimizer_begins(recipe.epochs)}}
    for step in steps:
        for group in groups[recipe.optimizer_begins(step // steps_per_epoch)]:
            found.setdefault(group.name, []).append(group.rate(step, steps_per_epoch, recipe.epochs))
    return found


def rates(recipe: Recipe, net: nn.Module, num_images: int) -> str:
    """The table of groups, and every group's rate at the start of each epoch, '-' while it is frozen."""
    updates, epochs = updates_per_epoch(recipe, num_images), range(recipe.epochs)
    planned = planned_rates(recipe, net, [epoch * updates for epoch in epochs], updates)
    rows = [("epoch", *map(str, epochs))]
    rows += [(name, *(f"{rate:.1e}" if rate else "-" for rate in row)) for name, row in planned.items()]
    return f"{group_tables(recipe, net)}\n\nrate at the start of each epoch\n{aligned(rows)}"


def updates_per_epoch(recipe: Recipe, num_images: int) -> int:
    return -(-num_images // recipe.data.batch_size)


def smoke(recipe: Recipe, parts: int) -> Recipe:
    """The recipe cut down to seconds: a stage an epoch, a batch that divides by `parts`, small generated images."""
    rows = [recipe.groups] if isinstance(recipe.groups, LayerDecay) else recipe.groups
    stages = sorted({0} | {row.unfreeze_at for row in rows if not isinstance(row, Frozen)})

    def early(row):
        """The row with its stage's epoch, and no time to lose on warmup."""
        if isinstance(row, LayerDecay):
            return dataclasses.replace(row, unfreeze_at=stages.index(row.unfreeze_at))
        own = row.schedule and quick(row.schedule)
        return dataclasses.replace(row, unfreeze_at=stages.index(row.unfreeze_at), schedule=own,
                                   warmup_epochs=min(0.5, row.warmup_epochs))

    def quick(schedule):
        return dataclasses.replace(schedule, warmup_epochs=min(0.5, schedule.warmup_epochs))

    groups = tuple(row if isinstance(row, Frozen) else early(row) for row in rows)
    switch = recipe.switch and dataclasses.replace(recipe.switch, at=stages.index(recipe.switch.at))
    weights = None if isinstance(recipe.class_weights, tuple) else recipe.class_weights  # for other classes
    small = dataclasses.replace(
        recipe, weights="none", groups=groups[0] if isinstance(recipe.groups, LayerDecay) else groups, switch=switch,
        schedule=quick(recipe.schedule), epochs=len(stages) + 1, class_weights=weights,
        data=Data("generated", 32, parts * -(-8 // parts), recipe.data.crop_pct, recipe.data.sampling))
    try:
        outline(small)
    except RecipeError:  # a network for one size only
        small = override(small, [f"data.image_size={recipe.data.image_size}"])
    return small
