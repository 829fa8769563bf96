"""A network's layers, and the memory that each stage of a run takes, found without weights or data."""

import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook

from finetune.models.backbone import memory_format
from finetune.models.batch_norm import set_train_mode
from finetune.optim.freezing import start_stage
from finetune.optim.optimizers import build_optimizer, needs_closure
from finetune.optim.param_groups import ParamGroup
from finetune.recipe import Recipe
from finetune.utils.text import WIDTH, align_columns


def layer_table(recipe: Recipe, net: nn.Module, groups: Sequence[ParamGroup], width: float = WIDTH) -> str:
    """The layers of `net`, on the meta device, in the order of the forward pass: each one's output for one image, its group.

    Parameters of none of these layers, such as position embeddings, have rows of their own: the sum is the network's.
    """
    shapes, parameters = output_shapes(recipe, net), dict(net.named_parameters())
    names = sorted(listed_layers(net, shapes), key=list(shapes).index)
    names += [path for path in parameters if not any(path.startswith(f"{name}.") for name in names)]
    rows = [("layer", "kind", "output", "parameters", "group", "from epoch")]
    for name in names:
        kind = type(net.get_submodule(name)).__name__ if name in shapes else "Parameter"
        own = {path for path in parameters if f"{path}.".startswith(f"{name}.")}
        owners = [group for group in groups if own & group.params.keys()]
        epochs = ["never" if epoch == math.inf else f"{epoch + 1}" for epoch in sorted({group.unfreeze_at for group in owners})]
        num_values, owned_by = sum(parameters[path].numel() for path in own), first_and_last(group.name for group in owners)
        rows.append((name, kind, shapes.get(name, ""), f"{num_values:,}", owned_by, first_and_last(epochs)))
    rows.append(("all", "", "", f"{sum(p.numel() for p in parameters.values()):,}", "", ""))
    return align_columns(rows, numbers=True, width=width)


def output_shapes(recipe: Recipe, net: nn.Module) -> dict[str, str]:
    """The shape that each module returns for one image, by name in the order of the forward pass; idle modules are left out."""
    shapes: dict[str, str] = {}
    names = {module: name for name, module in net.named_modules()}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        idle = isinstance(module, nn.Identity) or isinstance(module, nn.Dropout) and module.p == 0
        outputs = output if isinstance(output, tuple | list) else (output,)
        shape = next((tensor.shape[1:] for tensor in outputs if isinstance(tensor, torch.Tensor)), ())
        if module in names and not idle:
            shapes.setdefault(names[module], " x ".join(map(str, shape)))

    with keep_state(net), torch.no_grad(), register_module_forward_hook(note):
        net.eval()(torch.zeros(1, *recipe.data.shape, device=next(net.parameters()).device))
    return shapes


def listed_layers(module: nn.Module, called: Collection[str], path: str = "") -> Iterator[str]:
    """The names of the network's parts that are called: of a Sequential, or a part that is not called itself, its own parts."""
    for name, child in module.named_children():
        if path + name in called and (path or not isinstance(child, nn.Sequential)):
            yield path + name
        else:
            yield from listed_layers(child, called, f"{path}{name}.")


def first_and_last(names: Iterable[str]) -> str:
    """Names in a row, of more than two the first and the last."""
    names = list(names)
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} .. {names[-1]}"


def memory_table(recipe: Recipe, net: nn.Module, groups: Sequence[ParamGroup], wide: bool = True) -> str:
    """What each stage trains, and the memory that it takes with a whole batch at once on one process; `wide`: by its parts."""
    images, largest = recipe.data.batch_size, f" of {recipe.data.pixels} px" if recipe.data.start_size else ""
    columns = ["parameters", "gradients", "optimizer", *(["average"] if recipe.ema_decay else []), "activations"] * wide
    rows = [("from epoch", "trains", "trained parameters", *columns, "sum" if wide else "MiB")]
    epochs = {int(group.unfreeze_at) for group in groups if group.ever_trains}  # a switch of optimizers is at one of these
    for epoch in sorted(epochs):
        trained = [group for group in groups if group.trains(epoch)]
        names, num_values = first_and_last(group.name for group in trained), sum(group.num_values for group in trained)
        stage = stage_memory(recipe, net, groups, epoch, images)
        cells = {name: f"{size / 2**20:,.1f}" for name, size in stage.items()}
        total = "> " * (not stage.keys() >= {"optimizer", "activations"}) + f"{sum(stage.values()) / 2**20:,.1f}"
        rows.append((str(epoch + 1), names, f"{num_values:,}", *(cells.get(column, "unknown") for column in columns), total))
    note = (
        f"MiB, estimated for {images} images{largest} at once, in float32; bf16 about halves the\n"
        "activations; on top come results dropped on the way (frozen layers drop all),\n"
        "the library's own workspace and the loader"
    )
    return f"{align_columns(rows, numbers=True, width=math.inf if wide else WIDTH)}\n{note}"


def stage_memory(recipe: Recipe, net: nn.Module, groups: Sequence[ParamGroup], epoch: int, images: int) -> dict[str, int]:
    """Bytes in float32 of the stage that `epoch` is in, with `images` images at once; `net` lies on the meta device.

    "average" is there with `ema_decay` only, "optimizer" unless a step asks for numbers, of which there are none here.
    """
    optimizer = build_optimizer(groups)
    with keep_state(net):
        start_stage(groups, optimizer, epoch)
        set_train_mode(net, recipe.batch_norm)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        stage = {"parameters": num_bytes([*net.parameters(), *net.buffers()]), "gradients": num_bytes(trained)}
        for device in ("meta", "cpu"):  # the last that works: on the CPU a tensor that is no buffer stays on the meta device
            with suppress(Exception):  # neither does where forward asks for values
                stage["activations"] = activation_bytes(recipe, net, images, device)
        if recipe.ema_decay:
            stage["average"] = stage["parameters"]
        if not needs_closure(optimizer):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            with suppress(RuntimeError):  # what Tensor.item() says on the meta device
                optimizer.step()
                stage["optimizer"] = num_bytes(value for state in optimizer.state.values() for value in state.values())
    return stage


@contextmanager
def keep_state(net: nn.Module) -> Iterator[None]:
    """Give modules their modes and parameters their requires_grad back in the end; gradients are dropped."""
    modes = {module: module.training for module in net.modules()}
    trained = {parameter: parameter.requires_grad for parameter in net.parameters()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in trained.items():
            parameter.requires_grad, parameter.grad = flag, None


def activation_bytes(recipe: Recipe, net: nn.Module, images: int, device: str) -> int:
    """Bytes of the images, the logits and what autograd keeps for the backward pass, as they are between the two passes.

    Found with fake tensors on that device: "cpu", since on "meta" attention keeps matrices that it never makes on a real one.
    """
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(tensor))  # what a checkpoint of frozen layers keeps is gone with the end of the pass
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            tensor: torch.empty_like(tensor, device=device, requires_grad=tensor.requires_grad)
            for tensor in [*net.parameters(), *net.buffers()]
        }
        # Each place that has a tensor, once: a weight may be tied, and functional_call does not undo itself on shared modules.
        own = {
            f"{path}.{name}".lstrip("."): fakes[tensor]
            for path, module in net.named_modules()
            for tensors in (module.named_parameters, module.named_buffers)
            for name, tensor in tensors(recurse=False, remove_duplicate=False)
        }
        batch = torch.empty(images, *recipe.data.shape, device=device).contiguous(memory_format=memory_format(recipe, net))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = torch.func.functional_call(net, own, batch, tie_weights=False)
        return num_bytes([*own.values(), batch, logits, *(tensor() for tensor in kept)]) - num_bytes(own.values())


def num_bytes(values: Iterable[object]) -> int:
    """Bytes of memory behind the tensors among `values`, however many of them share it."""
    storages = [value.untyped_storage() for value in values if isinstance(value, torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
