"""A trained network, loaded again: from a run, a folder or the Hugging Face hub, without running code found there."""

import errno
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from finetune.models.backbone import TimmModel, build_backbone, check_logits, memory_format
from finetune.models.linear_probe import Units
from finetune.models.pretrained import INPUTS, fetch_from_hub, hub_fault, load_weights, read_weights
from finetune.models.saving import decode_state, write_model
from finetune.recipe import Recipe
from finetune.recipe.load import load_recipe
from finetune.recipe.metrics import METRICS, NO_SHARES, beats, write_value
from finetune.recipe.recipe import minimal_recipe
from finetune.recipe.serialize import from_dict, to_dict
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.files import read_json
from finetune.utils.seed import keep_random_state, seed_all

HUB = ("hf-hub:", "https://huggingface.co/")
FILES = ("config.json", "model.safetensors")
CHECKPOINTS = {"last": "model", "best": "model-best"}  # of a run


class SavedModel(NamedTuple):
    """A trained network, in eval mode on the CPU, and what is needed to use it."""

    net: nn.Module
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]  # arguments of timm's create_transform
    recipe: Recipe  # the run's; of a model without a run, a minimal one
    temperature: float = 1.0  # that logits are divided by for probabilities
    thresholds: tuple[float, ...] | None = None  # of several labels an image: what each class's probability must exceed
    units: Units | None = None  # of numbers: their mean and deviation in training


def load_model(source: str | Path) -> SavedModel:
    """Load a trained network from a run, a model folder or the Hugging Face hub.

    `source` is a run folder (of its networks the one that `choose_model` says), a model folder in it, any folder with a timm
    model's config.json and model.safetensors, or such a repository: "hf-hub:OWNER/NAME", with "@REVISION" or without, or its
    https://huggingface.co/OWNER/NAME. Only these two files of a repository are fetched, and no code is run. A network made by a
    function of a recipe has its code nowhere else: for such a run, the run's own recipe.py is run.

    Raises:
        RecipeError: if there is no such model, or its files do not fit each other.
    """
    folder, run = find_model(source)
    recipe, config = run and read_recipe(run), read_json(folder / "config.json")
    if "architecture" in config:
        net: TimmModel = load_network(folder, config)
        inputs = resolve_model_data_config(net)
        preprocessing = {key: inputs[key] for key in INPUTS}
        recipe = recipe or minimal_recipe(config["architecture"], "(unknown)", tuple(inputs["input_size"][1:]), batch_size=32)
        if "pixels" in config or inputs["input_size"][0] != 3:
            preprocessing["pixels"] = config.get("pixels", "uint8")
            recipe = replace(recipe, data=replace(recipe.data, channels=inputs["input_size"][0]))
        classes = config.get("label_names") or net.pretrained_cfg.get("label_names")
        if not classes and (subset := infer_imagenet_subset(net)):
            classes = ImageNetInfo(subset).label_descriptions()
        classes = tuple(classes or map(str, range(net.num_classes)))
        if len(classes) != net.num_classes:
            raise RecipeError(f"{folder / 'config.json'} names {len(classes)} classes, but the network has {net.num_classes}")
    elif run and recipe and config.keys() >= {"label_names", "preprocessing"}:
        classes, preprocessing = tuple(config["label_names"]), config["preprocessing"]
        recipe = with_functions(recipe, run) if callable(recipe.backbone) else recipe
        net = load_network(folder, config, recipe)
    else:
        raise RecipeError(
            f"{folder} holds no timm model: its config.json names no architecture. A network of torchvision or "
            "of a function is loaded from the whole run folder"
        )
    thresholds, units = read_thresholds(folder, config, len(classes)), read_units(folder, config, len(classes))
    if thresholds and not run:  # of a model without a run, which these alone tell of its loss
        recipe = replace(recipe, loss="multi_label", metric="mean_average_precision")
    if units and not recipe.of_numbers:  # likewise
        recipe = replace(recipe, loss="mse", metric="quadratic_kappa" if units.lowest else "mae")
    thresholds = (thresholds or (0.5,) * len(classes)) if recipe.loss == "multi_label" else None
    return SavedModel(net.eval(), classes, preprocessing, recipe, read_temperature(folder, config), thresholds, units)


def read_temperature(folder: Path, config: dict[str, Any]) -> float:
    """The temperature that a model's config.json states; 1 of a model that has none, such as one of an earlier version."""
    found = config.get("temperature", 1.0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise RecipeError(f"{folder / 'config.json'}: temperature must be a number above 0, not {found!r}")
    return float(found)


def read_thresholds(folder: Path, config: dict[str, Any], classes: int) -> tuple[float, ...] | None:
    """The threshold of each class that a model's config.json states; None of a model that has none."""
    if (found := config.get("thresholds")) is None:
        return None
    numbers = isinstance(found, list) and all(type(one) in (int, float) and 0 <= one <= 1 for one in found)
    if not numbers or len(found) != classes:
        raise RecipeError(f"{folder / 'config.json'}: thresholds must be {classes} numbers from 0 to 1, one for each class")
    return tuple(map(float, found))


def read_units(folder: Path, config: dict[str, Any], names: int) -> Units | None:
    """The mean and deviation of each number in training that a model's config.json states; None where it has classes."""
    if (found := config.get("training_labels")) is None:
        return None
    try:
        units = Units(**{name: tuple(map(float, found[name])) for name in Units._fields if name in found})
    except (TypeError, KeyError, ValueError):
        units = Units((), ())
    if {*map(len, units[:2])} != {names} or not len(units.lowest) == len(units.highest) in (0, names):
        raise RecipeError(
            f"{folder / 'config.json'}: training_labels must have a mean and a deviation of each of {names} numbers"
        )
    return units


def load_network(folder: Path, config: dict[str, Any], recipe: Recipe | None = None) -> nn.Module:
    """The network in a folder: timm's, if config.json names its architecture, else the recipe's."""
    if "architecture" in config:
        try:  # of what is in a folder, timm prefers model.safetensors
            return timm.create_model(f"local-dir:{folder}", pretrained=True)
        except Exception as error:  # a foreign or cut file, each said in its own way
            raise RecipeError(f"timm can't load {folder}: {first_line(error)[:300]}") from error
    assert recipe  # the caller's: without one there is nothing to make a network of
    net, file = build_backbone(recipe, len(config["label_names"])), folder / "model.safetensors"
    load_weights(net, decode_state(net, read_weights(file)), str(file))
    return net


def find_model(source: str | Path) -> tuple[Path, Path | None]:
    """The folder with config.json and model.safetensors, and the run it belongs to, if it does."""
    if str(source).startswith(HUB):
        return fetch_model(str(source)), None
    folder = Path(source).absolute()
    run = next((path for path in (folder, folder.parent) if (path / "recipe.json").is_file()), None)
    folder = Path(choose_model(source)[0])
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        others = [word for word, name in CHECKPOINTS.items() if folder.name != name and (folder.parent / name).is_dir()]
        there = f" There is another: --checkpoint {others[0]}." if run and others else ""
        raise RecipeError(
            f"no model in {source}: no {folder / missing[0]}.{there} Wanted: the folder of a finished run, a folder "
            f"with {' and '.join(FILES)}, or hf-hub:OWNER/NAME"
        )
    return folder, run


def choose_model(source: str | Path, checkpoint: str | None = None) -> tuple[str, str]:
    """(the folder of the network to use, why): of a run, the one that it says itself, or "last" or "best" as asked for.

    What is no run folder, such as RUN/model or a repository, is that network itself, without a why.

    Raises:
        RecipeError: for a checkpoint that there can't be.
    """
    if checkpoint not in (None, *CHECKPOINTS):
        raise RecipeError(f"checkpoint '{checkpoint}': there are {', '.join(CHECKPOINTS)}")
    run = Path(source)
    if str(source).startswith(HUB) or not (run / "recipe.json").is_file():
        if checkpoint:
            raise RecipeError(
                f"{source} is one network, not a run with two: leave out the checkpoint, or name the run's folder"
            )
        return str(source), ""
    if checkpoint:
        return str(run / CHECKPOINTS[checkpoint]), "as asked for"
    result = read_json(run / "result.json") if (run / "result.json").is_file() else {}
    if result.get("use") not in CHECKPOINTS.values():  # a run from before this was written down
        result["use"], result["use_reason"] = model_to_use(result, read_recipe(run).metric)
    return str(run / result["use"]), result["use_reason"]


def model_to_use(result: dict[str, Any], metric: str) -> tuple[str, str]:
    """("model" or "model-best", why) of a finished run's result.

    The last epoch's network, but where the linear probe was better than it (fine-tuning did not pay), or the best epoch was by
    more than chance: then model-best.
    """
    last, best, word = result.get(metric), result.get(f"best_{metric}"), METRICS[metric]
    if last is None or best is None or not beats(metric, best, last):
        return "model", "the last epoch, and none was better"
    which = "the linear probe" if result["best_epoch"] == -1 else f"epoch {result['best_epoch'] + 1}"
    probe = result.get(f"linear_probe_{metric}", result.get(f"head_{metric}", last))  # its name in version 0.1
    best_said, last_said, probe_said = (write_value(metric, value, sign=" %") for value in (best, last, probe))
    if not beats(metric, probe, last) and not more_than_chance(metric, last, best, result):
        return "model", f"the last epoch; {which} had {word} {best_said}, which may be chance"
    more = f", the linear probe {probe_said}" if beats(metric, probe, last) and result["best_epoch"] >= 0 else ""
    return "model-best", f"{which} had {word} {best_said}, the last epoch {last_said}{more}"


def more_than_chance(metric: str, one: float, other: float, result: dict[str, Any]) -> bool:
    """Whether two values of a metric of a result's images differ by more than chance explains.

    Of numbers, which are no shares, where one of them is outside the 95 % interval of the result.
    """
    if metric in NO_SHARES:
        low, high = result.get("intervals", {}).get(metric, (-math.inf, math.inf))
        return not low <= min(one, other) <= max(one, other) <= high
    return beyond_chance(one, other, result["val_images"])


def beyond_chance(one: float, other: float, images: int) -> bool:
    """Whether two shares of as many images each differ by more than 2 standard errors of their difference (binomial)."""
    return abs(one - other) > 2 * math.sqrt((one * (1 - one) + other * (1 - other)) / images)


def fetch_model(source: str) -> Path:
    """The folder in the Hugging Face cache with a repository's config.json and model.safetensors, fetched if need be."""
    name, _, revision = source.removeprefix(HUB[0]).removeprefix(HUB[1]).partition("@")
    try:
        return fetch_from_hub("/".join(name.split("/")[:2]), FILES, revision or None, newest=True)[0].parent
    except Exception as error:  # no network, no such name, repository or file, a closed door, a full disk
        raise RecipeError(
            f"can't fetch {' and '.join(FILES)} of {source}: {hub_fault(error)}\n"
            "  a copy you have: give the folder with these files"
        ) from error


def read_recipe(run: Path) -> Recipe:
    """The recipe in a run's recipe.json, without the code of its functions."""
    file = run / "recipe.json"
    try:
        return from_dict(read_json(file))
    except (RecipeError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"{file} holds no recipe that can be read here: {error}") from error


def with_functions(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the functions of the run's own recipe.py as its network and, where the name agrees, its images."""
    own, _ = load_recipe(str(run / "recipe.py"))
    if to_dict(own.backbone) != to_dict(recipe.backbone):
        raise RecipeError(f"{run / 'recipe.py'} does not have the network of this run, {to_dict(recipe.backbone)}")
    same_source = to_dict(own.data.source) == to_dict(recipe.data.source)
    source = own.data.source if same_source else recipe.data.source
    return replace(recipe, backbone=own.backbone, data=replace(recipe.data, source=source))


def try_saving(recipe: Recipe, net: nn.Module, preprocessing: dict[str, Any], classes: Sequence[str]) -> None:
    """Save a fresh network and load it again, so that what can't be kept is found out before the training, not after it.

    Raises:
        RecipeError: if it can't be saved or loaded, or then returns other logits of an image.
    """
    name = to_dict(recipe.backbone)
    with tempfile.TemporaryDirectory() as folder, keep_random_state(), torch.no_grad():
        try:
            write_model(Path(folder), net, preprocessing, classes)
            seed_all("again")  # what a constructor draws anew, and no file has, comes out differently
            again = load_network(Path(folder), read_json(Path(folder) / "config.json"), recipe)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # of the folder for temporary files, not of the run's
            raise
        except Exception as error:  # each network fails its own way
            text = first_line(error).replace(folder, "its own file")
            raise RecipeError(f"{name} can't be saved and loaded again: {type(error).__name__}: {text}") from error
        image, logits = torch.rand(1, *recipe.data.test_shape), []
        for network in (net, again):
            seed_all("image")
            layout = memory_format(recipe, net)
            logits.append(network.to(memory_format=layout).eval()(image.contiguous(memory_format=layout)))
    check_logits(recipe, logits[0], 1, len(classes))
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-5, equal_nan=True):
        raise RecipeError(
            f"{name}, saved and loaded again, returns other logits: it computes with values that are neither parameters nor "
            "buffers kept in its state dict; give them to register_buffer"
        )
