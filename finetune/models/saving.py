"""A network and how to make it again, written to a folder."""

import copy
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.models.backbone import TimmModel
from finetune.models.linear_probe import Units, head_with_units, units_of
from finetune.utils.files import write_folder

OF_SOURCE = (
    "label_offset",
    "test_input_size",
    "test_pool_size",
    "test_crop_pct",
    "label_names",
)  # true of the pretrained weights alone


def save_model(
    folder: Path,
    net: nn.Module,
    preprocessing: dict[str, Any],
    classes: Sequence[str],
    temperature: float = 1.0,
    thresholds: Sequence[float] | None = None,
    units: Units | None = None,
) -> None:
    """Write a folder with the network, its classes and its preprocessing, replacing what was there in one step.

    A timm model is loaded again by timm.create_model("local-dir:FOLDER", pretrained=True). Of any other network the folder has
    model.safetensors (its state dict) and config.json (classes and preprocessing). For probabilities,
    logits are divided by the `temperature`; of several labels an image, each class is predicted above its threshold. A network
    of numbers gives them in their own units; which mean and deviation they had in training is kept beside their names: `units`,
    or those of the network.
    """
    write_folder(folder, lambda aside: write_model(aside, net, preprocessing, classes, temperature, thresholds, units))


def write_model(
    folder: Path,
    net: nn.Module,
    preprocessing: dict[str, Any],
    classes: Sequence[str],
    temperature: float = 1.0,
    thresholds: Sequence[float] | None = None,
    units: Units | None = None,
) -> None:
    """Write model.safetensors and config.json into a folder."""
    # Made in memory first: on a full disk safetensors' own writer fails in words of its own.
    with plain_head(net):
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(plain_state(net)))
    about: dict[str, Any] = {"label_names": list(classes)}
    if units := units or units_of(net):
        known = {name: part for name, part in units._asdict().items() if part}
        about["training_labels"] = {name: [float(f"{one:.7g}") for one in part] for name, part in known.items()}
    else:
        about["temperature"] = round(temperature, 4)
    about |= {"pixels": preprocessing["pixels"]} if "pixels" in preprocessing else {}
    about |= {} if thresholds is None else {"thresholds": list(thresholds)}
    if not write_timm_config(folder, net, preprocessing, about):
        config = about | {"preprocessing": preprocessing}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@contextmanager
def plain_head(net: nn.Module) -> Iterator[None]:
    """Within, the head's own weights give the labels' units, as other programs, which know no hook, need them."""
    if (head := head_with_units(net)) is None:
        yield
        return
    layer, hook = head
    before, units = [layer.weight.detach().clone(), layer.bias.detach().clone()], hook.units
    mean, deviation = (torch.tensor(values, dtype=torch.float64, device=before[0].device) for values in units[:2])
    try:
        with torch.no_grad():
            layer.weight.copy_(before[0].double() * deviation[:, None])
            layer.bias.copy_(before[1].double() * deviation + mean)
        hook.set(Units((0.0,) * len(mean), (1.0,) * len(mean)))
        yield
    finally:
        with torch.no_grad():
            layer.weight.copy_(before[0])
            layer.bias.copy_(before[1])
        hook.set(units)


def write_timm_config(folder: Path, net: TimmModel, preprocessing: dict[str, Any], about: dict[str, Any]) -> bool:
    """Write the config.json from which timm makes this network again, with `about` in it; returns whether it does.

    It does not for a network that hands on the pretrained_cfg of a timm model within it, or one that was changed by hand.
    """
    if not isinstance(getattr(net, "pretrained_cfg", None), dict):
        return False
    plain: TimmModel = copy.copy(net)  # another pretrained_cfg, the same tensors
    source = {key: value for key, value in net.pretrained_cfg.items() if key not in OF_SOURCE}
    inputs = {name: value for name, value in preprocessing.items() if name != "pixels"}
    plain.pretrained_cfg = source | inputs | {"custom_load": False}
    channels, height, width = preprocessing["input_size"]
    options: dict[str, Any] = {"in_chans": channels} if channels != 3 else {}
    options |= {"img_size": height if height == width else [height, width]} if source.get("fixed_input_size") else {}
    file: Any = folder / "config.json"  # said to be a str, but timm 1.0.26 takes a Path alone
    try:
        save_config_for_hf(plain, file, {**about}, options or None)  # timm takes things out of it
        config = json.loads(file.read_text())
        arguments = config.get("model_args", {})
        arguments.pop("num_classes", None)  # it stands beside them; transformers would pass it twice
        if arguments.pop("dynamic_img_size", False):  # of a network that trained at other sizes; exporters can't follow it
            config["pretrained_cfg"]["fixed_input_size"] = True
        file.write_text(json.dumps(config, indent=2) + "\n")
        with torch.device("meta"):
            again = timm.create_model(f"local-dir:{folder}")
    except OSError:
        raise
    except Exception:  # an argument that is not JSON's, an attribute that timm's networks have, a name unknown to timm
        return False
    return outline(again) == outline(net)


def outline(net: nn.Module) -> list[tuple[object, ...]]:
    """What a network computes with, but for its weights: kinds and options of its modules, names and shapes of its tensors."""
    modules = [
        (name, _BatchNorm if isinstance(module, _BatchNorm) else type(module), module.extra_repr())  # synchronised or not
        for name, module in net.named_modules()
        if not isinstance(module, nn.Identity) and "Drop" not in type(module).__name__  # config.json has no drop rates
    ]
    return [*modules, *((name, value.shape) for name, value in net.state_dict().items() if isinstance(value, torch.Tensor))]


def plain_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as safetensors takes it: on the CPU, contiguous, no memory shared, extra state as bytes."""
    state, memory = {}, set()
    for name, value in net.state_dict().items():
        tensor = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else encode(value)
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        state[name] = tensor
    return state


def encode(value: object) -> torch.Tensor:
    """What a module's get_extra_state returns, as bytes in a tensor."""
    torch.save(value, file := io.BytesIO())
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8).clone()


def decode_state(net: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state dict of `net` that `plain_state` made these tensors of; no code in it is run."""
    encoded = {name for name, value in net.state_dict().items() if not isinstance(value, torch.Tensor)}
    return {
        name: torch.load(io.BytesIO(tensor.numpy().tobytes()), weights_only=True) if name in encoded else tensor
        for name, tensor in state.items()
    }
