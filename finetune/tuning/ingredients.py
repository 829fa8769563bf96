"""The runs of a soup: whether they can be averaged, their networks, and any mean of these on images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.data.dataset import ImageData, changed_files, file_rows, fingerprint, labels_of
from finetune.data.folders import class_difference
from finetune.data.loader import ImageDataset, epoch_batches, load_batches
from finetune.data.sources import load_data, whole_data
from finetune.data.split import held_out
from finetune.metrics.compute import compute_metrics
from finetune.metrics.numbers import to_grades
from finetune.models.backbone import build_backbone, memory_format
from finetune.models.batch_norm import has_statistics, recompute_statistics
from finetune.models.linear_probe import Units, give_units, head_layer, standardise
from finetune.models.pretrained import INPUTS, pretrained_state
from finetune.models.saved import find_model, load_model
from finetune.models.saving import plain_head
from finetune.optim.average import mean_state
from finetune.optim.loss import Criterion
from finetune.recipe import Recipe
from finetune.recipe.load import override, recipe_of_run
from finetune.recipe.serialize import to_dict
from finetune.training.evaluate import predict_logits
from finetune.training.loop import fit_linear_probe
from finetune.training.run_dir import started, weights_digest
from finetune.training.setup import DEFAULTS, build_datasets
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json
from finetune.utils.seed import seed_all
from finetune.utils.text import note

State = dict[str, Any]
Logits = tuple[torch.Tensor, torch.Tensor]  # logits [n, classes] and labels


@dataclass(frozen=True)
class Runs:
    """Finished runs of one kind: their names, the network that each one says is to be used, and the recipe of the first."""

    names: list[str]
    used: list[str]  # "model" or "model-best"
    recipe: Recipe
    net: nn.Module
    states: list[State]
    classes: tuple[str, ...]
    units: Units | None  # of numbers: those of the training images, the same for all
    records: list[Path]  # the tables of their files
    images: dict[str, str]  # the fingerprints of their training and validation images
    weights: str  # a digest of the file of weights that they started from; "" for other weights


def read_runs(folders: Sequence[Path], data: str | None = None) -> Runs:
    """The runs in these folders; `data` is where their images lie now.

    Raises:
        RecipeError: if they are not finished runs of one network, with the same start, classes, preprocessing and images.
    """
    names = [folder.resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [str(folder) for folder in folders]
    if twice := [folder for i, folder in enumerate(folders) if folder.resolve() in [one.resolve() for one in folders[:i]]]:
        raise RecipeError(f"{twice[0]} is named twice: name each run once")
    for folder in folders:
        if not (folder / "recipe.json").is_file() or not (folder / "result.json").is_file():
            raise RecipeError(f"{folder} is no finished run: a soup is made of finished runs' folders")
        if read_json(folder / "result.json").get("smoke"):
            raise RecipeError(f"{folder} is a smoke run, on generated images: there is nothing to average")
    kinds = [kind_of_run(folder) for folder in folders]
    for folder, kind in zip(folders[1:], kinds[1:], strict=True):
        if differing := [what for what in kind if kind[what] != kinds[0][what]]:
            one, other = kinds[0][differing[0]], kind[differing[0]]
            how = f"{one} and {other}"
            if differing[0] == "classes":
                alone = class_difference(one, other, (f"in {folders[0].name}", f"in {folder.name}"))
                how = alone if {*one} != {*other} else "the same in another order"
            raise RecipeError(f"{folder} can't be averaged with {folders[0]}, as their {differing[0]} differ: {how}")
    models = [load_model(folder) for folder in folders]
    states = [{name: copied(value) for name, value in model.net.state_dict().items()} for model in models]
    if len(states) > 1 and all(same_state(states[0], state) for state in states[1:]):
        note("the networks of these runs are the same one, such as the linear probe of each: their average is no other")
    recipe, _, _ = recipe_of_run(folders[0])
    if data:
        recipe = override(recipe, [f"data.source={data!r}"])
    if recipe.mixed_precision == "fp16" and not torch.accelerator.is_available():
        recipe = replace(recipe, mixed_precision="no")
    return Runs(
        names,
        [find_model(folder)[0].name for folder in folders],
        recipe,
        models[0].net,
        states,
        models[0].classes,
        models[0].units,
        [folder / "images.csv" for folder in folders],
        started(folders[0]).get("images", {}),
        started(folders[0]).get("weights", ""),
    )


def copied(value: Any) -> Any:
    """A tensor's own copy on the CPU; anything else as it is."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def same_state(one: State, other: State) -> bool:
    """Whether two states have the same tensors."""
    return all(torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, torch.Tensor))


def kind_of_run(folder: Path) -> dict[str, Any]:
    """What runs must have in common to be averaged, by what it is called."""
    recipe, config, begun = read_json(folder / "recipe.json"), read_json(find_model(folder)[0] / "config.json"), started(folder)
    inputs = config.get("preprocessing") or {key: config["pretrained_cfg"].get(key) for key in INPUTS}
    own, _, _ = recipe_of_run(folder)
    return {
        "networks": recipe["backbone"],
        "pretrained weights": recipe["weights"],
        "files of pretrained weights": begun.get("weights") or weights_digest(own),
        "classes": config.get("label_names"),
        "preprocessing": inputs,
        "losses": own.loss,
        "metrics": own.metric,
        "held-out shares": own.data.holdout,
        "training images": begun.get("images", {}).get("training"),
        "validation images": begun.get("images", {}).get("validation"),
    }


@dataclass
class Pot:
    """The runs' states, the images to choose and to measure on, and one network that is given any mean of the states."""

    recipe: Recipe
    net: nn.Module
    states: list[State]  # of the runs, and last of their start, where it has a part
    train: ImageDataset  # to compute statistics and the start from
    measure: ImageDataset
    choose: ImageDataset | None
    accelerator: Accelerator
    whole: ImageData  # what `train` and `measure` read
    units: Units | None = None  # of numbers, which the states give as they are
    kept: dict[tuple[float, ...], Logits] = field(default_factory=dict)
    at: tuple[float, ...] = ()  # the shares that the network has now

    def mean(self, shares: Sequence[float]) -> nn.Module:
        """The network with the mean of the states, weighed by `shares`, those left out 0, and statistics of its own."""
        shares = (*shares, *[0.0] * (len(self.states) - len(shares)))
        if shares == self.at:
            return self.net
        self.at = shares
        self.net.load_state_dict(mean_state(self.states, shares))
        parts = [state for state, share in zip(self.states, shares, strict=True) if share]
        if names := moved_norms(self.net, parts):
            note(f"the statistics of {len(names)} batch norms differ between the runs: computed anew on the training images")
            last = self.recipe.epochs - 1  # whose images have their full size
            batches = load_batches(self.train, last, epoch_batches(self.recipe, self.train, last), 0, self.accelerator.device)
            recompute_statistics(self.net, names, (part[0] for batch in batches for part in batch.micro_batches))
        return self.net

    def logits(self, images: ImageDataset, shares: Sequence[float], text: str) -> Logits:
        """The logits of that mean, and the labels; computed once."""
        key = (id(images), *shares, *[0.0] * (len(self.states) - len(shares)))
        if key not in self.kept:
            self.kept[key] = predict_logits(self.recipe, self.mean(shares), images, self.accelerator, DEFAULTS, text=text)
        return self.kept[key]

    def score(self, shares: Sequence[float], text: str) -> float:
        """The recipe's metric of that mean on the images to choose on."""
        assert self.choose is not None  # asked for by the caller
        return self.value(*self.logits(self.choose, shares, text))

    def value(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        """The recipe's metric of these logits."""
        return float(compute_metrics(self.recipe, logits, labels, self.units)[self.recipe.metric])

    def judged(self, logits: torch.Tensor) -> torch.Tensor:
        """What two networks are compared by: their logits, or of numbers that are grades the grades."""
        grades = to_grades(logits, self.units)
        return logits if grades is None else grades


def fill_pot(runs: Runs, accelerator: Accelerator, choosing: bool) -> Pot:
    """The runs with their images: those to measure on have no part in a choice.

    Runs with held-out training images choose on these, and are measured on the validation images of their source. Others are
    measured on all validation images, or where something is chosen, on one half of them, drawn by name, the other to choose on.

    Raises:
        RecipeError: if the images are not those of the runs.
    """
    recipe = runs.recipe
    data, where = load_data(recipe), str(to_dict(recipe.data.source))
    for part, images in (("training", data.train), ("validation", data.val)):
        if runs.images.get(part, now := fingerprint(images, data.classes)) != now:
            had, has = (text.partition(" ")[0] for text in (runs.images[part], now))
            raise RecipeError(
                f"the {part} images of {where} are not those of the runs ({had} then, {has} now, by names and labels): put "
                "them back, or say where they lie now: --data DIR"
            )
    rows = file_rows(data.train, data.val, data.classes)
    if changed := [file for record in runs.records for file in changed_files(record, rows)]:
        raise RecipeError(
            f"{len({*changed})} images have another content than the runs had, such as {changed[0]}: put them back"
        )
    choose, measure = data.val, data.val
    if recipe.data.holdout:
        measure = whole_data(recipe).val
    elif choosing:
        half = held_out(
            ImageData(data.val, data.val, data.classes), replace(recipe.data, holdout=0.5, holdout_fold=None), where
        )
        choose, measure = half.val, half.train
    net = runs.net.to(accelerator.device).to(memory_format=memory_format(recipe, runs.net))
    whole = ImageData(data.train, measure, data.classes)
    train, measured = build_datasets(recipe, net, whole)
    chosen = build_datasets(recipe, net, replace(whole, val=choose))[1] if choosing else None
    if runs.units:  # saved networks give numbers as they are
        zeros = (0.0,) * len(runs.classes)
        give_units(head_layer(recipe, net), Units(zeros, tuple(one + 1 for one in zeros)))
    return Pot(recipe, net, list(runs.states), train, measured, chosen, accelerator, whole, runs.units)


def moved_norms(net: nn.Module, states: Sequence[State]) -> list[str]:
    """The names of the batch norms whose statistics differ between states: their mean is that of no network.

    Raises:
        RecipeError: for another buffer that differs, which can't be computed anew.
    """
    floats = [name for name, buffer in net.named_buffers() if buffer.is_floating_point() and name in states[0]]
    moved = [name for name in floats if any(not torch.equal(state[name], states[0][name]) for state in states[1:])]
    owners = {name: net.get_submodule(name.rpartition(".")[0]) for name in moved}
    for name, module in owners.items():
        if not (has_statistics(module) and isinstance(module, _BatchNorm)):
            raise RecipeError(f"{name} differs between the runs and is no weight: its mean means nothing, and no soup is made")
    return list(dict.fromkeys(name.rpartition(".")[0] for name in moved))


def start_state(pot: Pot) -> State:
    """What each run started to fine-tune from, computed again: the pretrained weights under the linear probe's head.

    Raises:
        RecipeError: if the pretrained weights are not those that the runs had.
    """
    recipe = pot.recipe
    state = pretrained_state(recipe)
    seed_all(recipe.seed)
    net = build_backbone(recipe, len(pot.train.classes), state).to(pot.accelerator.device)
    if recipe.of_numbers:
        standardise(recipe, net, labels_of(pot.whole.train), pot.whole.classes)
    criterion = Criterion(recipe, net, pot.train, pot.accelerator.device)
    fit_linear_probe(recipe, net, criterion, (pot.train, pot.measure), pot.accelerator, DEFAULTS)
    with plain_head(net):
        found = {name: copied(value) for name, value in net.state_dict().items()}
    if found.keys() != pot.states[0].keys():
        raise RecipeError(f"--toward pretrained: {to_dict(recipe.backbone)} starts with other tensors than the runs saved")
    return found
