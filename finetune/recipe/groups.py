"""Parameter groups and optimizers: which parameters train, how fast, from which epoch, by which optimizer."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

from finetune.recipe.checks import Checked
from finetune.recipe.schedules import Schedule


@dataclass(init=False)
class Optimizer(Checked):
    """An optimizer of torch.optim ("SGD", "AdamW", ...) or of timm's registry ("lamb", ...), with its own options.

    Weight decay never reaches biases, norms and what the model itself names. A step of SGD or AdamW takes learning rate x
    weight decay of each weight, so groups with a lower learning rate decay less.
    """

    name: str
    weight_decay: Annotated[float, "[0, inf)"]
    options: dict[str, Any]

    def __init__(self, name: str, *, weight_decay: float = 0.0, **options: Any):
        self.name, self.weight_decay, self.options = name, weight_decay, options

    def conflicts(self) -> Iterator[str]:
        yield from (f"{key} belongs to the groups" for key in ("lr", "params") if key in self.options)


def AdamW(**options: Any) -> Optimizer:
    """torch.optim.AdamW (arXiv 1711.05101)."""
    return Optimizer("AdamW", **options)


def SGD(**options: Any) -> Optimizer:
    """torch.optim.SGD."""
    return Optimizer("SGD", **options)


@dataclass(frozen=True)
class Group(Checked):
    """A parameter group: parameters whose name starts with a match of `pattern`, and their peak learning rate.

    Rows are tried in order; the last one may take all that is left, with the pattern ".". lr=0 freezes the row for the whole
    run, bit for bit. What a row leaves out is the recipe's:

        Group("head", r"classifier\\.", lr=1e-2, weight_decay=0.0)
        Group("top",  r"layer4\\.",     lr=1e-3, unfreeze_at=2, warmup_epochs=0.5)
        Group("body", r"layer[23]\\.",  lr=1e-3, schedule=Step(every=5, factor=0.9))
        Group("rest", r".",            lr=1e-4, optimizer=SGD(momentum=0.9))
        Group("stem", r"conv1|bn1",    lr=0)
    """

    name: str
    pattern: str
    lr: Annotated[float, "[0, inf)"]
    unfreeze_at: Annotated[int, "[0, inf)", "an epoch"] = 0  # the first in which the row trains
    weight_decay: Annotated[float, "[0, inf)"] | None = None
    schedule: Schedule | None = None
    warmup_epochs: Annotated[float, "[0, inf)"] = 0.0  # linear, from 0.01 of what the schedule says, once the row trains
    optimizer: Optimizer | None = None  # brings its own options and weight decay

    def conflicts(self) -> Iterator[str]:
        if not re.fullmatch(r"[\w-]+", self.name):
            yield f"the name {self.name!r} must consist of letters, digits, '_' and '-'"
        try:
            re.compile(self.pattern)
        except re.error as error:
            yield f"pattern {self.pattern!r} is no regular expression: {error}"
        for field in fields(self):
            if self.lr == 0 and field.default is not MISSING and getattr(self, field.name) != field.default:
                yield f"{field.name} has no effect with lr=0, which freezes the row for the whole run"


@dataclass(frozen=True)
class Lora(Group):
    """Low-rank changes of frozen layers (arXiv 2106.09685): of each Linear and Conv2d whose weight the row's pattern matches.

    All that the row claims stays frozen; beside each layer's weight a change of `rank` trains, which the saved model has added
    to the weight. The change alone is saved as well, in peft's format.

        Lora("attention", r"blocks\\.\\d+\\.attn\\.(qkv|proj)", lr=1e-3, rank=8, alpha=16)
    """

    rank: Annotated[int, "[1, inf)"] = 8
    alpha: Annotated[float, "(0, inf)"] = 16.0  # the change is scaled by alpha / rank
    dropout: Annotated[float, "[0, 1)"] = 0.0  # of the change's input
    start: str | None = None  # a folder in peft's format whose changes to start from

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.lr == 0:
            yield "a Lora row trains: its lr must be above 0; Group(name, pattern, lr=0) freezes layers"


@dataclass(frozen=True, kw_only=True)
class LayerDecay(Checked):
    """Parameter groups made from a timm model's own layers, each layer slower than the one above by the same factor.

    A ratio for the first layer, not the usual factor per layer: 0.75 a layer leaves the stem of ResNet-18 at 0.075 of the
    head's learning rate and ConvNeXt-T's at 0.004. An epoch or more of the head first keeps a random head from bending
    pretrained features (arXiv 2202.10054).
    """

    head_lr: Annotated[float, "(0, inf)"]
    stem_ratio: Annotated[float, "(0, 1]"]  # the first layer's learning rate over the head's
    unfreeze_at: Annotated[int, "[0, inf)", "an epoch"] = 0  # the first in which all but the head trains


@dataclass(frozen=True, kw_only=True)
class Switch(Checked):
    """Another optimizer from an epoch on, without the state of the first; rows with an optimizer of their own keep it.

    SGD wants other learning rates than AdamW: Switch(at=2, optimizer=SGD(momentum=0.9), lr_factor=10.0). Without a switch
    momentum is kept throughout.
    """

    at: int  # an epoch in which a group starts to train
    optimizer: Optimizer
    lr_factor: Annotated[float, "(0, inf)"] = 1.0  # on the peak learning rates of rows without an optimizer of their own


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Checked):
    """Before the first epoch, fit the head to features of the frozen backbone, and go on from there (arXiv 2202.10054).

    A random head would bend pretrained features before it is of use; and the probe's metric is what fine-tuning must beat.
    The fit minimises the recipe's mean loss plus l2 / 2 times the squared weights, for features of mean 0 whose variances
    average 1. Without an l2, it is the one of nine, from 10 to 0.001, with the lowest loss on training images left out.
    """

    views: Annotated[int, "[1, inf)"] = 1  # of each training image: as for evaluation, then augmented
    l2: Annotated[float, "(0, inf)"] | None = None
