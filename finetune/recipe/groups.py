"""The rows of a recipe's table: which parameters train, how fast, from which epoch, by which optimizer."""

import math
import re
from dataclasses import dataclass
from typing import Any

from finetune.recipe.checks import broken
from finetune.recipe.schedules import Schedule


@dataclass(frozen=True, init=False)
class Optimizer:
    """An optimizer of torch.optim ("SGD", "AdamW", ...) or of timm's registry ("lamb", ...), with its own options.

    `weight_decay` never reaches biases, norms and what the model itself exempts. An update of SGD or AdamW takes rate x decay
    of each weight, so slower groups decay less.
    """

    name: str
    weight_decay: float
    options: dict[str, Any]

    def __init__(self, name: str, *, weight_decay: float = 0.0, **options: Any):
        for key, value in {"name": name, "weight_decay": weight_decay, "options": options}.items():
            object.__setattr__(self, key, value)

    def faults(self) -> list[str]:
        rules = [(key not in self.options, f"{key} belongs to the groups") for key in ("lr", "params")]
        rules.append((0 <= self.weight_decay < math.inf, f"weight_decay must be 0 or more, not {self.weight_decay}"))
        return broken(rules, "optimizer: ")


def AdamW(**options: Any) -> Optimizer:
    """torch.optim.AdamW (arXiv 1711.05101)."""
    return Optimizer("AdamW", **options)


def SGD(**options: Any) -> Optimizer:
    return Optimizer("SGD", **options)


@dataclass(frozen=True)
class Group:
    """One row of the table: parameters whose name starts with a match of `pattern`, their peak rate, their first epoch.

    The last row may take all that is left, with the pattern ".". The other columns are the recipe's unless they are given:

        Group("head", r"classifier\\.", lr=1e-2, weight_decay=0.0)
        Group("top",  r"layer4\\.",     lr=1e-3, unfreeze_at=2, warmup_epochs=0.5)  # from its first epoch up to its rate
        Group("body", r"layer[23]\\.",  lr=1e-3, schedule=Step(every=5, factor=0.9))  # every 5 epochs times 0.9
        Group("rest", r".",            lr=1e-4, optimizer=SGD(momentum=0.9))

    `warmup_epochs` is a linear rise from 0.01 of what the schedule says. `optimizer` brings its own options and weight decay.
    """

    name: str
    pattern: str
    lr: float
    unfreeze_at: int = 0
    weight_decay: float | None = None
    schedule: Schedule | None = None
    warmup_epochs: float = 0.0
    optimizer: Optimizer | None = None

    def faults(self) -> list[str]:
        rules = [
            (
                0 < self.lr < math.inf,
                f"lr must be a finite number above 0, not {self.lr}; to keep parameters as they are, Frozen(name, pattern)",
            ),
            (self.unfreeze_at >= 0, f"unfreeze_at must be an epoch from 0, not {self.unfreeze_at}"),
            (
                self.weight_decay is None or 0 <= self.weight_decay < math.inf,
                f"weight_decay must be 0 or more, not {self.weight_decay}",
            ),
            (self.warmup_epochs >= 0, f"warmup_epochs must be 0 or more, not {self.warmup_epochs}"),
        ]
        own = [part for part in (self.schedule, self.optimizer) if part is not None]
        faults = broken(rules) + [fault for part in own for fault in part.faults()]
        return name_faults(self) + [f"group '{self.name}': {fault}" for fault in faults]


@dataclass(frozen=True)
class Frozen:
    """A row of parameters that keep their pretrained values, bit for bit, for the whole run: Frozen("stem", r"conv1|bn1")."""

    name: str
    pattern: str

    def faults(self) -> list[str]:
        return name_faults(self)


def name_faults(row: Group | Frozen) -> list[str]:
    """What is wrong with a row's name and pattern."""
    faults = []
    if not re.fullmatch(r"[\w-]+", row.name):
        faults.append(f"group '{row.name}': a name has letters, digits, '_' and '-' only")
    try:
        re.compile(row.pattern)
    except re.error as error:
        faults.append(f"group '{row.name}': pattern {row.pattern!r} is no regular expression: {error}")
    return faults


@dataclass(frozen=True, kw_only=True)
class LayerDecay:
    """The table made from a timm model's own layers: the head at `head_lr`, each layer below it slower by the same factor.

    The first layer's rate is `stem_ratio` times the head's. A ratio, not the usual exponent, because 0.75 a layer leaves the
    stem of ResNet-18 at 0.075 of the head's rate and ConvNeXt-T's at 0.004. The backbone trains from epoch `unfreeze_at`;
    an epoch or more of the head alone first keeps pretrained features from being bent by a random head (arXiv 2202.10054).
    """

    head_lr: float
    stem_ratio: float
    unfreeze_at: int = 0

    def faults(self) -> list[str]:
        rules = [
            (0 < self.head_lr < math.inf, f"head_lr must be a finite number above 0, not {self.head_lr}"),
            (0 < self.stem_ratio <= 1, f"stem_ratio must be above 0 and at most 1, not {self.stem_ratio}"),
            (self.unfreeze_at >= 0, f"unfreeze_at must be an epoch from 0, not {self.unfreeze_at}"),
        ]
        return broken(rules, "groups: ")


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Another optimizer from epoch `at` on, an epoch at which a group unfreezes, without the state of the one before.

    Peak rates are multiplied by `lr_factor`, for SGD wants other rates than AdamW: Switch(at=2, optimizer=SGD(momentum=0.9),
    lr_factor=10.0). Groups with an optimizer of their own keep it and their rates, and start afresh as well. Without a switch
    momentum is kept throughout, whatever the rates do.
    """

    at: int
    optimizer: Optimizer
    lr_factor: float = 1.0

    def faults(self) -> list[str]:
        rules = [(0 < self.lr_factor < math.inf, f"lr_factor must be a finite number above 0, not {self.lr_factor}")]
        return [f"switch: {fault}" for fault in self.optimizer.faults()] + broken(rules, "switch: ")


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Before the first epoch, fit the head alone to the frozen backbone's features, and go on from there (arXiv 2202.10054).

    A random head would bend pretrained features before it is of use; and its score, told first, is what fine-tuning must beat.
    Features are computed once for each of `views` looks at every training image: as it is scored, then varied as for training.
    The fit minimises the recipe's loss plus `l2` / 2 times the squared weights, for features of mean 0 whose variances
    average 1.
    """

    views: int = 1
    l2: float = 0.1

    def faults(self) -> list[str]:
        rules = [
            (self.views >= 1, f"views must be at least 1, not {self.views}"),
            (0 < self.l2 < math.inf, f"l2 must be a finite number above 0, not {self.l2}"),
        ]
        return broken(rules, "linear_probe: ")
