"""Batch norm: which statistics move while the network trains."""

from functools import partial
from typing import Any

from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from finetune.utils.errors import RecipeError


def convert_sync_batch_norm(net: nn.Module, batch_norm: str, accelerator: Accelerator) -> nn.Module:
    """With batch_norm="sync" on several processes, the network with torch's SyncBatchNorm in place of each batch norm.

    Done once, before anything refers to a module; parameters stay the same objects under the same names.

    Raises:
        RecipeError: on CPUs, for which torch has no such layer.
    """
    if batch_norm != "sync" or accelerator.num_processes == 1:
        return net
    if accelerator.device.type == "cpu":
        raise RecipeError("batch_norm='sync' on several processes needs GPUs; here: --set batch_norm=frozen or train")
    return convert_sync_batchnorm(net)


def set_train_mode(net: nn.Module, batch_norm: str) -> None:
    """net.train(), except that norms whose statistics must not move stay in eval mode.

    These are all of them with batch_norm="frozen", otherwise those of frozen layers. Where a norm has no parameters of its own,
    those of the nearest layer around it that has some decide.
    """
    net.train()
    for name, module in net.named_modules():
        if isinstance(module, _NormBase):
            hold_if_frozen(net, name, batch_norm, module)


def hold_if_frozen(net: nn.Module, name: str, batch_norm: str, module: nn.Module, inputs: tuple[Any, ...] = ()) -> None:
    """Put one norm into eval mode if its statistics must not move."""
    if batch_norm == "frozen" or is_frozen(net, name):
        module.eval()


def hold_batch_norm(net: nn.Module, batch_norm: str) -> None:
    """Make `set_train_mode`'s rule hold in loops that call net.train() themselves: each norm checks before its forward pass."""
    for name, module in net.named_modules():
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, _NormBase) and not any(getattr(hook, "func", None) is hold_if_frozen for hook in hooks):
            module.register_forward_pre_hook(partial(hold_if_frozen, net, name, batch_norm))


def is_frozen(net: nn.Module, name: str) -> bool:
    """Whether no parameter trains in the module `name`, or in the nearest around it that has parameters."""
    params = list(net.get_submodule(name).parameters())
    while not params and name:
        name = name.rpartition(".")[0]
        params = list(net.get_submodule(name).parameters())
    return not any(parameter.requires_grad for parameter in params)
