"""A network in shards: each process keeps its part of every parameter, and blocks are gathered while they compute (FSDP2)."""

import copy
import itertools
from typing import Any

import torch
from torch import nn


def shard(net: nn.Module, device: torch.device, reshard: bool = True) -> None:
    """Leave this process its part of every parameter, on `device`; to be called before anything refers to one.

    Gradients and optimizer state come in the same parts, under the same names. `reshard`: each block gives back what it
    gathered after its forward pass, and gathers it again for the backward pass.

    By torch's fully_shard, not Accelerate's prepare(): that wants the optimizer with the network, and gives it other parameters
    than those of the groups; as DistributedDataParallel is made here, see `wrap`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    meta = {id(tensor): nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad) for tensor in net.parameters()}
    plain = copy.deepcopy(net, meta | {id(buffer): buffer for buffer in net.buffers()})
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # it refuses channels last
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    units = [*reversed(blocks(net)), net]  # what lies within first
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)

    def reshard_all(*_: Any) -> None:
        """Without a backward pass to come, the outermost part, too, gives back what it gathered: its parameters are shards."""
        if not torch.is_grad_enabled():
            for unit in units:
                unit.reshard()  # type: ignore[operator]

    net.register_forward_hook(reshard_all)
    vars(net)["plain"] = plain


def blocks(net: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: elements of lists of modules that consist of modules themselves, such as residual blocks."""
    lists = nn.Sequential | nn.ModuleList
    elements = itertools.chain(*(module.children() for module in net.modules() if isinstance(module, lists)))
    return [part for part in dict.fromkeys(elements) if [*part.children()] and not isinstance(part, lists | nn.ModuleDict)]


def is_sharded(net: nn.Module) -> bool:
    return "plain" in vars(net)


def is_shard(tensor: object) -> bool:
    """Whether a tensor is a DTensor, asked without the import, which takes a second."""
    return hasattr(tensor, "full_tensor")


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that lies in shards, for which all processes must call; any other as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state with what lies in shards whole, on the CPU: for which all processes must call, and which the first one gets.

    One tensor at a time is whole on each device.
    """
    if not any(map(is_shard, state.values())):
        return state
    found = {}
    for name, value in state.items():
        tensor = gather(value)
        if torch.distributed.get_rank() == 0:
            found[name] = tensor.cpu() if is_shard(value) else value
    return found


def whole(net: nn.Module) -> nn.Module:
    """`net`; of one in shards a plain copy on the CPU, for which all processes must call, with values on the first alone."""
    if not is_sharded(net):
        return net
    plain: nn.Module = vars(net)["plain"]
    if state := gather_state(net.state_dict()):
        plain.load_state_dict(state, assign=True)
    return plain


def laid_out_like(own: Any, value: Any) -> Any:
    """The tensor `value` as `own` lies in memory, in shards of the first process's values or whole; of another shape, as it is.

    Its strides are those of `own`, too: torch's fused optimizers rely on it that a parameter's moments have the parameter's.
    """
    if not isinstance(own, torch.Tensor) or getattr(value, "shape", None) != own.shape:
        return value
    if not is_shard(own):
        return torch.empty_like(own, dtype=value.dtype, device=value.device).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)  # type: ignore[attr-defined]
