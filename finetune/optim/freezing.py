"""Which parameter groups train in an epoch, and which stay frozen."""

from collections.abc import Sequence

import torch

from finetune.optim.optimizers import start_epoch
from finetune.optim.param_groups import ParamGroup


def describe_stage(groups: Sequence[ParamGroup], epoch: int) -> str:
    """What trains in an epoch and what does not, with the numbers of parameters."""
    texts = []
    for word, trains in (("trains", True), ("frozen", False)):
        if part := [group for group in groups if group.trains(epoch) == trains]:
            num_values = sum(group.num_values for group in part)
            texts.append(f"{word}: {', '.join(group.name for group in part)} ({num_values:,} parameters)")
    return f"from epoch {epoch + 1}: {'; '.join(texts)}"


def starts_stage(groups: Sequence[ParamGroup], epoch: int) -> bool:
    """Whether other groups train in this epoch than in the one before."""
    return any(group.unfreeze_at == epoch for group in groups)


def stage_epochs(groups: Sequence[ParamGroup], epoch: int, epochs: int) -> int:
    """How many epochs the stage of an epoch has, of a run of `epochs`."""
    starts = [0, *(group.unfreeze_at for group in groups), epochs]
    return int(min(start for start in starts if start > epoch) - max(start for start in starts if start <= epoch))


def start_stage(groups: Sequence[ParamGroup], optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Let the epoch's groups train, and no others, by the epoch's optimizer."""
    unfreeze(groups, epoch)
    start_epoch(optimizer, epoch)


def unfreeze(groups: Sequence[ParamGroup], epoch: int) -> None:
    """Let the epoch's groups, and no others, have gradients.

    A gradient left from earlier is dropped: an optimizer would go on applying it, its momentum and its weight decay.
    """
    for group in groups:
        for parameter in group.params.values():
            parameter.requires_grad_(group.trains(epoch))
            parameter.grad = None
