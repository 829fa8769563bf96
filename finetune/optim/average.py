"""Averages of networks: the moving one of a run, and the weighted mean of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from finetune.models.batch_norm import has_statistics


class MovingAverage(ModelEmaV3):
    """timm's exponential moving average, of each tensor once, and of no buffers but the running statistics of norms.

    timm's own goes by the names in the state dict: a tied weight moves once for each of its names, and the mean of spectral
    norm's unit vectors is no unit vector. Buffers that are no averages are copied.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average, `self.module`, by 1 - `decay` of the way to `model`."""
        averaged, current = (averaged_tensors(net) for net in (self.module, model))
        lerp = getattr(self, "_foreach_lerp_", torch._foreach_lerp_)  # newer timm's own rounds bfloat16 at random
        lerp(averaged, current, weight=1.0 - decay)
        done = set(averaged)
        for own, other in zip(all_tensors(self.module), all_tensors(model), strict=True):
            if own not in done:
                own.copy_(other)


def averaged_tensors(net: nn.Module) -> list[torch.Tensor]:
    """Parameters, and the running statistics of norms, whose mean is of the same kind."""
    tensors: list[torch.Tensor] = list(net.parameters())
    for module in net.modules():
        if has_statistics(module):
            tensors += module.buffers(recurse=False)
    return [tensor for tensor in dict.fromkeys(tensors) if tensor.is_floating_point() or tensor.is_complex()]


def all_tensors(net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers()]


def mean_state(states: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """The mean of the state dicts of one network, weighed by shares that add up to 1, computed in float64 and cast back.

    One with a share of 0 has no part in it, and one with a share of 1 is the mean, bit for bit. Integers, such as the number of
    batches that a norm has seen, and what is no tensor, are those of the first with a share.
    """
    parts = [(state, share) for state, share in zip(states, shares, strict=True) if share]
    mean = dict(parts[0][0])
    for name, value in mean.items() if len(parts) > 1 else ():
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            wide = torch.complex128 if value.is_complex() else torch.float64
            mean[name] = torch.stack([share * state[name].to(wide) for state, share in parts]).sum(0).to(value.dtype)
    return mean
