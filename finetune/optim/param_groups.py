"""Parameter groups: every parameter's learning rate, weight decay, first epoch and optimizer."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from torch import nn

from finetune.models.backbone import TimmModel, classifier_parameters
from finetune.optim.lora import add_adapters
from finetune.recipe import Group, LayerDecay, Lora, Optimizer, Recipe, Schedule, Switch
from finetune.recipe.schedules import ramp
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import WIDTH, align_columns, fill_lines

Lrs = dict[str, list[float]]  # of each group, by its name


@dataclass(frozen=True)
class ParamGroup:
    """A row of the recipe with every column filled in, and the parameters it claims, by name.

    `lr` is the peak, 0 for a row that stays frozen, whose `unfreeze_at` is infinite. `weight_decay` is for the parameters
    `decay` alone. `watched_metric` names the validation metric that the schedule is given. Where the recipe switches
    optimizers, `after_switch` is the group from epoch `switch_at` on. `fixed` names parameters that it does not claim, because
    the network itself keeps them still.
    """

    name: str
    lr: float
    unfreeze_at: float
    weight_decay: float
    schedule: Schedule
    watched_metric: str
    warmup_epochs: float
    optimizer: Optimizer
    decay: dict[str, nn.Parameter]
    no_decay: dict[str, nn.Parameter]
    switch_at: float = math.inf
    after_switch: "ParamGroup | None" = None
    fixed: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return self.decay | self.no_decay

    @property
    def num_values(self) -> int:
        """How many numbers its parameters hold."""
        return sum(parameter.numel() for parameter in self.params.values())

    @property
    def ever_trains(self) -> bool:
        return self.unfreeze_at < math.inf

    def trains(self, epoch: int) -> bool:
        """Whether the group trains in that epoch. Asked anew each time, so a resumed run can't remember it wrongly."""
        return epoch >= self.unfreeze_at

    def lr_at(self, step: int, steps_per_epoch: int, epochs: int, history: Sequence[dict[str, Any]] = ()) -> float:
        """The learning rate of `step`, 0 while frozen; `history` has the metrics of each finished epoch."""
        now = self.after_switch if self.after_switch and step // steps_per_epoch >= self.switch_at else self
        return now.lr * self.lr_factor(step, steps_per_epoch, epochs, history)

    def lr_factor(self, step: int, steps_per_epoch: int, epochs: int, history: Sequence[dict[str, Any]] = ()) -> float:
        """The learning rate of `step` as a share of the peak."""
        if not self.trains(step // steps_per_epoch):
            return 0.0
        scale = self.schedule.scale(step, steps_per_epoch, epochs, [row[self.watched_metric] for row in history])
        warmup = round(self.warmup_epochs * steps_per_epoch)
        return scale * ramp(step - self.unfreeze_at * steps_per_epoch, warmup, start=0.01)


def build_param_groups(recipe: Recipe, net: nn.Module) -> list[ParamGroup]:
    """Every parameter of `net` in exactly one group, in the order of the recipe's rows (LayerDecay: from the head down).

    What the network itself made with requires_grad=False stays as it is, unless a row names such parameters alone.

    Raises:
        RecipeError: naming every row without a parameter and the parameters without a row.
    """
    if isinstance(recipe.groups, LayerDecay):
        rows, owner = layer_rows(recipe, recipe.groups, net)
    else:
        rows, owner = matched_rows(recipe, recipe.groups, net)
        if any(isinstance(row, Lora) for row in rows):
            rows, owner = lora_rows(recipe, rows, owner, net)
    undecayed, fixed, groups = no_weight_decay(net), fixed_parameters(net), []
    for row in rows:
        own = {name: parameter for name, parameter in net.named_parameters() if owner[name] == row.name}
        still = own.keys() & fixed
        if still == own.keys() and not isinstance(recipe.groups, LayerDecay):
            still = set()
        optimizer, schedule = row.optimizer or recipe.optimizer, row.schedule or recipe.schedule
        group = ParamGroup(
            name=row.name,
            lr=row.lr * recipe.lr_scale,
            unfreeze_at=row.unfreeze_at if row.lr else math.inf,
            weight_decay=optimizer.weight_decay if row.weight_decay is None else row.weight_decay,
            schedule=schedule.toward(recipe.metric),
            watched_metric=schedule.watched_metric(recipe.metric),
            warmup_epochs=row.warmup_epochs,
            optimizer=optimizer,
            decay={name: own[name] for name in own if name not in undecayed | still},
            no_decay={name: own[name] for name in own if name in undecayed - still},
            fixed=tuple(name for name in own if name in still),
        )
        groups.append(with_switch(group, row, recipe.switch) if recipe.switch else group)
    return groups


def with_switch(group: ParamGroup, row: Group, switch: Switch) -> ParamGroup:
    """The group with what it becomes at the recipe's switch; a row with an optimizer of its own keeps all of it."""
    after = group
    if row.optimizer is None:
        decay = switch.optimizer.weight_decay if row.weight_decay is None else row.weight_decay
        after = replace(group, lr=group.lr * switch.lr_factor, optimizer=switch.optimizer, weight_decay=decay)
    return replace(group, switch_at=switch.at, after_switch=after)


def fixed_parameters(net: nn.Module) -> set[str]:
    """The parameters that the network itself made with requires_grad=False, as it was when this was first asked."""
    own = vars(net)
    if "made_fixed" not in own:  # later a stage may have frozen others
        own["made_fixed"] = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    return own["made_fixed"]


def no_weight_decay(net: nn.Module) -> set[str]:
    """The parameters without weight decay: biases, norms, layer scales, and what the model itself names.

    The model names position embeddings and class tokens, or gives patterns as of files (`no_weight_decay`, timm's convention).
    A tensor that is a vector but for axes of length 1 is a scale or a token whatever its rank, unless it is a layer's `weight`.
    """
    patterns: set[str] = getattr(net, "no_weight_decay", set)()  # asked once: some walk the whole network for it

    def is_vector(name: str, shape: torch.Size) -> bool:
        return len(shape) <= 1 or (sum(size > 1 for size in shape) <= 1 and name.rpartition(".")[2] != "weight")

    def is_named(name: str) -> bool:
        return name in patterns or any(fnmatch(name, pattern) for pattern in patterns)

    return {name for name, parameter in net.named_parameters() if is_named(name) or is_vector(name, parameter.shape)}


def matched_rows(recipe: Recipe, groups: Sequence[Group], net: nn.Module) -> tuple[Sequence[Group], dict[str, str]]:
    """The recipe's own rows, and the row of each parameter: the first whose pattern matches the start of its name."""
    names = [name for name, _ in net.named_parameters()]
    owner = {name: next((row.name for row in groups if re.match(row.pattern, name)), "") for name in names}
    faults = [
        f"group '{row.name}' (pattern '{row.pattern}') matches no parameter"
        + (" that an earlier row has not taken" if any(re.match(row.pattern, name) for name in names) else "")
        for row in groups
        if row.name not in owner.values()
    ]
    left = [name for name in names if not owner[name]]
    if left:
        faults.append(f"no group matches {len(left)} parameter{'s' * (len(left) > 1)}, the first of them '{left[0]}'")
    if faults:
        faults.append("the model's top-level names are: " + ", ".join(dict.fromkeys(name.split(".")[0] for name in names)))
        raise RecipeError("\n  ".join([f"the recipe's groups do not fit {to_dict(recipe.backbone)}:", *faults]))
    return groups, owner


def lora_rows(
    recipe: Recipe, groups: Sequence[Group], owner: dict[str, str], net: nn.Module
) -> tuple[Sequence[Group], dict[str, str]]:
    """The rows with one more after each Lora row, of the weights that it freezes, once its layers have their adapters."""
    loras = {row.name: row for row in groups if isinstance(row, Lora)}
    add_adapters(net, {name: loras[row] for name, row in owner.items() if row in loras}, recipe.seed)
    rows = [part for row in groups for part in ([row, Group(f"{row.name}-frozen", "", lr=0)] if row.name in loras else [row])]
    _, owner = matched_rows(recipe, groups, net)
    return rows, {name: f"{row}-frozen" if row in loras and ".lora." not in name else row for name, row in owner.items()}


def layer_rows(recipe: Recipe, decay: LayerDecay, net: TimmModel) -> tuple[Sequence[Group], dict[str, str]]:
    """Rows made from a timm model's `group_matcher`: one a layer, the classifier by itself on top."""
    try:
        layers = timm.models.group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        head = classifier_parameters(net)
    except AttributeError:
        raise RecipeError(
            f"LayerDecay: {to_dict(recipe.backbone)} does not state its layers (timm's group_matcher); "
            "write the groups as rows, Group(name, pattern, lr=...)"
        ) from None
    ids = sorted({layers[name] for name, _ in net.named_parameters() if name not in head})
    names = {layer: f"layer{rank:02d}" for rank, layer in enumerate(ids)}
    rows = [Group("head", "", decay.head_lr)]
    for distance, layer in enumerate(reversed(ids), 1):  # from the head
        lr = decay.head_lr * decay.stem_ratio ** (distance / len(ids))
        rows.append(Group(names[layer], "", lr, decay.unfreeze_at))
    return rows, {name: "head" if name in head else names[layers[name]] for name, _ in net.named_parameters()}


def set_lrs(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[ParamGroup],
    step: int,
    steps_per_epoch: int,
    epochs: int,
    history: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Give every group its learning rate for `step`; returns them by group name, 0 for what is frozen."""
    lrs = {group.name: group.lr_at(step, steps_per_epoch, epochs, history) for group in groups}
    for row in optimizer.param_groups:
        row["lr"] = lrs[row["name"]]
    return lrs


def planned_lrs(groups: Sequence[ParamGroup], steps: Sequence[int], steps_per_epoch: int, epochs: int) -> Lrs:
    """Every group's learning rate at these steps, 0 while it is frozen. A metric, not known yet, is taken never to stall."""
    return {group.name: [group.lr_at(step, steps_per_epoch, epochs) for step in steps] for group in groups}


def sampled_steps(start: int, stop: int, most: int = 2000) -> range:
    """The steps whose learning rates are shown or drawn: all of a short run, evenly spaced ones of a long one."""
    return range(start, stop, math.ceil((stop - start) / most))


def describe_param_groups(groups: Sequence[ParamGroup], steps_per_epoch: int, epochs: int, wide: bool = True) -> str:
    """The table of groups, and after it the one from a switch of optimizers on; unless `wide`, in 80 columns."""
    switch_at = int(min(epochs, groups[0].switch_at))
    text = param_group_table(groups, lrs_between(groups, 0, switch_at, steps_per_epoch, epochs), wide)
    if switch_at < epochs:
        after = [group.after_switch or group for group in groups]
        lrs = lrs_between(groups, switch_at, epochs, steps_per_epoch, epochs)
        text += f"\n\nfrom epoch {switch_at + 1}:\n{param_group_table(after, lrs, wide)}"
    if fixed := [name for group in groups for name in group.fixed]:
        text += "\n\n" + fill_lines(f"kept still by the network itself (requires_grad=False): {', '.join(fixed)}")
    return text


def lrs_between(groups: Sequence[ParamGroup], start: int, stop: int, steps_per_epoch: int, epochs: int) -> Lrs:
    """Each group's learning rates in the epochs from `start` to before `stop`, without those that are 0."""
    steps = sorted({*sampled_steps(start * steps_per_epoch, stop * steps_per_epoch), stop * steps_per_epoch - 1})
    return {name: [lr for lr in lrs if lr] for name, lrs in planned_lrs(groups, steps, steps_per_epoch, epochs).items()}


def param_group_table(groups: Sequence[ParamGroup], lrs: Lrs, wide: bool) -> str:
    """The groups as lines of text, with the first, the highest and the last of each one's `lrs`, which are all above 0.

    Epochs count from 1, as everywhere in print: a group with unfreeze_at=1 trains from epoch 2 on.
    """
    head = "group, tensors, parameters, first lr, peak lr, last lr, weight decay, without decay, optimizer, from epoch"
    rows: list[Sequence[str]] = [head.split(", ")]
    for group in groups:
        cells = [*["-"] * 5, "frozen", "never"]
        if own := lrs[group.name]:
            cells = [f"{lr:.2g}" for lr in (own[0], max(own), own[-1])]
            cells += [f"{group.weight_decay:g}", f"{len(group.no_decay)} of {len(group.params)}"]
            cells += [group.optimizer.name, f"{group.unfreeze_at + 1}"]
        rows.append([group.name, f"{len(group.params)}", f"{group.num_values:,}", *cells])
    tensors, values = sum(len(group.params) for group in groups), sum(group.num_values for group in groups)
    rows.append(("all", f"{tensors}", f"{values:,}", *[""] * 7))
    if not wide:
        rows = [[row[i] for i in (0, 2, 4, 6, 8, 9)] for row in rows]
    return align_columns(rows, numbers=True, width=math.inf if wide else WIDTH)
