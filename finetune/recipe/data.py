"""The images of a recipe: where they come from, and how those for training are varied."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from finetune.recipe.checks import broken


@dataclass(frozen=True)
class Data:
    """Where images come from, and in which size and number they arrive.

    `source`: "digits", "elpv", "cifar10", "cifar100"; "torchvision/NAME" (Flowers102, DTD, Food101, ...); "hf/OWNER/NAME",
    "hf/OWNER/NAME:CONFIG" or "hf/PATH", read by the package datasets; a .csv with the columns path, label (several divided by
    ; or |: loss="multi_label") and, if you like, split; a folder of images, or of WebDataset's train-*.tar and val-*.tar
    (KEY.jpg, KEY.cls; class names in classes.txt); or a function without arguments that returns (train, validation), two
    map-style sets of (PIL image, label), the first with a list `classes`. `batch_size` is the batch of one update over ALL
    processes. `crop_pct`: evaluation crops this share of the resized image; None is the model's own. `sampling`: an epoch is
    every image once ("all"), or as many drawn with replacement so that each class comes as often as any other ("balanced").
    `holdout`: train without this share of each class of the training images, and score those in place of the validation images:
    for choosing rates and the like. `on_bad_image`: an image that can't be read stops the run ("stop") or is named, counted and
    left out ("skip").
    """

    source: str | Callable[[], Any]
    image_size: int
    batch_size: int
    crop_pct: float | None = None
    sampling: Literal["all", "balanced"] = "all"
    on_bad_image: Literal["stop", "skip"] = "stop"
    holdout: float = 0.0

    def updates(self, num_images: int) -> int:
        """The updates of an epoch of so many images; the last may have fewer than the batch."""
        return math.ceil(num_images / self.batch_size)

    def faults(self) -> list[str]:
        rules = [
            (self.image_size >= 1, f"image_size must be at least 1, not {self.image_size}"),
            (self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}"),
            (
                self.crop_pct is None or 0 < self.crop_pct <= 1,
                f"crop_pct must be above 0 and at most 1, not {self.crop_pct}",
            ),
            (0 <= self.holdout < 1, f"holdout must be at least 0 and below 1, not {self.holdout}"),
        ]
        return broken(rules, "data: ")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images are varied, by timm's transforms and its Mixup.

    A random crop of `crop_scale` of the area and of `crop_ratio` width to height, resized; a horizontal flip with probability
    `hflip`; timm's `color_jitter`; `randaugment` in timm's notation, such as "rand-m9-mstd0.5-inc1" (arXiv 1909.13719);
    `erasing`, the probability that a random rectangle becomes noise (arXiv 1708.04896). `mixup` (arXiv 1710.09412) and
    `cutmix` (arXiv 1905.04899) are the alpha of their Beta distribution, 0 for none; with both, each update takes one of them.
    Every image is mixed with its neighbour in the order of the epoch, so the pairs are the same on any number of processes.
    """

    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    randaugment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def faults(self) -> list[str]:
        rules = [
            (
                0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
                f"crop_scale must be two rising fractions of the area, not {self.crop_scale}",
            ),
            (
                0 < self.crop_ratio[0] <= self.crop_ratio[1],
                f"crop_ratio must be two rising positive numbers, not {self.crop_ratio}",
            ),
            (0 <= self.hflip <= 1, f"hflip must be a probability, not {self.hflip}"),
            (self.color_jitter >= 0, f"color_jitter must be 0 or more, not {self.color_jitter}"),
            (
                self.randaugment is None or self.randaugment.startswith("rand-"),
                f"randaugment must start with 'rand-', as in 'rand-m9-mstd0.5-inc1', not {self.randaugment!r}",
            ),
            (0 <= self.erasing <= 1, f"erasing must be a probability, not {self.erasing}"),
            (0 <= self.mixup < math.inf, f"mixup must be 0 or more, not {self.mixup}"),
            (0 <= self.cutmix < math.inf, f"cutmix must be 0 or more, not {self.cutmix}"),
        ]
        return broken(rules, "augment: ")
