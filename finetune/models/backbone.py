"""A pretrained model with a new head: a timm name, a torchvision name, or a function of the recipe."""

from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_data_config
from torch import nn

from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest

INPUTS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # what timm says of the images
TimmModel = Any  # an nn.Module, with methods that torch's class does not have


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
        try:
            net = timm_model(recipe.backbone, recipe, num_classes, state)
            if recipe.gradient_checkpointing:
                net.set_grad_checkpointing()
        except (TypeError, AttributeError, AssertionError) as error:
            raise RecipeError(
                f"{recipe.backbone} does not take dropout={recipe.dropout}, drop_path={recipe.drop_path}, "
                f"gradient_checkpointing={recipe.gradient_checkpointing}: {error}"
            ) from error
        return net.to(memory_format=memory_format(recipe))
    if state is not None:
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise weights_error(recipe.weights, error) from error
    head = recipe.head if callable(recipe.backbone) else last_layer(net)
    return replace_head(net, str(head), num_classes).to(memory_format=memory_format(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """How weights and images lie in memory: channels last, for convolutions up to 3 times faster.

    A function's own network may call `view` on what it takes to be contiguous, so it gets that.
    """
    return torch.contiguous_format if callable(recipe.backbone) else torch.channels_last


def meta_backbone(recipe: Recipe, num_classes: int = 10) -> nn.Module:
    """The same network without weights or memory (on torch's meta device), tried on one image of the recipe's size.

    Raises:
        RecipeError: if there is no such network or it does not take such images.
    """
    with torch.device("meta"):
        try:
            net = build_backbone(recipe, num_classes).eval()
        except NotImplementedError as error:  # torch's word for a constructor that reads its own values
            raise RecipeError(f"{to_dict(recipe.backbone)} can't be laid out without its weights: {error}") from error
        size = recipe.data.image_size
        try:
            logits = net(torch.empty(1, 3, size, size))
        except Exception as error:  # each network says this its own way
            raise RecipeError(f"{to_dict(recipe.backbone)} does not take {size} x {size} images: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise RecipeError(
            f"{to_dict(recipe.backbone)} returns {shape} for one image, not one logit for each of {num_classes} classes"
        )
    return net


def timm_model(name: str, recipe: Recipe, num_classes: int, state: dict[str, torch.Tensor] | None) -> TimmModel:
    """A timm model. It is built as large as the weights' own head so that every tensor must fit, then given a new one."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise RecipeError(f"timm has no model '{architecture}'.{nearest(architecture, timm.list_models())}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise RecipeError(f"timm has no weights '{tag}' for {architecture}. There are: {', '.join(tags)}")
    config = timm.models.get_pretrained_cfg(name)
    assert config is not None  # as of every model of timm's list
    # None is timm's way of leaving an option out; not every network knows drop_path_rate.
    options: dict[str, Any] = {
        "img_size": recipe.data.image_size if config.fixed_input_size else None,
        "drop_rate": recipe.dropout or None,
        "drop_path_rate": recipe.drop_path or None,
    }
    if state is None:
        return timm.create_model(name, num_classes=num_classes, **options)
    classifier: Any = config.classifier  # a name, or several
    head = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    theirs = 0 if head is None else head.shape[0]
    in_file = {"state_dict": state, "num_classes": theirs, "label_offset": 0}
    try:
        net: TimmModel = timm.create_model(name, pretrained=True, num_classes=theirs, pretrained_cfg_overlay=in_file, **options)
    except RuntimeError as error:
        raise weights_error(recipe.weights, error) from error
    del net.pretrained_cfg["state_dict"]
    net.reset_classifier(num_classes)
    return net


def torchvision_model(name: str) -> nn.Module:
    """A torchvision classifier with random weights and its own head."""
    names = torchvision.models.list_models(torchvision.models)
    if name not in names or name in ("googlenet", "inception_v3"):  # these two return auxiliary outputs as well
        raise RecipeError(f"no torchvision classifier '{name}' that can be fine-tuned here.{nearest(name, names)}")
    return torchvision.models.get_model(name, weights=None)


def replace_head(net: nn.Module, head: str, num_classes: int) -> nn.Module:
    """The network with the layer named `head` (linear or convolution) replaced by a new one with `num_classes` outputs."""
    layer = dict(net.named_modules()).get(head)
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
    elif isinstance(layer, nn.Conv2d):
        new = nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
    else:
        names = [n for n, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        raise RecipeError(
            f"head: no linear or convolution layer '{head}'.{nearest(head, names)} The last ones are: {', '.join(names[-4:])}"
        )
    net.set_submodule(head, new)
    return net


def head_parameters(recipe: Recipe, net: nn.Module) -> set[str]:
    """The names of the parameters that the pretrained weights do not have: those of the new head."""
    if not callable(recipe.backbone) and not recipe.backbone.startswith("torchvision/"):
        return classifier_parameters(net)
    head = last_layer(net) if not callable(recipe.backbone) else recipe.head
    return {f"{head}.{name}" for name, _ in net.get_submodule(head).named_parameters()} if head else set()


def classifier_parameters(net: TimmModel) -> set[str]:
    """The names of the parameters of a timm model's classifier, or classifiers.

    By identity: the last layer of some models' own list has pretrained norms beside the classifier, and these are no new head.
    """
    heads = net.get_classifier()
    own = {id(p) for module in (heads if isinstance(heads, tuple) else [heads]) for p in module.parameters()}
    return {name for name, parameter in net.named_parameters() if id(parameter) in own}


def last_layer(net: nn.Module) -> str:
    """The name of the last linear layer or convolution: the last layer of each of torchvision's classifiers."""
    return [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]


def weights_error(source: str, error: Exception) -> RecipeError:
    """What torch says of tensors that do not fit, shortened."""
    lines = [line.strip()[:160] for line in str(error).splitlines()]
    return RecipeError("\n    ".join([f"the weights {source} do not fit:", *lines[:5]]))


def preprocessing(recipe: Recipe, net: nn.Module) -> dict[str, Any]:
    """How images are turned into the network's input: timm's mean, std, interpolation, crop_pct and input_size.

    Mean and deviation belong to the weights: not all were trained with ImageNet's.
    """
    config = dict(getattr(net, "pretrained_cfg", {}))
    if isinstance(recipe.backbone, str) and recipe.backbone.startswith("torchvision/"):
        preset = torchvision.models.get_model_weights(recipe.backbone.partition("/")[2]).DEFAULT.transforms()
        config = {
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
            "interpolation": preset.interpolation.value,
            "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        }
    size = recipe.data.image_size
    resolved = resolve_data_config({"input_size": (3, size, size), "crop_pct": recipe.data.crop_pct}, pretrained_cfg=config)
    return {key: resolved[key] for key in INPUTS}
