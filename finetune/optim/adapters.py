"""A recipe's optimizer, learning rates and freezing for training loops that are not this repository's.

optimizer = make_optimizer(recipe, net)
scheduler = make_lr_scheduler(recipe, net, optimizer, steps_per_epoch=len(loader))
for epoch in range(recipe.epochs):
    unfreeze(recipe, net, epoch)
    for images, labels in loader:
        ...
        optimizer.step()
        scheduler.step()
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from finetune.models.batch_norm import hold_batch_norm
from finetune.optim import freezing
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import ParamGroup, build_param_groups
from finetune.recipe import Recipe
from finetune.utils.errors import RecipeError


def make_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over `net`, with a param_group for each parameter group, frozen ones included.

    Raises:
        RecipeError: if the groups do not fit the network, or the optimizer its options.
    """
    if recipe.switch:
        raise RecipeError("switch: in another loop make a second optimizer yourself, from dataclasses.replace(recipe, ...)")
    return build_optimizer(build_param_groups(recipe, net))


def make_lr_scheduler(
    recipe: Recipe,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    history: Sequence[dict[str, Any]] = (),
) -> torch.optim.lr_scheduler.LambdaLR:
    """The recipe's learning rates as torch's LambdaLR, to be stepped once after every step; 0 while a group is frozen.

    A `Plateau` looks at `history`, a list to which the loop appends {"top1": ..., "loss": ...} after each epoch.
    """
    groups = {group.name: group for group in build_param_groups(recipe, net)}
    last = recipe.epochs * steps_per_epoch - 1  # a scheduler steps once more after it: that learning rate is never used

    def factor(group: ParamGroup) -> Callable[[int], float]:
        return lambda step: group.lr_factor(min(step, last), steps_per_epoch, recipe.epochs, history)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(groups[row["name"]]) for row in optimizer.param_groups])


def unfreeze(recipe: Recipe, net: nn.Module, epoch: int) -> None:
    """Let the epoch's groups train and no others, and hold still the batch-norm statistics that must not move.

    Call it before each epoch. Under DistributedDataParallel, which fixes at wrapping what it averages, wrap anew after it or
    ask for find_unused_parameters.
    """
    hold_batch_norm(net, recipe.batch_norm)
    freezing.unfreeze(build_param_groups(recipe, net), epoch)
