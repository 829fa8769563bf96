"""LoRA: low-rank changes that train beside frozen weights (Hu et al. 2021, arXiv 2106.09685); files in peft's format."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

import safetensors.torch
import torch
from torch import nn

from finetune.recipe import Lora, RecipeError
from finetune.utils.files import read_json, write_folder
from finetune.utils.seed import keyed_seed

Layer = nn.Linear | nn.Conv2d
KINDS = (nn.Linear, nn.Conv2d)  # themselves: what is derived from them may compute with another weight
PREFIX = "base_model.model."  # of the names in peft's files


class Adapter(nn.Module):
    """The change of a layer's output: `scale` * B(A(dropout(input))), 0 at first, since B is.

    A brings `rank` values of each input, or of each place of an image by a convolution like the layer's own; B brings outputs.
    """

    A: Layer
    B: Layer

    def __init__(self, layer: Layer, row: Lora, seed: int):
        super().__init__()
        self.scale, self.dropout = row.alpha / row.rank, nn.Dropout(row.dropout)
        with torch.device(layer.weight.device):
            if isinstance(layer, nn.Linear):
                self.A = nn.Linear(layer.in_features, row.rank, bias=False)
                self.B = nn.Linear(row.rank, layer.out_features, bias=False)
            else:
                places = layer.kernel_size, layer.stride, layer.padding, layer.dilation
                self.A = nn.Conv2d(layer.in_channels, row.rank, *places, bias=False)  # type: ignore[arg-type]  # as it has them
                self.B = nn.Conv2d(row.rank, layer.out_channels, 1, bias=False)
        start = torch.empty(self.A.weight.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.A.weight.copy_(start)
            self.B.weight.zero_()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.B(self.A(self.dropout(inputs))) * self.scale
        return change

    def sides(self) -> tuple[tuple[str, Layer], ...]:
        """A and B, by name."""
        return ("A", self.A), ("B", self.B)

    def change_of_weight(self) -> torch.Tensor:
        """What to add to the layer's weight for the same output, without dropout."""
        low, high = self.A.weight.flatten(1), self.B.weight.flatten(1)
        return (high @ low * self.scale).view(len(high), *self.A.weight.shape[1:])


def add_change(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """The forward hook of an adapted layer; it knows the layer by being called with it, so that a copy has its own."""
    adapter = layer._modules.get("lora")
    return output if adapter is None else output + adapter(inputs[0])  # none while it is merged


def adapters(net: nn.Module) -> dict[str, Adapter]:
    """The adapters of a network, by the names of the layers that they change."""
    return {name.removesuffix(".lora"): part for name, part in net.named_modules() if isinstance(part, Adapter)}


def add_adapters(net: nn.Module, rows: Mapping[str, Lora], seed: int) -> None:
    """Give each layer of a Lora row an adapter, unless it has one.

    `rows` has the row of each such parameter, by name.

    Raises:
        RecipeError: for a row without a layer that LoRA changes, or with a weight of another kind of layer.
    """
    there = adapters(net)
    own = {name: row for name, row in rows.items() if ".lora." not in name}
    layers = {name: layer for name, layer in net.named_modules() if f"{name}.weight" in own}
    faults = [
        f"'{own[f'{name}.weight'].name}' names {name}, a {type(layer).__name__}, which LoRA does not change: let the pattern "
        "name layers of Linear, and of Conv2d without groups"
        for name, layer in layers.items()
        if layer.get_parameter("weight").ndim >= 2 and not can_adapt(layer)
    ]
    fitting = {name: layer for name, layer in layers.items() if can_adapt(layer)}
    for row in dict.fromkeys(own.values()):
        if not any(own[f"{name}.weight"] is row for name in fitting):
            faults.append(f"'{row.name}' (pattern '{row.pattern}') names no layer that LoRA changes: Linear or Conv2d")
    if faults:
        raise RecipeError(f"groups: {faults[0]}")
    for name, layer in fitting.items():
        if name not in there:
            row = own[f"{name}.weight"]
            adapter = Adapter(layer, row, keyed_seed("lora", seed, name))
            if row.start:
                load_adapter({name: adapter}, Path(row.start))
            layer.add_module("lora", adapter)
            layer.register_forward_hook(add_change)


def check_called(net: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise RecipeError for an adapted layer that the network never calls: its change would have no effect.

    So it is with the qkv layers of timm's BEiT, Swin V2 and some EVA, whose weights attention takes for itself.
    """
    parts, called = adapters(net), set[str]()
    hooks = [
        part.register_forward_hook(lambda module, inputs, output, name=name: called.add(name)) for name, part in parts.items()
    ]
    try:
        if parts:
            with torch.no_grad():
                net.eval()(torch.zeros(1, *shape, device=next(net.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name in parts if name not in called]:
        raise RecipeError(
            f"groups: LoRA can't change {idle[0]}{f' and {len(idle) - 1} more' if idle[1:] else ''}: the network takes the "
            "weight and does not call the layer; leave it to another row, and let the pattern name others, such as proj or fc1"
        )


def can_adapt(layer: nn.Module) -> TypeGuard[Layer]:
    """Whether a layer's output is its weight times its input, and a change of the one a change of the other."""
    return type(layer) in KINDS and getattr(layer, "groups", 1) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"


@contextmanager
def merged(net: nn.Module) -> Iterator[None]:
    """Within, a plain network: each adapter's change is in its layer's weight, and the adapter is gone."""
    parts = [(net.get_submodule(name), adapter) for name, adapter in adapters(net).items()]
    weights = [layer.get_parameter("weight") for layer, _ in parts]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for (layer, adapter), weight in zip(parts, weights, strict=True):
                weight.add_(adapter.change_of_weight())
                del layer._modules["lora"]
        yield
    finally:
        with torch.no_grad():
            for (layer, adapter), weight, value in zip(parts, weights, before, strict=True):
                weight.copy_(value)
                layer.add_module("lora", adapter)


def save_adapter(folder: Path, net: nn.Module, heads: Iterable[str]) -> None:
    """Write the adapters, and the layers of these names whole, to a folder in the form of peft's `save_pretrained`."""
    parts, heads = adapters(net), sorted(heads)
    state = {f"{name}.lora_{side}.weight": layer.weight for name, part in parts.items() for side, layer in part.sides()}
    state |= {f"{head}.{name}": value for head in heads for name, value in net.get_submodule(head).state_dict().items()}
    ranks = {name: len(part.A.weight) for name, part in parts.items()}
    alphas = {name: part.scale * ranks[name] for name, part in parts.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(parts.values())).dropout.p,
        "target_modules": list(parts),
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "modules_to_save": heads,
        "bias": "none",
    }

    def write(aside: Path) -> None:
        tensors = {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        (aside / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")

    write_folder(folder, write)


def load_adapter(parts: Mapping[str, Adapter], folder: Path) -> None:
    """Give these adapters, by the names of their layers, the values of a folder in peft's format.

    Raises:
        RecipeError: if it is no such folder, of another kind than LoRA, or does not have them in the same sizes.
    """
    try:
        config = read_json(folder / "adapter_config.json")
        state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise RecipeError(f"{folder} is no adapter in peft's format: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise RecipeError(
            f"{folder} is no plain LoRA adapter but {'DoRA' if config.get('use_dora') else config.get('peft_type')}"
        )
    for name, part in parts.items():
        rank = len(part.A.weight)
        for side, layer in part.sides():
            value = state.get(f"{PREFIX}{name}.lora_{side}.weight")
            if value is None or value.shape != layer.weight.shape:
                raise RecipeError(f"{folder} has no change of {name} of rank {rank}{'' if value is None else ', but another'}")
            with torch.no_grad():
                layer.weight.copy_(value)
        alpha = matching(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        part.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def matching(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value whose pattern matches the end of a layer's name, or all of it after a ^, as peft reads them."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
