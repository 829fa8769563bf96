"""Batches: the order of the images in an epoch, each step's share of every process, and their loading."""

import math
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.data.cache import ImageCache
from finetune.data.dataset import ImageList, Images, labels_of
from finetune.recipe import Recipe
from finetune.utils.errors import RecipeError
from finetune.utils.seed import keyed_seed, seed_cpu

UNREADABLE = -100  # as a label: cross_entropy leaves such an image out of the loss
Loaded = tuple[torch.Tensor, torch.Tensor]  # images [n, ...] and labels, [n] or [n, classes]


class Transform(Protocol):
    """How images become the network's input: one by one as they are loaded, then the batch on the device."""

    preprocessing: dict[str, Any]

    def image(self, pixels: np.ndarray) -> torch.Tensor: ...

    def batch(self, images: torch.Tensor) -> torch.Tensor: ...


class Cut(NamedTuple):
    """How each batch is cut: over processes, and each process's part into micro-batches."""

    process: int = 0
    processes: int = 1
    micro_batches: int = 1


WHOLE = Cut()


@dataclass(frozen=True)
class BatchPlan:
    """One step's batch: the indices of its images over all processes, and this process's micro-batches of them.

    `step` counts over the run, `positions` counts micro-batches over all processes, so that 2 processes with 2 micro-batches
    differ in nothing from any other way of cutting a batch in 4. `weight` is 0 where a last, short batch leaves this process
    without images: it then repeats one for nothing, because every process must take part in averaging the gradients.
    """

    step: int
    images: list[int]
    micro_batches: list[list[int]]
    positions: list[int]
    weight: float = 1.0

    @property
    def size(self) -> int:
        return len(self.images)


class Batch(NamedTuple):
    """A step's batch as it was loaded: images [n, 3, H, W] and labels, [n] or [n, classes], of each micro-batch."""

    plan: BatchPlan
    micro_batches: list[Loaded]


def plan_epoch(
    num_images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    cut: Cut = WHOLE,
    sample_weights: np.ndarray | None = None,
    pairs: bool = False,
) -> list[BatchPlan]:
    """The batches of an epoch: every image once, in an order that depends on seed and epoch alone.

    With `sample_weights`, one for each image that add up to 1, as many images drawn with replacement. With `pairs`, the images
    0 and 1 of each batch, 2 and 3, and so on, stay together in one micro-batch.
    """
    random = np.random.RandomState(keyed_seed(seed, epoch))
    order = (
        random.permutation(num_images) if sample_weights is None else random.choice(num_images, num_images, p=sample_weights)
    )
    plans: list[BatchPlan] = []
    unit, first_step = 2 if pairs else 1, epoch * math.ceil(num_images / batch_size)
    own = range(cut.process * cut.micro_batches, (cut.process + 1) * cut.micro_batches)
    for start in range(0, num_images, batch_size):
        batch = order[start : start + batch_size]
        units = np.array_split(np.arange(math.ceil(len(batch) / unit)), cut.processes * cut.micro_batches)
        mine = {i: batch[unit * units[i][0] : unit * (units[i][-1] + 1)].tolist() for i in own if len(units[i])}
        weight = 1.0 if mine else 0.0
        mine = mine or {own[0]: [int(batch[0])]}
        plans.append(BatchPlan(first_step + len(plans), batch.tolist(), list(mine.values()), list(mine), weight))
    return plans


class ImageDataset(Dataset[tuple[torch.Tensor, int | torch.Tensor]]):
    """Transformed images and labels, asked for by (epoch, index): augmentation is a function of that alone.

    `transform` is one of finetune.data.transforms; batches are laid out as `memory_format` says. Images of a list are decoded
    once, those of a recipe's own function each time.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        seed: int,
        classes: Sequence[str],
        on_bad_image: str = "stop",
        multi_label: bool = False,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        self.images, self.transform, self.seed, self.classes = images, transform, seed, classes
        self.on_bad_image, self.multi_label, self.memory_format = on_bad_image, multi_label, memory_format
        self.cache = ImageCache(len(images)) if isinstance(images, ImageList) else None

    def __len__(self) -> int:
        return len(self.images)

    def transformed_as(self, other: "ImageDataset") -> "ImageDataset":
        """These images, transformed as those of another set are."""
        same = copy(self)
        same.transform = other.transform
        return same

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int | torch.Tensor]:
        epoch, index = key
        seed_cpu(keyed_seed(self.seed, epoch, index))
        try:
            pixels, label = self.read(index)
        except (OSError, RecipeError) as error:
            if self.on_bad_image == "stop":
                raise
            print(f"finetune: skipped: {error}", file=sys.stderr)
            pixels, label = np.zeros((8, 8, 3), np.uint8), UNREADABLE
        return self.transform.image(pixels), self.target(label, index)

    def read(self, index: int) -> tuple[np.ndarray, int | np.ndarray]:
        """The image's pixels, uint8 [H, W, 3], and its label."""
        if self.cache is not None and (pixels := self.cache.get(index)) is not None:
            assert isinstance(self.images, ImageList)  # only a list is kept in memory
            return pixels, self.images.labels[index]
        image, label = self.images[index]
        pixels = np.array(image.convert("RGB"))
        if self.cache is not None:
            self.cache.keep(index, pixels)
        return pixels, label

    def target(self, label: Any, index: int = 0) -> int | torch.Tensor:
        """A label as the loss takes it: a number, or where images have several a float vector [classes] of 0 and 1."""
        if np.ndim(label) == 1:
            return torch.as_tensor(label, dtype=torch.float32)
        if label == UNREADABLE:
            return torch.full((len(self.classes),), float(label)) if self.multi_label else label
        if not 0 <= label < len(self.classes):
            raise RecipeError(
                f"data: image {index} has label {label}, but there are {len(self.classes)} classes, 0 to "
                f"{len(self.classes) - 1}",
                one_process=True,
            )
        if self.multi_label:  # one label where there could be several
            return torch.nn.functional.one_hot(torch.tensor(int(label)), len(self.classes)).float()
        return int(label)

    def labels(self) -> np.ndarray:
        """The label of every image, without reading one."""
        return labels_of(self.images)


def is_unreadable(labels: torch.Tensor) -> torch.Tensor:
    """Which of the loaded labels [n] or [n, classes] stand for an image that could not be read: bool [n]."""
    return labels.reshape(len(labels), -1)[:, 0] == UNREADABLE


def balanced_sample_weights(labels: np.ndarray) -> np.ndarray:
    """Probabilities [n] of drawing each image by which every class is drawn equally often."""
    weights = 1 / np.bincount(labels)[labels]
    return weights / weights.sum()


def epoch_batches(recipe: Recipe, images: ImageDataset, epoch: int, cut: Cut = WHOLE) -> list[BatchPlan]:
    """The batches of an epoch in the order, and by the sampling, of the recipe: see `plan_epoch`."""
    weights = balanced_sample_weights(images.labels()) if recipe.data.sampling == "balanced" else None
    return plan_epoch(len(images), recipe.data.batch_size, recipe.seed, epoch, cut, weights, pairs=recipe.augment.mixes)


def load(
    images: ImageDataset, epoch: int, batches: Sequence[Sequence[int]], workers: int, device: torch.device | str = "cpu"
) -> Iterator[Loaded]:
    """(float images [n, 3, H, W], labels [n]) for each list of indices, on `device`."""
    keys = ([(epoch, index) for index in batch] for batch in batches)
    loader = DataLoader(
        images, batch_sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available(), generator=torch.Generator()
    )
    try:
        for batch, labels in loader:
            batch, labels = (part.to(device, non_blocking=True) for part in (batch, labels))
            yield images.transform.batch(batch).contiguous(memory_format=images.memory_format), labels
    except RecipeError as error:  # a worker's error arrives with its traceback in the text: keep the sentence
        raise RecipeError(str(error).rpartition("RecipeError: ")[2].strip(), one_process=True) from None


def load_batches(
    images: ImageDataset, epoch: int, plans: Sequence[BatchPlan], workers: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Each batch with the loaded micro-batches of this process."""
    loaded = load(images, epoch, [indices for plan in plans for indices in plan.micro_batches], workers, device)
    for plan in plans:
        yield Batch(plan, [next(loaded) for _ in plan.micro_batches])
