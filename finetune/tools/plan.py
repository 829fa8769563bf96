"""What a run will do, before it does it: the plan in text, and any recipe cut down to a smoke run."""

from torch import nn

from finetune.optim.param_groups import param_group_tables, planned_lrs
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.tools.memory_estimate import layers, memory_table
from finetune.utils.text import align_columns


def one_line_summary(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """Network, data and length of a run."""
    updates, probe = recipe.data.updates(num_images), recipe.linear_probe
    head = f"the head alone on features of {probe.views * num_images} images, then " if probe else ""
    return (
        f"{to_dict(recipe.backbone)} on {to_dict(recipe.data.source)}, {num_images} images of {num_classes} classes at "
        f"{recipe.data.image_size} px; {head}{recipe.epochs} epochs of {updates} updates of {recipe.data.batch_size} "
        "images"
    )


def text(recipe: Recipe, net: nn.Module, num_images: int, num_classes: int) -> str:
    """The whole plan: groups, rates, stages with their memory, layers. `net` may lie on the meta device."""
    epochs, updates = range(recipe.epochs), recipe.data.updates(num_images)
    planned = planned_lrs(recipe, net, [epoch * updates for epoch in epochs], updates)
    by_epoch = [("group", *map(str, epochs))]
    by_epoch += [(name, *(f"{rate:.1e}" if rate else "-" for rate in row)) for name, row in planned.items()]
    return "\n\n".join(
        [
            one_line_summary(recipe, num_images, num_classes),
            param_group_tables(recipe, net, num_images),
            f"rate at the start of each epoch\n{align_columns(by_epoch, numbers=True)}",
            f"stages\n{memory_table(recipe, net, recipe.data.batch_size)}",
            f"layers, for one image\n{layers(recipe, net)}",
        ]
    )
