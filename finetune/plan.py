"""What a run will do, before it does it: the plan in text, and any recipe cut down to a smoke run."""

import dataclasses

from finetune.backbone import outline
from finetune.param_groups import ParamGroup
from finetune.recipe import Data, LayerDecay, Recipe, RecipeError
from finetune.recipe_file import as_dict, override
from finetune.unfreeze import trains


def in_one_line(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """Network, data and length of a run."""
    updates = -(-num_images // recipe.data.batch_size)
    return (f"{as_dict(recipe.backbone)} on {as_dict(recipe.data.source)}, {num_images} images of {num_classes} classes at "
            f"{recipe.data.image_size} px; {recipe.epochs} epochs of {updates} updates of {recipe.data.batch_size} images")


def rates(recipe: Recipe, groups: list[ParamGroup], num_images: int) -> str:
    """Every group's rate at the start of each epoch, '-' while it is frozen. Scores, not known yet, never stall."""
    updates = -(-num_images // recipe.data.batch_size)
    epochs, width = range(recipe.epochs), max(5, *(len(group.name) for group in groups))
    scales = [recipe.schedule.scale(epoch * updates, updates, recipe.epochs) for epoch in epochs]
    lines = ["rate at the start of each epoch", "epoch".ljust(width) + "".join(f"{epoch:>9}" for epoch in epochs)]
    for group in groups:
        cells = [f"{group.lr * scales[epoch]:9.1e}" if trains(group, epoch) else f"{'-':>9}" for epoch in epochs]
        lines.append(group.name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def smoke(recipe: Recipe, parts: int) -> Recipe:
    """The recipe cut down to seconds: a stage an epoch, a batch that divides by `parts`, small generated images."""
    if isinstance(recipe.groups, LayerDecay):
        stages = sorted({0, recipe.groups.unfreeze_at})
        groups = dataclasses.replace(recipe.groups, unfreeze_at=stages.index(recipe.groups.unfreeze_at))
    else:
        stages = sorted({group.unfreeze_at for group in recipe.groups})
        groups = tuple(dataclasses.replace(group, unfreeze_at=stages.index(group.unfreeze_at)) for group in recipe.groups)
    schedule = dataclasses.replace(recipe.schedule, warmup_epochs=min(0.5, recipe.schedule.warmup_epochs))
    small = dataclasses.replace(recipe, weights="none", groups=groups, schedule=schedule, epochs=len(stages) + 1,
                                data=Data("generated", 32, parts * -(-8 // parts), recipe.data.crop_pct))
    try:
        outline(small)
    except RecipeError:  # a network for one size only
        small = override(small, [f"data.image_size={recipe.data.image_size}"])
    return small
