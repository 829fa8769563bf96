"""Where every parameter's rate, decay and optimizer are decided; the table that is shown and logged."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from finetune.models.backbone import TimmModel, classifier_parameters
from finetune.recipe import Frozen, Group, LayerDecay, Optimizer, Recipe, Schedule
from finetune.recipe.schedules import ramp
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import align_columns


@dataclass(frozen=True)
class ParamGroup:
    """A row of the recipe's table with every column filled in, and the parameters it claims, by name.

    `weight_decay` is for the parameters `decayed` alone. `unfreeze_at` is infinite for a row that stays frozen. `watches` names
    the validation score that the schedule is handed.
    """

    name: str
    lr: float
    unfreeze_at: float
    weight_decay: float
    schedule: Schedule
    watches: str
    warmup_epochs: float
    optimizer: Optimizer
    decayed: dict[str, nn.Parameter]
    undecayed: dict[str, nn.Parameter]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return self.decayed | self.undecayed

    @property
    def ever_trains(self) -> bool:
        return self.unfreeze_at < math.inf

    def trains(self, epoch: int) -> bool:
        """Whether the group trains in that epoch. Asked anew each time, so a resumed run can't remember it wrongly."""
        return epoch >= self.unfreeze_at

    def rate(self, step: int, steps_per_epoch: int, epochs: int, scored: Sequence[dict[str, Any]] = ()) -> float:
        """The learning rate of update `step`, 0 while frozen; `scored` has a row of scores for each finished epoch."""
        return self.lr * self.multiplier(step, steps_per_epoch, epochs, scored) if self.ever_trains else 0.0

    def multiplier(self, step: int, steps_per_epoch: int, epochs: int, scored: Sequence[dict[str, Any]] = ()) -> float:
        """What part of `lr` is the rate of update `step`."""
        if not self.trains(step // steps_per_epoch):
            return 0.0
        scale = self.schedule.scale(step, steps_per_epoch, epochs, [row[self.watches] for row in scored])
        warmup = round(self.warmup_epochs * steps_per_epoch)
        return scale * ramp(step - self.unfreeze_at * steps_per_epoch, warmup, start=0.01)


def build_param_groups(recipe: Recipe, net: nn.Module, epoch: int = 0) -> list[ParamGroup]:
    """Every parameter of `net` in exactly one group, in the order of the recipe's rows (LayerDecay: from the head down).

    The groups are those of the recipe as it holds in `epoch`.

    Raises:
        RecipeError: naming every row without a parameter and the parameters without a row.
    """
    recipe = recipe.at(epoch)
    if isinstance(recipe.groups, LayerDecay):
        rows, owner = layer_rows(recipe, recipe.groups, net)
    else:
        rows, owner = matched_rows(recipe, recipe.groups, net)
    exempt, groups = no_weight_decay(net), []
    for row in rows:
        own = {name: parameter for name, parameter in net.named_parameters() if owner[name] == row.name}
        groups.append(
            make_param_group(
                row,
                recipe,
                decayed={name: own[name] for name in own if name not in exempt},
                undecayed={name: own[name] for name in own if name in exempt},
            )
        )
    return groups


def make_param_group(
    row: Group | Frozen, recipe: Recipe, decayed: dict[str, nn.Parameter], undecayed: dict[str, nn.Parameter]
) -> ParamGroup:
    """A row with the recipe's values in the columns that it leaves open."""
    unfreeze_at = math.inf if isinstance(row, Frozen) else row.unfreeze_at
    if isinstance(row, Frozen):
        row = Group(row.name, row.pattern, lr=math.inf)
    optimizer, schedule = row.optimizer or recipe.optimizer, row.schedule or recipe.schedule
    decay = optimizer.weight_decay if row.weight_decay is None else row.weight_decay
    return ParamGroup(
        row.name,
        row.lr,
        unfreeze_at,
        decay,
        schedule,
        schedule.watches(recipe.metric),
        row.warmup_epochs,
        optimizer,
        decayed,
        undecayed,
    )


def no_weight_decay(net: nn.Module) -> set[str]:
    """The parameters that weight decay must leave alone: biases, norms, layer scales, and what the model itself names.

    The model names position embeddings and class tokens (`no_weight_decay`, by timm's convention). A tensor that is a vector
    but for axes of length 1 is a scale or a token whatever its rank, unless it is a layer's `weight`.
    """
    named: set[str] = getattr(net, "no_weight_decay", set)()  # asked once: some walk the whole network for it

    def is_vector(name: str, shape: torch.Size) -> bool:
        return len(shape) <= 1 or (sum(size > 1 for size in shape) <= 1 and name.rpartition(".")[2] != "weight")

    return {name for name, parameter in net.named_parameters() if name in named or is_vector(name, parameter.shape)}


def matched_rows(
    recipe: Recipe, groups: Sequence[Group | Frozen], net: nn.Module
) -> tuple[Sequence[Group | Frozen], dict[str, str]]:
    """The recipe's own rows, and the row of each parameter: the first whose pattern matches the start of its name."""
    names = [name for name, _ in net.named_parameters()]
    owner = {name: next((g.name for g in groups if re.match(g.pattern, name)), "") for name in names}
    faults = [
        f"group '{group.name}' (pattern '{group.pattern}') matches no parameter"
        + (" that an earlier row has not taken" if any(re.match(group.pattern, name) for name in names) else "")
        for group in groups
        if group.name not in owner.values()
    ]
    left = [name for name in names if not owner[name]]
    if left:
        faults.append(f"no group matches {len(left)} parameter{'s' * (len(left) > 1)}, the first of them '{left[0]}'")
    if faults:
        faults.append("the model's top-level names are: " + ", ".join(dict.fromkeys(name.split(".")[0] for name in names)))
        raise RecipeError("\n  ".join([f"the recipe's groups do not fit {to_dict(recipe.backbone)}:", *faults]))
    return groups, owner


def layer_rows(recipe: Recipe, decay: LayerDecay, net: TimmModel) -> tuple[Sequence[Group | Frozen], dict[str, str]]:
    """Rows made from a timm model's `group_matcher`: one a layer, the classifier alone on top."""
    try:
        layers = timm.models.group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        head = classifier_parameters(net)
    except AttributeError:
        raise RecipeError(
            f"LayerDecay: {to_dict(recipe.backbone)} does not state its layers (timm's group_matcher); "
            "write the groups as rows, Group(name, pattern, lr=...)"
        ) from None
    ids = sorted({layers[name] for name, _ in net.named_parameters() if name not in head})
    rank = {layer: position for position, layer in enumerate(ids)}
    rows = [Group("head", "", decay.head_lr, 0)]
    for layer in reversed(ids):
        ratio = decay.stem_ratio ** ((len(ids) - rank[layer]) / len(ids))
        rows.append(Group(f"layer{rank[layer]:02d}", "", decay.head_lr * ratio, decay.unfreeze_at))
    return rows, {name: "head" if name in head else f"layer{rank[layers[name]]:02d}" for name, _ in net.named_parameters()}


def set_lrs(
    optimizer: torch.optim.Optimizer,
    groups: list[ParamGroup],
    step: int,
    steps_per_epoch: int,
    epochs: int,
    scored: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Give every group its rate for update `step`; returns the rates by group name, 0 for what is frozen."""
    rates = {group.name: group.rate(step, steps_per_epoch, epochs, scored) for group in groups}
    for row in optimizer.param_groups:
        row["lr"] = rates[row["name"]]
    return rates


def table(groups: list[ParamGroup], rates: Mapping[str, Sequence[float]]) -> str:
    """The groups as lines of text, with the first, the highest and the last of each one's `rates`, which are all above 0."""
    rows: list[tuple[str, ...]] = [
        ("group", "tensors", "parameters", "first lr", "peak lr", "last lr", "decay", "not decayed", "optimizer", "from epoch")
    ]
    for group in groups:
        size = (group.name, f"{len(group.params)}", f"{sum(p.numel() for p in group.params.values()):,}")
        if reached := rates[group.name]:
            rows.append(
                (
                    *size,
                    *(f"{rate:.2g}" for rate in (reached[0], max(reached), reached[-1])),
                    f"{group.weight_decay:g}",
                    f"{len(group.undecayed)} of {len(group.params)}",
                    group.optimizer.name,
                    f"{group.unfreeze_at}",
                )
            )
        else:
            rows.append((*size, *["-"] * 5, "frozen", "never"))
    everything = [p.numel() for group in groups for p in group.params.values()]
    rows.append(("all", f"{len(everything)}", f"{sum(everything):,}", *[""] * 7))
    return align_columns(rows, numbers=True)


def param_group_tables(recipe: Recipe, net: nn.Module, num_images: int) -> str:
    """The table of groups, and the one after a switch of optimizers."""
    begun = sorted({0, recipe.optimizer_begins(recipe.epochs)})
    updates = recipe.data.updates(num_images)
    texts = []
    for start, stop in zip(begun, [*begun[1:], recipe.epochs], strict=True):
        groups = build_param_groups(recipe, net, start)
        steps = sorted({*shown_steps(start * updates, stop * updates), stop * updates - 1})
        rates = {group.name: [rate for step in steps if (rate := group.rate(step, updates, recipe.epochs))] for group in groups}
        texts.append((f"from epoch {start}:\n" if start else "") + table(groups, rates))
    return "\n\n".join(texts)


def planned_lrs(recipe: Recipe, net: nn.Module, steps: Sequence[int], steps_per_epoch: int) -> dict[str, list[float]]:
    """Every group's rate at the updates `steps`, 0 while it is frozen. Scores, not known yet, are taken never to stall."""
    found: dict[str, list[float]] = {}
    groups = {begun: build_param_groups(recipe, net, begun) for begun in {0, recipe.optimizer_begins(recipe.epochs)}}
    for step in steps:
        for group in groups[recipe.optimizer_begins(step // steps_per_epoch)]:
            found.setdefault(group.name, []).append(group.rate(step, steps_per_epoch, recipe.epochs))
    return found


def shown_steps(start: int, stop: int, most: int = 2000) -> range:
    """The updates whose rates are looked at or drawn: all of a short run, evenly spaced ones of a long one."""
    return range(start, stop, math.ceil((stop - start) / most))
