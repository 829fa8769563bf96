"""A backbone with a new head: a timm model, a torchvision model, or what a function of the recipe returns."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from finetune.models.batch_norm import has_statistics, needs_batch, set_train_mode
from finetune.models.pretrained import (
    check_resampling,
    load_timm_model,
    load_weights,
    reset_head,
    size_options,
    torchvision_model,
)
from finetune.recipe import Recipe
from finetune.recipe.data import Sides
from finetune.recipe.serialize import to_dict
from finetune.utils.device import overruns_channels_last, uses_cpu
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.text import nearest

TimmModel = Any  # an nn.Module with methods that torch's class does not have


def build_backbone(recipe: Recipe, num_classes: int, state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The recipe's network with the pretrained tensors of `state`, all of them, and a new head of `num_classes` outputs.

    It takes float images [n, channels, H, W] and returns logits [n, num_classes].

    Raises:
        RecipeError: if there is no such network, or the tensors do not fit it.
    """
    if is_timm(recipe):
        net = timm_model(recipe, num_classes, state)
    else:
        own = callable(recipe.backbone)
        net = function_model(recipe) if own else torchvision_model(str(recipe.backbone).partition("/")[2])
        if state is not None:
            load_weights(net, state, recipe.weights)
        if recipe.head or not own:
            net = replace_head(net, head_name(recipe, net), num_classes)
    return net.to(memory_format=memory_format(recipe, net))


def is_timm(recipe: Recipe) -> bool:
    """Whether the backbone is a timm model."""
    return not callable(recipe.backbone) and not recipe.backbone.startswith("torchvision/")


def memory_format(recipe: Recipe, net: nn.Module) -> torch.memory_format:
    """The memory format of weights and images: channels last, with which convolutions are up to 3 times faster.

    The network of a recipe's function may call `view` on its input, which must be contiguous for that.
    """
    if callable(recipe.backbone) or uses_cpu() and any(map(overruns_channels_last, net.modules())):
        return torch.contiguous_format
    return torch.channels_last


def meta_backbone(recipe: Recipe, num_classes: int | None = None) -> nn.Module:
    """The network on torch's meta device, without weights or memory, tried on images of each of the recipe's sizes.

    One that needs the values of its tensors, to be built or in `forward`, is built on the CPU instead. While `num_classes` is
    not known, a new head has 10 outputs.

    Raises:
        RecipeError: if it can't be built, does not take such images, or does not return a logit for each class.
    """
    name, fault, sides = to_dict(recipe.backbone), "", recipe.data.sides
    of = f" of {recipe.data.channels} channels" if recipe.data.channels else ""
    for device in ("meta", "cpu"):
        text = f"{name} can't be built"
        try:
            with torch.device(device):
                net = build_backbone(recipe, num_classes or 10)
                for sides in recipe.all_sides:
                    check_patches(recipe, net, sides)
                    text = f"{name} does not take {words(sides)} images{of}"
                    try_images(recipe, net, sides, num_classes)
            check_resampling(recipe)
            return net.eval()
        except RecipeError:
            raise
        except Exception as error:  # each network raises something else
            fault = f"{text}: {type(error).__name__}: {first_line(error)}"
    if "take" in fault and (others := {p.dtype for p in net.parameters() if p.is_floating_point()} - {torch.float32}):
        fault += f"; images come in float32, some of its weights are {others.pop()}: return net.float()"
    if "take" in fault and len(recipe.all_sides) > 1 and takes_images(replace(recipe, weights="none"), sides):
        named = " and ".join(f"data.{name}" for name in ("start_size", "test_size") if getattr(recipe.data, name))
        raise RecipeError(f"{name} takes images of one size in a run, not {recipe.data.sizes}: leave out {named}")
    raise RecipeError(fault + other_sizes(recipe, sides) * ("take" in fault))


def words(sides: Sequence[int]) -> str:
    """A size of images, height first: "224 x 224"."""
    return " x ".join(map(str, sides))


def takes_images(recipe: Recipe, size: int | Sides) -> bool:
    """Whether the network can be built for images of this size alone, and computes on one."""
    recipe = replace(recipe, data=replace(recipe.data, image_size=size, test_size=None, start_size=None))
    with suppress(Exception), torch.device("meta"), torch.no_grad():  # each network raises something else
        net = build_backbone(recipe, 10)
        check_patches(recipe, net, recipe.data.sides)
        check_resampling(recipe)
        net.eval()(torch.zeros(1, *recipe.data.shape))
        return True
    return False


def other_sizes(recipe: Recipe, sides: Sides) -> str:
    """What to set where a timm model does not take images of a size of the recipe: the sizes next to it that it takes."""
    if not is_timm(recipe):
        return ""
    below = sides[0] // 32 * 32
    trained = timm.models.get_pretrained_cfg_value(str(recipe.backbone), "input_size") or (3, 224, 224)
    sizes = [size for size in (below, below + 32) if (size, size) not in ((0, 0), sides) and takes_images(recipe, size)]
    return f"; --set data.{recipe.data.field_of(sides)}=" + " or ".join(map(str, sizes or [trained[-1]]))


def check_patches(recipe: Recipe, net: nn.Module, sides: Sides) -> None:
    """Raise RecipeError if the network cuts images into patches, and images of these sides do not divide into them.

    timm's would leave out the last rows and columns of pixels without a word.
    """
    embed = getattr(net, "patch_embed", None)
    layer = getattr(embed, "proj", None)
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != layer.stride or getattr(embed, "dynamic_img_pad", False):
        return
    rests = [side % step for side, step in zip(sides, layer.stride, strict=True)]
    if any(rests):
        below = tuple(side - rest for side, rest in zip(sides, rests, strict=True))
        above = tuple(low + step * (rest > 0) for low, step, rest in zip(below, layer.stride, rests, strict=True))
        fitting = " or ".join(",".join(map(str, dict.fromkeys(near))) for near in (below, above) if all(near))
        raise RecipeError(
            f"{to_dict(recipe.backbone)} cuts images into patches of {words(layer.stride)} pixels, into which "
            f"{words(sides)} does not divide: --set data.{recipe.data.field_of(sides)}={fitting}"
        )


def try_images(recipe: Recipe, net: nn.Module, sides: Sides, num_classes: int | None = None) -> None:
    """Give the network two images of these sides in training, which may move its norms, and one in evaluation.

    Raises:
        RecipeError: if it does not return a logit for each class.
    """
    shape = recipe.data.shape_of(sides)
    set_train_mode(net, recipe.batch_norm)
    check_logits(recipe, net(torch.zeros(2, *shape)), 2, num_classes)
    try:
        with torch.no_grad():
            check_logits(recipe, net.eval()(torch.zeros(1, *shape)), 1, num_classes)
    except ValueError as error:  # which torch's norms raise
        names = [f"{name} ({type(norm).__name__})" for name, norm in net.named_modules() if needs_batch(norm)]
        if "more than 1 value per channel" not in str(error) or not names:
            raise
        raise RecipeError(
            f"{to_dict(recipe.backbone)} can't evaluate one image: with track_running_stats=False {', '.join(names)} needs "
            "several, for their statistics; leave that option out"
        ) from error


def check_logits(recipe: Recipe, logits: object, images: int, num_classes: int | None) -> None:
    """Raise RecipeError unless these are logits [images, num_classes]; a last layer of its own may have any size till that is
    known."""
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    fixed = callable(recipe.backbone) and recipe.head is None
    wanted = num_classes or (shape[-1:] or [1])[0] if fixed else num_classes or 10
    if shape != (images, wanted):
        remedy = "; head names the layer whose size is to be fitted" if fixed and len(shape) == 2 else ""
        when = "2 images in training" if images == 2 else "one image"
        raise RecipeError(
            f"{to_dict(recipe.backbone)} returns {shape or type(logits).__name__} for {when}, not one logit for each of "
            f"{wanted} classes{remedy}"
        )


def function_model(recipe: Recipe) -> nn.Module:
    """What the recipe's function returns; lazy layers get their sizes from an image."""
    assert callable(recipe.backbone)
    if isinstance(recipe.backbone, nn.Module):
        raise RecipeError("backbone: this is a network; give the class or the function that makes it, for each run a fresh one")
    with torch.no_grad():  # a weight that weight_norm's hook computes could not be copied
        net = recipe.backbone()
    if not isinstance(net, nn.Module):
        raise RecipeError(f"{to_dict(recipe.backbone)} returns {type(net).__name__}, not a torch.nn.Module")
    if any(map(is_lazy, [*net.parameters(), *net.buffers()])):
        with torch.no_grad():
            net.eval()(torch.zeros(1, *recipe.data.shape))
    return net


def timm_model(recipe: Recipe, num_classes: int, state: dict[str, torch.Tensor] | None) -> TimmModel:
    """The recipe's timm model with these tensors and a new head."""
    name = str(recipe.backbone)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise RecipeError(f"timm has no model '{architecture}'.{nearest(architecture, timm.list_models())}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise RecipeError(f"timm has no weights '{tag}' for {architecture}. There are: {', '.join(tags)}")
    # timm leaves out an option that is None; not every network takes drop_path_rate.
    options: dict[str, Any] = {
        **size_options(recipe),
        "in_chans": recipe.data.channels,  # timm adapts the pretrained weights of the first layer
        "drop_rate": recipe.dropout or None,
        "drop_path_rate": recipe.drop_path or None,
    }
    try:
        if state is None:
            net: TimmModel = timm.create_model(name, num_classes=num_classes, **options)
        else:
            net = load_timm_model(name, recipe.weights, state, options)
            reset_head(net, num_classes)
        if recipe.gradient_checkpointing:
            net.set_grad_checkpointing()
    except (TypeError, AttributeError, AssertionError) as error:
        raise RecipeError(
            f"{name} does not take dropout={recipe.dropout}, drop_path={recipe.drop_path}, "
            f"gradient_checkpointing={recipe.gradient_checkpointing}: {error}"
        ) from error
    return net


def replace_head(net: nn.Module, head: str, num_classes: int) -> nn.Module:
    """The network with a new layer of `num_classes` outputs, all else the same, in place of `head`, a linear layer or a
    convolution."""
    layer = dict(net.named_modules()).get(head)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        names = [n for n, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        raise RecipeError(
            f"head: no linear or convolution layer '{head}'.{nearest(head, names)} The last ones are: {', '.join(names[-4:])}"
        )
    if fault := no_plain_layer(layer):
        raise RecipeError(
            f"head: '{head}' is {fault}, of which no other size can be made here: give head=None, and a network whose '{head}' "
            "has an output for each class already"
        )
    options: dict[str, Any] = {"bias": layer.bias is not None, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        new: nn.Module = type(layer)(layer.in_features, num_classes, **options)
    else:
        kept = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        new = nn.Conv2d(layer.in_channels, num_classes, **options, **{name: getattr(layer, name) for name in kept})
    net.set_submodule(head, new)
    if hasattr(net, "num_classes"):  # as timm's have it, and say it in config.json
        net.num_classes = num_classes  # type: ignore[assignment]
    return net


def no_plain_layer(layer: nn.Linear | nn.Conv2d) -> str:
    """What a layer is, if one that is made with its arguments would not do the same; "" if it would."""
    name = type(layer).__name__
    if type(layer) not in (nn.Linear, nn.Conv2d, timm.layers.Linear):  # timm's differs in TorchScript alone
        return f"a {name}, a kind of its own"
    if {name for name, _ in layer.named_parameters()} - {"weight", "bias"} or layer._forward_pre_hooks or layer._forward_hooks:
        return f"a {name} with a hook, such as weight_norm's"
    return f"a {name} of {layer.groups} groups" if isinstance(layer, nn.Conv2d) and layer.groups > 1 else ""


def head_parameters(recipe: Recipe, net: nn.Module) -> set[str]:
    """The names of the new head's parameters."""
    if is_timm(recipe):
        return classifier_parameters(net)
    if callable(recipe.backbone) and not recipe.head:
        return set()
    head = head_name(recipe, net)
    return {f"{head}.{name}" for name, _ in net.get_submodule(head).named_parameters()}


def fresh_norms(recipe: Recipe, net: TimmModel) -> list[str]:
    """The norms with running statistics that come with a timm model's new head, by name: theirs are no pretrained ones."""
    if not is_timm(recipe):
        return []
    again: TimmModel = copy.deepcopy(net)
    kept = [*again.modules()]
    reset_head(again, again.num_classes)
    return [name for name, module in again.named_modules() if has_statistics(module) and module not in kept]


def classifier_parameters(net: TimmModel) -> set[str]:
    """The names of the parameters of a timm model's classifier, or classifiers."""
    heads = net.get_classifier()
    ids = {id(parameter) for head in (heads if isinstance(heads, tuple) else (heads,)) for parameter in head.parameters()}
    return {name for name, parameter in net.named_parameters() if id(parameter) in ids}


def head_name(recipe: Recipe, net: nn.Module) -> str:
    """The layer to replace: of a function's network the recipe's `head`, of a torchvision classifier the last layer."""
    if callable(recipe.backbone):
        return str(recipe.head)
    return [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
