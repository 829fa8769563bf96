"""Batch norm: which layers update their running statistics in training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from finetune.utils.errors import RecipeError


def convert_sync_batch_norm(net: nn.Module, batch_norm: str, accelerator: Accelerator) -> nn.Module:
    """With batch_norm="sync" on several processes, replace each batch norm by torch's SyncBatchNorm.

    To be called before anything refers to a module; parameters stay the same objects under the same names.

    Raises:
        RecipeError: for a norm that can't be synchronised, also for one of the network's own that must be.
    """
    if accelerator.num_processes == 1:
        return net
    on_cpu = accelerator.device.type == "cpu"
    if batch_norm == "sync" and on_cpu:
        raise RecipeError("batch_norm='sync' on several processes needs GPUs; here: --set batch_norm=frozen or train")
    if on_cpu and (own := [name for name, module in net.named_modules() if isinstance(module, nn.SyncBatchNorm)]):
        raise RecipeError(
            f"backbone: {own[0]} is a SyncBatchNorm, which on several processes needs GPUs; here: --processes 1, or a network "
            "with BatchNorm2d in its place"
        )
    if batch_norm != "sync":
        return net
    net = convert_sync_batchnorm(net)
    for name, module in net.named_modules():
        if has_statistics(module) and not isinstance(module, nn.SyncBatchNorm | _InstanceNorm):
            raise RecipeError(
                f"batch_norm='sync': {name}, a {type(module).__name__}, can't be synchronised; frozen and train can"
            )
    return net


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm with running statistics: torch's, or any other that calls its buffers so."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return isinstance(module, _NormBase) or any(name.startswith(("running_", "moving_")) for name in names)


def needs_batch(module: nn.Module) -> bool:
    """Whether a module is a batch norm that takes the statistics of its batch in evaluation, too."""
    return isinstance(module, _BatchNorm) and module.running_mean is None


def set_train_mode(net: nn.Module, batch_norm: str) -> None:
    """net.train(), but with all in eval mode whose buffers must stay: norms with "frozen", and whatever is in a frozen layer.

    A module without parameters is frozen if the nearest module around it that has parameters is. What is below a module with
    buffers keeps its own mode: dropout goes on.
    """
    net.train()
    for name, module in with_buffers(net):
        hold_if_frozen(net, name, batch_norm, module)


def with_buffers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that may change a buffer in training."""
    for name, module in net.named_modules():
        if has_statistics(module) or any(True for _ in module.buffers(recurse=False)):
            yield name, module


def hold_if_frozen(net: nn.Module, name: str, batch_norm: str, module: nn.Module, inputs: tuple[Any, ...] = ()) -> None:
    """Put a module that has buffers into eval mode if they must stay."""
    if batch_norm == "frozen" and has_statistics(module) or is_frozen(net, name):
        module.training = False


def hold_batch_norm(net: nn.Module, batch_norm: str) -> None:
    """Apply `set_train_mode`'s rule before each forward pass, for training loops that call net.train() themselves."""
    for name, module in with_buffers(net):
        hooks = module._forward_pre_hooks.values()
        if not any(getattr(hook, "func", None) is hold_if_frozen for hook in hooks):
            # Before other hooks: that of spectral_norm updates buffers.
            module.register_forward_pre_hook(partial(hold_if_frozen, net, name, batch_norm), prepend=True)


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Within, the whole network is in eval mode; in the end each module is in the mode that it was in."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def keep_buffers(net: nn.Module) -> Iterator[None]:
    """Give the buffers in the end the values they have now: a second forward pass must not move statistics a second time."""
    before = [buffer.clone() for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(net.buffers(), before, strict=True):
                buffer.copy_(value)


def is_frozen(net: nn.Module, name: str) -> bool:
    """Whether no parameter is trained in the module `name`, or in the nearest one around it that has parameters."""
    while not (params := list(net.get_submodule(name).parameters())) and name:
        name = name.rpartition(".")[0]
    return not any(parameter.requires_grad for parameter in params)


@torch.no_grad()
def recompute_statistics(net: nn.Module, names: Iterable[str], batches: Iterable[torch.Tensor]) -> None:
    """Give the batch norms of these names the mean statistics of the batches; everything else is in eval mode.

    Each batch counts as much, as in torch.optim.swa_utils.update_bn, which does so to all norms and with dropout.
    """
    norms = [module for name, module in net.named_modules() if name in set(names) and isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    for images in batches:
        net(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
