"""Batch norm: which layers update their running statistics in training."""

from functools import partial
from typing import Any

from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from finetune.utils.errors import RecipeError


def convert_sync_batch_norm(net: nn.Module, batch_norm: str, accelerator: Accelerator) -> nn.Module:
    """With batch_norm="sync" on several processes, replace each batch norm by torch's SyncBatchNorm.

    To be called before anything refers to a module; parameters stay the same objects under the same names.
    """
    if batch_norm != "sync" or accelerator.num_processes == 1:
        return net
    if accelerator.device.type == "cpu":
        raise RecipeError("batch_norm='sync' on several processes needs GPUs; here: --set batch_norm=frozen or train")
    return convert_sync_batchnorm(net)


def set_train_mode(net: nn.Module, batch_norm: str) -> None:
    """net.train(), but with the batch norms whose statistics are frozen in eval mode: all with "frozen", else in frozen layers.

    A batch norm without parameters is frozen if the nearest module around it that has parameters is.
    """
    net.train()
    for name, module in net.named_modules():
        if isinstance(module, _NormBase):
            hold_if_frozen(net, name, batch_norm, module)


def hold_if_frozen(net: nn.Module, name: str, batch_norm: str, module: nn.Module, inputs: tuple[Any, ...] = ()) -> None:
    """Put a batch norm into eval mode if its statistics must stay."""
    if batch_norm == "frozen" or is_frozen(net, name):
        module.eval()


def hold_batch_norm(net: nn.Module, batch_norm: str) -> None:
    """Apply `set_train_mode`'s rule before each forward pass, for training loops that call net.train() themselves."""
    for name, module in net.named_modules():
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, _NormBase) and not any(getattr(hook, "func", None) is hold_if_frozen for hook in hooks):
            module.register_forward_pre_hook(partial(hold_if_frozen, net, name, batch_norm))


def is_frozen(net: nn.Module, name: str) -> bool:
    """Whether no parameter is trained in the module `name`, or in the nearest one around it that has parameters."""
    while not (params := list(net.get_submodule(name).parameters())) and name:
        name = name.rpartition(".")[0]
    return not any(parameter.requires_grad for parameter in params)
