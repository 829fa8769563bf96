"""What a run will do, in text, before it does it."""

from collections.abc import Sequence

from torch import nn

from finetune.optim.param_groups import ParamGroup, describe_param_groups, planned_lrs
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.tools.memory_estimate import layer_table, memory_table
from finetune.utils.text import align_columns


def describe_run(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """Network, data and length of a run, in one line."""
    steps, probe = recipe.data.steps_per_epoch(num_images), recipe.linear_probe
    first = f"linear probe on features of {probe.views * num_images} images, then " if probe else ""
    return (
        f"{to_dict(recipe.backbone)} on {to_dict(recipe.data.source)}, {num_images} images of {num_classes} classes at "
        f"{recipe.data.image_size} px; {first}{recipe.epochs} epochs of {steps} steps of {recipe.data.batch_size} images"
    )


def describe_plan(recipe: Recipe, net: nn.Module, groups: Sequence[ParamGroup], num_images: int, num_classes: int) -> str:
    """The whole plan: groups, learning rates, stages with their memory, layers. `net` lies on the meta device."""
    steps = recipe.data.steps_per_epoch(num_images)
    planned = planned_lrs(groups, [epoch * steps for epoch in range(recipe.epochs)], steps, recipe.epochs)
    by_epoch = [("group", *map(str, range(recipe.epochs)))]
    by_epoch += [(name, *(f"{lr:.1e}" if lr else "-" for lr in lrs)) for name, lrs in planned.items()]
    return "\n\n".join(
        [
            describe_run(recipe, num_images, num_classes),
            describe_param_groups(groups, steps, recipe.epochs),
            f"learning rate at the start of each epoch\n{align_columns(by_epoch, numbers=True)}",
            f"stages\n{memory_table(recipe, net, groups)}",
            f"layers, for one image\n{layer_table(recipe, net, groups)}",
        ]
    )
