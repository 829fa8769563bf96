"""The order of the samples, how an update's batch is split over processes, and the loaders that follow it."""

import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.data.cache import ImageCache
from finetune.data.dataset import ImageList, Images, labels_of
from finetune.recipe import Recipe
from finetune.utils.errors import RecipeError
from finetune.utils.seed import keyed_seed, seed_cpu

UNREADABLE = -100  # as a label: cross_entropy leaves such an image out of the loss
Batch = tuple[torch.Tensor, torch.Tensor]  # images [n, ...] and labels, [n] or [n, classes]


class Transform(Protocol):
    """How images become the network's input: one by one as they are loaded, then the batch on the device."""

    def image(self, pixels: np.ndarray) -> torch.Tensor: ...

    def batch(self, images: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer update: the indices of its images over all processes, and this process's micro-batches of them.

    `positions` counts micro-batches over all processes, so 2 processes and 2 accumulated micro-batches are told apart from
    no other way of cutting the same batch in 4. `weight` is 0 where a last, short batch leaves this process without images:
    it then repeats one for nothing, because every process must take part in averaging the gradients.
    """

    images: list[int]
    micro_batches: list[list[int]]
    positions: list[int]
    weight: float = 1.0

    @property
    def size(self) -> int:
        return len(self.images)


def plan_epoch(
    num_images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    process: int = 0,
    processes: int = 1,
    accumulate: int = 1,
    chances: np.ndarray | None = None,
    pairs: bool = False,
) -> list[BatchPlan]:
    """The updates of an epoch: every image once, in an order that depends on seed and epoch alone.

    With `chances`, one for each image, as many images drawn with replacement. With `pairs`, the images 0 and 1 of each update,
    2 and 3, and so on, stay together in one micro-batch.
    """
    random = np.random.RandomState(keyed_seed(seed, epoch))
    order = random.permutation(num_images) if chances is None else random.choice(num_images, num_images, p=chances)
    updates = []
    for start in range(0, num_images, batch_size):
        batch = order[start : start + batch_size]
        cuts = np.array_split(batch, processes * accumulate)
        if pairs:  # a cut never parts two neighbours
            cuts = [
                batch[2 * cut[0] : 2 * cut[-1] + 2] if len(cut) else cut
                for cut in np.array_split(np.arange((len(batch) + 1) // 2), processes * accumulate)
            ]
        mine = [
            (position, cuts[position].tolist())
            for position in range(process * accumulate, (process + 1) * accumulate)
            if len(cuts[position])
        ]
        weight = 1.0 if mine else 0.0
        mine = mine or [(process * accumulate, [int(batch[0])])]
        updates.append(BatchPlan(batch.tolist(), [cut for _, cut in mine], [position for position, _ in mine], weight))
    return updates


class ImageDataset(Dataset[tuple[torch.Tensor, int | torch.Tensor]]):
    """Varied images and labels, asked for by (epoch, index): random variation is a function of that alone.

    `transform` is one of finetune.augment. Images of a list are decoded once, those of a recipe's own function each time.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        seed: int,
        classes: Sequence[str],
        on_bad_image: str = "stop",
        multi_label: bool = False,
    ):
        self.images, self.transform, self.seed, self.classes = images, transform, seed, classes
        self.on_bad_image, self.multi_label = on_bad_image, multi_label
        self.memory = ImageCache(len(images)) if isinstance(images, ImageList) else None

    def __len__(self) -> int:
        return len(self.images)

    def seen_as(self, other: "ImageDataset") -> "ImageDataset":
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
        if self.memory is not None and (pixels := self.memory.get(index)) is not None:
            assert isinstance(self.images, ImageList)  # only a list is kept in memory
            return pixels, self.images.labels[index]
        image, label = self.images[index]
        pixels = np.array(image.convert("RGB"))
        if self.memory is not None:
            self.memory.keep(index, pixels)
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
    """Chances [n] by which every class is drawn equally often."""
    chances = 1 / np.bincount(labels)[labels]
    return chances / chances.sum()


def epoch_batches(
    recipe: Recipe, images: ImageDataset, epoch: int, process: int = 0, processes: int = 1, accumulate: int = 1
) -> list[BatchPlan]:
    """The updates of an epoch in the order, and by the sampling, of the recipe: see `plan_epoch`."""
    chances = balanced_sample_weights(images.labels()) if recipe.data.sampling == "balanced" else None
    size, seed, pairs = recipe.data.batch_size, recipe.seed, recipe.augment.mixes
    return plan_epoch(len(images), size, seed, epoch, process, processes, accumulate, chances, pairs)


def load(
    images: ImageDataset, epoch: int, batches: Sequence[Sequence[int]], workers: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """(float images [n, 3, H, W], labels [n]) for each list of indices, on `device`."""
    keys = ([(epoch, index) for index in batch] for batch in batches)
    loader = DataLoader(
        images, batch_sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available(), generator=torch.Generator()
    )
    try:
        for batch, labels in loader:
            batch, labels = (part.to(device, non_blocking=True) for part in (batch, labels))
            yield images.transform.batch(batch), labels
    except RecipeError as error:  # a worker's error arrives with its traceback in the text: keep the sentence
        raise RecipeError(str(error).rpartition("RecipeError: ")[2].strip(), one_process=True) from None


def load_batches(
    images: ImageDataset, epoch: int, updates: Sequence[BatchPlan], workers: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[BatchPlan, list[Batch]]]:
    """Each update with the loaded micro-batches of this process."""
    loaded = load(images, epoch, [batch for update in updates for batch in update.micro_batches], workers, device)
    for update in updates:
        yield update, [next(loaded) for _ in update.micro_batches]
