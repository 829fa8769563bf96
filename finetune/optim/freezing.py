"""The stages of a run; what frozen means for gradients, for batch norm and for the DDP wrapper."""

from torch import nn

from finetune.optim.param_groups import ParamGroup


def describe_stage(groups: list[ParamGroup], epoch: int) -> str:
    """What trains in an epoch and what does not, with the numbers of parameters."""
    parts = {
        "trains": [group for group in groups if group.trains(epoch)],
        "frozen": [group for group in groups if not group.trains(epoch)],
    }
    return f"from epoch {epoch}: " + "; ".join(
        f"{word}: {', '.join(group.name for group in part)} ({sum(p.numel() for g in part for p in g.params.values()):,} "
        "parameters)"
        for word, part in parts.items()
        if part
    )


def starts_stage(groups: list[ParamGroup], epoch: int) -> bool:
    """Whether other groups train in this epoch than in the one before."""
    return any(group.unfreeze_at == epoch for group in groups)


def unfreeze(groups: list[ParamGroup], epoch: int) -> list[nn.Parameter]:
    """Let the epoch's groups, and no others, have gradients; returns their parameters.

    A gradient left from earlier is dropped: an optimizer would go on applying it, its momentum and its decay.
    """
    for group in groups:
        for parameter in group.params.values():
            parameter.requires_grad_(group.trains(epoch))
            parameter.grad = None
    return [parameter for group in groups if group.trains(epoch) for parameter in group.params.values()]
