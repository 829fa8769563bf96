"""Images of a recipe: where they come from, and how they are augmented."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from finetune.recipe.checks import Checked
from finetune.recipe.legacy import reads_old_names
from finetune.utils.urls import is_url, url_fault

FOR_PHOTOGRAPHS = ("rotation", "auto_augment", "color_jitter", "grayscale_prob", "gaussian_blur_prob", "erasing")  # of Augment
NAMED_SETS = ("digits", "elpv", "cifar10", "cifar100")  # and "generated", for --smoke
Share = Annotated[float, "(0, 1]", "a share of the area"]
Byte = Annotated[int, "[0, 255]"]
Pixels = Annotated[int, "[1, inf)"]
Positive = Annotated[float, "(0, inf)"]
Sides = tuple[int, int]  # height, width
STEPS = (32, 16, 14, 8)  # pixels by which sizes rise: the first that divides both ends; patches have such sides


def as_sides(size: int | Sides) -> Sides:
    """(height, width) of a size, which may be one number."""
    return size if isinstance(size, tuple) else (size, size)


def step_between(low: int, high: int) -> int:
    """The step in which a side rises; 0 if there is none."""
    return next((step for step in STEPS if low % step == high % step == 0), 0)


def in_pixels(sides: Sides) -> str:
    """Sides in words: "224", or "64 x 256", height first."""
    return " x ".join(str(side) for side in dict.fromkeys(sides))


@dataclass(frozen=True)
class Data(Checked):
    """Where images come from, in which size, and how many make a batch.

    `source` is one of

    - "digits", "elpv", "cifar10", "cifar100" (a folder of that name: "./digits");
    - "torchvision/NAME": Flowers102, DTD, Food101, ...;
    - "hf/OWNER/NAME", "hf/OWNER/NAME:CONFIG" or "hf/PATH", read by the package datasets;
    - a .csv with the columns path, label (several divided by ; or |: loss="multi_label") and, optionally, split, subgroup and
      group; numbers (loss="mse", "huber", "l1") in label, or each in a column label_NAME;
    - the URL of such a table or folder, or of a .zip: s3://, gs://, https://, zip://, hf://;
    - a folder of images: train/CLASS/* and val/CLASS/*, or CLASS/*;
    - a folder of WebDataset's train-*.tar and val-*.tar (KEY.jpg, KEY.cls; class names in classes.txt);
    - a function without arguments that returns (train, validation), two map-style sets of (PIL image, label), the first
      with a list `classes`.
    """

    source: str | Callable[[], Any]
    image_size: Pixels | tuple[Pixels, Pixels]  # of each side of the network's input, or (height, width)
    batch_size: Annotated[int, "[1, inf)"]  # of one step, over all processes
    crop_pct: Annotated[float, "(0, 1]"] | None = None  # share of the resized image that evaluation crops; None: the model's
    sampling: Literal["all", "balanced"] = "all"  # an epoch: every image once, or as many draws, each class as often as any
    on_bad_image: Literal["stop", "skip"] = "stop"  # skip: an image that can't be read is named, counted and left out
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)  # red, green, blue behind what is transparent: white
    test_size: Pixels | tuple[Pixels, Pixels] | None = None  # of images that are evaluated or predicted; None: image_size
    start_size: Pixels | tuple[Pixels, Pixels] | None = None  # in the first epoch, rising to image_size; None: image_size
    resize: Literal["crop", "pad", "squash"] | None = (
        None  # images of another shape: cut, bordered, distorted; None: the model's
    )
    channels: Annotated[int, "[1, inf)"] | None = None  # of arrays; 1 of grey pictures; None: photographs in red, green, blue
    reduced_decode: Annotated[float, "[1, inf)"] | None = None  # JPEGs to train on: decoded to no less than this x image_size
    val_share: Annotated[float, "(0, 1)"] | None = None  # of images without a split of their own; None: a fifth
    folds: Annotated[int, "[2, inf)"] | None = None  # or so many parts, for cross-validation
    fold: Annotated[int, "[0, inf)"] = 0  # which of them validates, counted from 0
    group_pattern: str | None = None  # a regular expression on paths: images for which it finds the same are on one side
    holdout: Annotated[float, "[0, 1)"] = 0.0  # evaluate on this share of the training images instead: to choose options
    holdout_fold: Annotated[int, "[0, inf)"] | None = None  # of parts of that size, the one that is held out, counted from 0

    def conflicts(self) -> Iterator[str]:
        if is_url(self.source) and (fault := url_fault(str(self.source))):
            yield fault
        if self.folds and self.val_share:
            yield "folds and val_share exclude each other: of 5 folds each is a fifth"
        if self.fold and self.fold >= (self.folds or 1):
            yield f"fold={self.fold} is not among folds={self.folds}, which are counted from 0"
        if self.holdout_fold is not None and not 0 <= self.holdout_fold < self.holdout_parts:
            yield (
                f"holdout_fold={self.holdout_fold} is not among the parts of holdout={self.holdout:g}: there are "
                f"{self.holdout_parts}, counted from 0; of 5 each is holdout=0.2"
            )
        if self.reduced_decode and self.channels:
            yield "reduced_decode is for photographs, not for channels"
        if self.reduced_decode and callable(self.source):
            yield "reduced_decode is for files that this library opens, not for what a function returns"
        ends = [*zip(self.start_sides, self.sides, strict=True)] if self.start_size else []
        if ends and (self.start_sides == self.sides or any(low > high for low, high in ends)):
            yield f"start_size={self.start_size} must be below image_size={self.image_size}, to which it rises"
        elif odd := [f"{low} and {high}" for low, high in ends if not step_between(low, high)]:
            steps = f"{', '.join(map(str, STEPS[:-1]))} or {STEPS[-1]}"
            yield f"start_size rises to image_size in steps of {steps} pixels, and none of these divides both {odd[0]}"
        try:
            re.compile(self.group_pattern or "")
        except re.error as error:
            yield f"group_pattern is no regular expression: {error}"

    @property
    def sides(self) -> Sides:
        """(height, width) of the network's input in pixels, in training."""
        return as_sides(self.image_size)

    @property
    def start_sides(self) -> Sides:
        """The same in the first epoch."""
        return as_sides(self.start_size or self.image_size)

    @property
    def test_sides(self) -> Sides:
        """The same in evaluation."""
        return as_sides(self.test_size or self.image_size)

    def sides_in(self, epoch: int, epochs: int) -> Sides:
        """The same in an epoch of so many: from start_size in the first, in a line, to image_size in the last quarter."""
        full = max(1, epochs * 3 // 4)  # the first epoch at image_size

        def side(low: int, high: int) -> int:
            step = step_between(low, high)
            return low + step * round((high - low) * min(epoch, full) / (full * step))

        height, width = map(side, self.start_sides, self.sides) if self.start_size else self.sides
        return height, width

    def shape_of(self, sides: Sides) -> tuple[int, int, int]:
        """(channels, height, width) of images of these sides."""
        return self.channels or 3, *sides

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's input, in training."""
        return self.shape_of(self.sides)

    @property
    def test_shape(self) -> tuple[int, int, int]:
        """The same in evaluation."""
        return self.shape_of(self.test_sides)

    def field_of(self, sides: Sides) -> str:
        """The name of the field that brings images of these sides about."""
        return {self.test_sides: "test_size", self.sides: "image_size"}.get(sides, "start_size")

    @property
    def pixels(self) -> str:
        """The sides in words: "224", or "64 x 256", height first."""
        return in_pixels(self.sides)

    @property
    def sizes(self) -> str:
        """All sizes in words: "64 to 128 px, 160 px in evaluation"."""
        start = f"{in_pixels(self.start_sides)} to " if self.start_size else ""
        test = f", {in_pixels(self.test_sides)} px in evaluation" if self.test_sides != self.sides else ""
        return f"{start}{self.pixels} px{test}"

    @property
    def holdout_parts(self) -> int:
        """Into how many parts of the size of the holdout the training images fall; 0 if it is not one of equal parts."""
        parts = round(1 / self.holdout) if self.holdout > 0 else 0
        return parts if parts and math.isclose(parts * self.holdout, 1, rel_tol=0.01) else 0

    def steps_per_epoch(self, num_images: int) -> int:
        """The steps of an epoch of so many images; the last may have fewer images than the batch."""
        return math.ceil(num_images / self.batch_size)


Probability = Annotated[float, "[0, 1]", "a probability"]
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")  # timm's


@reads_old_names
@dataclass(frozen=True, kw_only=True)
class Augment(Checked):
    """How training images are augmented, in this order, by timm's and torchvision's transforms of these names.

    With mixup and cutmix each step takes one of them. Each image is mixed with its neighbour in the order of the epoch, so
    the pairs are the same on any number of processes.
    """

    function: Callable[[Any, Any], Any] | None = None  # your own, of a PIL image and a numpy Generator: docs/augmentation.md
    rot90: Probability = 0.0  # of a turn by 0, 90, 180 or 270 degrees, each as often
    crop_scale: tuple[Share, Share] = (0.35, 1.0)  # of the area: lowest, highest
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width / height: lowest, highest
    hflip: Probability = 0.5  # of a horizontal flip
    vflip: Probability = 0.0
    rotation: Annotated[float, "[0, 180]"] = 0.0  # by up to so many degrees either way; the corners get the mean colour
    auto_augment: str | None = None  # a policy in timm's notation, "rand-m9-mstd0.5-inc1", or torchvision's "ta_wide"
    color_jitter: Annotated[float, "[0, inf)"] = 0.0  # of brightness, contrast and saturation; beside a policy only with "3a"
    grayscale_prob: Probability = 0.0
    gaussian_blur_prob: Probability = 0.0  # of a sigma from 0.1 to 2 pixels
    erasing: Probability = 0.0  # that a random rectangle becomes noise (arXiv 1708.04896)
    mixup: Annotated[float, "[0, inf)"] = 0.0  # alpha of the Beta distribution (arXiv 1710.09412)
    cutmix: Annotated[float, "[0, inf)"] = 0.0  # likewise (arXiv 1905.04899)
    frozen_views: Annotated[int, "[0, inf)"] = (
        0  # while first layers are frozen, as many augmentations, computed once; 0: new ones
    )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def conflicts(self) -> Iterator[str]:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                yield f"{name} must be (lowest, highest), not {(low, high)}"
        policy = self.auto_augment
        if policy is not None and policy != "ta_wide" and policy.partition("-")[0] not in POLICIES:
            yield (
                f"auto_augment must be 'ta_wide', or start with {', '.join(map(repr, POLICIES[:-1]))} or '3a', as in "
                f"'rand-m9-mstd0.5-inc1', not {policy!r}"
            )
