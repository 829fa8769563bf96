"""Where every parameter's rate, decay and optimizer are decided; the table that is shown and logged."""

import inspect
import re
from dataclasses import dataclass

import timm
import timm.optim
import torch
from torch import nn

from finetune.recipe import Group, LayerDecay, Recipe, RecipeError
from finetune.recipe_file import nearest


@dataclass(frozen=True)
class ParamGroup:
    """A row of the recipe's table with the parameters it claims: those that decay and those that never do, by name."""

    name: str
    lr: float
    unfreeze_at: int
    decayed: dict[str, nn.Parameter]
    undecayed: dict[str, nn.Parameter]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return self.decayed | self.undecayed


def split_parameters(recipe: Recipe, net: nn.Module) -> list[ParamGroup]:
    """Every parameter of `net` in exactly one group, in the order of the recipe's rows (LayerDecay: from the head down).

    Raises:
        RecipeError: naming every row without a parameter and the parameters without a row.
    """
    rows, owner = layer_rows(recipe, net) if isinstance(recipe.groups, LayerDecay) else matched_rows(recipe, net)
    exempt = {name for name, parameter in net.named_parameters() if is_exempt(name, parameter, net)}
    groups = []
    for row in rows:
        own = {name: parameter for name, parameter in net.named_parameters() if owner[name] == row.name}
        groups.append(ParamGroup(row.name, row.lr, row.unfreeze_at,
                                 decayed={name: own[name] for name in own if name not in exempt},
                                 undecayed={name: own[name] for name in own if name in exempt}))
    return groups


def is_exempt(name: str, parameter: nn.Parameter, net: nn.Module) -> bool:
    """Whether weight decay must leave a parameter alone: biases, norms, layer scales, and what the model itself names.

    The model names position embeddings and class tokens (`no_weight_decay`, by timm's convention). A tensor that is a vector
    but for axes of length 1 is a scale or a token whatever its rank, unless it is a layer's `weight`.
    """
    named = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    vector = sum(size > 1 for size in parameter.shape) <= 1 and name.rpartition(".")[2] != "weight"
    return parameter.ndim <= 1 or vector or name in named


def matched_rows(recipe: Recipe, net: nn.Module) -> tuple[list[Group], dict[str, str]]:
    """The recipe's own rows, and the row of each parameter: the first whose pattern matches the start of its name."""
    names = [name for name, _ in net.named_parameters()]
    owner = {name: next((g.name for g in recipe.groups if re.match(g.pattern, name)), None) for name in names}
    faults = [f"group '{group.name}' (pattern '{group.pattern}') matches no parameter"
              + (" that an earlier row has not taken" if any(re.match(group.pattern, name) for name in names) else "")
              for group in recipe.groups if group.name not in owner.values()]
    left = [name for name in names if owner[name] is None]
    if left:
        faults.append(f"no group matches {len(left)} parameter{'s' * (len(left) > 1)}, the first of them '{left[0]}'")
    if faults:
        faults.append("the model's top-level names are: " + ", ".join(dict.fromkeys(name.split(".")[0] for name in names)))
        raise RecipeError("\n  ".join([f"the recipe's groups do not fit {recipe.backbone}:", *faults]))
    return list(recipe.groups), owner


def layer_rows(recipe: Recipe, net: nn.Module) -> tuple[list[Group], dict[str, str]]:
    """Rows made from a timm model's `group_matcher`: one a layer, the classifier alone on top."""
    decay = recipe.groups
    try:
        layers = timm.models.group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        heads = net.get_classifier()
    except AttributeError:
        raise RecipeError(f"LayerDecay: {recipe.backbone} does not state its layers (timm's group_matcher); "
                          "write the groups as rows, Group(name, pattern, lr=...)") from None
    # By identity: some models' last layer holds pretrained norms beside the classifier, and these are no new head.
    head = {id(p) for module in (heads if isinstance(heads, tuple) else [heads]) for p in module.parameters()}
    names = {name: id(parameter) in head for name, parameter in net.named_parameters()}
    ids = sorted({layers[name] for name in names if not names[name]})
    rank = {layer: position for position, layer in enumerate(ids)}
    rows = [Group("head", "", decay.head_lr, 0)]
    for layer in reversed(ids):
        ratio = decay.stem_ratio ** ((len(ids) - rank[layer]) / len(ids))
        rows.append(Group(f"layer{rank[layer]:02d}", "", decay.head_lr * ratio, decay.unfreeze_at))
    return rows, {name: "head" if names[name] else f"layer{rank[layers[name]]:02d}" for name in names}


def build_optimizer(recipe: Recipe, groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """One optimizer over all groups, frozen ones too; each group's `peak_lr` and decay are set here and nowhere else.

    Raises:
        RecipeError: for an unknown optimizer or an option that it does not have.
    """
    kind = optimizer_class(recipe.optimizer.name)
    accepted = inspect.signature(kind).parameters
    # Some of timm's are torch's with defaults bound: their own names are listed by the class behind.
    known = [name for name in accepted if name not in ("params", "lr", "args", "kwargs")]
    unknown = [name for name in recipe.optimizer.options if name not in known]
    if unknown:
        raise RecipeError(f"optimizer {recipe.optimizer.name} has no option '{unknown[0]}'.{nearest(unknown[0], known)} "
                          f"Its options: {', '.join(known)}")
    if recipe.optimizer.weight_decay and "weight_decay" not in accepted:
        raise RecipeError(f"optimizer {recipe.optimizer.name} knows no weight_decay; leave it out")
    rows = []
    for group in groups:
        for params, decay in ((group.decayed, recipe.optimizer.weight_decay), (group.undecayed, 0.0)):
            if params:
                row = {"name": group.name, "params": list(params.values()), "lr": group.lr, "peak_lr": group.lr}
                rows.append(row | ({"weight_decay": decay} if "weight_decay" in accepted else {}))
    try:
        return kind(rows, lr=rows[0]["lr"], **recipe.optimizer.options)
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise RecipeError(f"optimizer {recipe.optimizer.name} refuses its options: {error}") from error


def optimizer_class(name: str):
    """torch.optim's class of that exact name, or timm's of that registered name."""
    kinds = {n: kind for n, kind in vars(torch.optim).items()
             if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer}
    if name in ("LBFGS", "SparseAdam"):
        reason = "evaluates the loss several times an update" if name == "LBFGS" else "works on sparse gradients only"
        raise RecipeError(f"optimizer {name} {reason}, which this training loop does not offer")
    if name in kinds:
        return kinds[name]
    timm_names = timm.optim.list_optimizers()
    if name not in timm_names:
        raise RecipeError(f"no optimizer '{name}'.{nearest(name, [*kinds, *timm_names])} torch.optim has "
                          f"{', '.join(kinds)}; timm has {', '.join(timm_names)}")
    return timm.optim.get_optimizer_class(name)


def set_rates(optimizer: torch.optim.Optimizer, scale: float) -> dict[str, float]:
    """Give every group its rate for this update; returns the rates by group name, 0 for what is frozen."""
    for row in optimizer.param_groups:
        row["lr"] = row["peak_lr"] * scale
    return {row["name"]: row["lr"] * row["params"][0].requires_grad for row in optimizer.param_groups}


def table(groups: list[ParamGroup], weight_decay: float) -> str:
    """The groups as lines of text: tensors, parameters, peak rate, decay (and how many tensors are spared), first epoch."""
    head = ("group", "tensors", "parameters", "peak lr", "decay", "not decayed", "from epoch")
    rows = [(g.name, f"{len(g.params)}", f"{sum(p.numel() for p in g.params.values()):,}", f"{g.lr:.3g}", f"{weight_decay:g}",
             f"{len(g.undecayed)} of {len(g.params)}", f"{g.unfreeze_at}") for g in groups]
    total = sum(p.numel() for g in groups for p in g.params.values())
    rows.append(("all", f"{sum(len(g.params) for g in groups)}", f"{total:,}", "", "", "", ""))
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
             for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)
