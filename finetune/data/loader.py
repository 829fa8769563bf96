"""Images and labels loaded in batches."""

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.data.batches import WHOLE, BatchPlan, Cut, balanced_sample_weights, plan_epoch
from finetune.data.channels import kind_of, name_of, unchanged
from finetune.data.dataset import ImageList, Images, labels_of, name_faults
from finetune.images.cache import PHOTOGRAPHS, DiskCache, PixelKind, image_cache
from finetune.images.decode import WHITE, Colour
from finetune.images.own_function import OwnFunction
from finetune.images.read import read_image
from finetune.images.remote import ahead
from finetune.images.transforms import Pixels, Timm
from finetune.recipe import Recipe
from finetune.recipe.load import RecipeModules
from finetune.utils.cores import outlast_interrupts
from finetune.utils.errors import RecipeError, free_frames
from finetune.utils.seed import keyed_seed, seed_cpu
from finetune.utils.text import print_error, progress

UNREADABLE = -100  # as a class: cross_entropy leaves such an image out of the loss; of labels that are floats it is NaN
Loaded = tuple[torch.Tensor, torch.Tensor]  # images [n, ...] and labels, [n] or [n, classes]
Transform = Pixels | Timm  # images one by one when loaded, then as a batch on the device


class Batch(NamedTuple):
    """One step's batch, loaded: (images [n, 3, H, W], labels) of each micro-batch of this process."""

    plan: BatchPlan
    micro_batches: list[Loaded]


@dataclass(eq=False)
class ImageDataset(Dataset[tuple[torch.Tensor, int | torch.Tensor]]):
    """Transformed images and labels by (epoch, index), on which alone, with the seed, augmentation depends.

    Images of an ImageList are decoded once, others each time.
    """

    images: Images
    transform: Transform
    seed: int
    classes: Sequence[str]
    on_bad_image: str = "stop"
    multi_label: bool = False
    memory_format: torch.memory_format = torch.channels_last  # of the batches
    background: Colour = WHITE  # behind what is transparent
    function: OwnFunction | None = None  # of what is decoded, before the transform
    of_numbers: bool = False  # labels are numbers, whose names are in place of classes
    growing: Sequence[Transform] = ()  # of each epoch, where sizes grow; what is no epoch of these gets `transform`
    in_background: ClassVar[bool] = True  # worth the processes that load in the background

    def __post_init__(self) -> None:
        self.cache = image_cache(len(self.images), self.kind or PHOTOGRAPHS) if isinstance(self.images, ImageList) else None
        self.kept_loader: BatchLoader | None = None

    @property
    def kind(self) -> PixelKind | None:
        """What its arrays have in common; of photographs None."""
        return kind_of(self.transform.preprocessing)

    def __reduce__(self) -> tuple[Any, ...]:
        """For a loader process that is started afresh, as on macOS and Windows: it knows no recipe, and shares no memory."""
        cache = self.cache if isinstance(self.cache, DiskCache) else None
        return unpickled, (RecipeModules(), self.__dict__ | {"cache": cache, "kept_loader": None})

    def __len__(self) -> int:
        return len(self.images)

    def transformed_as(self, other: "ImageDataset") -> "ImageDataset":
        """These images with the function and the transform of another dataset."""
        own = {name: getattr(other, name) for name in ("function", "transform", "growing")}
        return unpickled(None, self.__dict__ | own | {"kept_loader": None})

    def transform_in(self, epoch: int) -> Transform:
        """The transform in an epoch."""
        return self.growing[epoch] if 0 <= epoch < len(self.growing) else self.transform

    def loader(self, workers: int) -> "BatchLoader":
        """What loads batches in so many processes, which stay from one epoch to the next; without any, one for a single use."""
        workers = workers if self.in_background else 0
        if not workers:
            return BatchLoader(self, 0)
        if self.kept_loader is None or self.kept_loader.num_workers != workers:
            # Of a copy: were it of these images themselves, the two would keep each other alive, and the processes.
            self.kept_loader = BatchLoader(unpickled(None, self.__dict__ | {"kept_loader": None}), workers)
        return self.kept_loader

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[torch.Tensor, int | torch.Tensor]]:
        """The images of a batch; those that lie elsewhere, and are not kept, are fetched at the same time."""
        items = self.images.items if isinstance(self.images, ImageList) else ()
        wanted = [items[i] if len(items) and not (self.cache and self.cache.has(i)) else None for _, i in keys]
        return [self[keys[n]] for n in ahead(wanted, range(len(keys)))]

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int | torch.Tensor]:
        epoch, index = key
        transform = self.transform_in(epoch)
        seed_cpu(seed := keyed_seed(self.seed, epoch, index))
        try:
            pixels, label = self.read(index)
        except (OSError, RecipeError) as error:
            if self.on_bad_image == "stop":
                raise
            print_error(f"skipped: {error}")
            channels, dtype = self.kind or PHOTOGRAPHS
            missing = torch.full((len(self.classes),), torch.nan) if self.has_floats else UNREADABLE
            return transform.image(np.zeros((8, 8, channels), dtype)), missing
        if self.function:
            pixels = self.function(pixels, seed, f"image {index} in epoch {epoch + 1}")
        return transform.image(pixels), self.target(label, index)

    @property
    def has_floats(self) -> bool:
        """Whether labels are floats [classes], and not the number of a class."""
        return self.multi_label or self.of_numbers

    def read(self, index: int) -> tuple[np.ndarray, int | np.ndarray]:
        """(pixels, [H, W, channels], label) of an image: uint8, or of what kind the set's arrays are."""
        if self.cache is not None and (pixels := self.cache.get(index)) is not None:
            assert isinstance(self.images, ImageList)  # only a list is kept in memory
            return pixels, self.images.labels[index]
        image, label = self.images[index]
        options: dict[str, Any] = self.kind._asdict() if self.kind else {}
        where = partial(name_of, self.images, index)
        pixels = np.array(read_image(image, unchanged, where, self.background, **options))
        if self.cache is not None:
            self.cache.keep(index, pixels)
        return pixels, label

    def target(self, label: Any, index: int) -> int | torch.Tensor:
        """A label as the loss takes it: a class, or floats [classes]: of several labels 0 and 1, or numbers."""
        if self.of_numbers and not np.isfinite(label).all():
            raise RecipeError(f"data: image {index} has the label {label}, and not a number", one_process=True)
        if np.ndim(label) == 1 or self.of_numbers:
            return torch.as_tensor(label, dtype=torch.float32).expand(len(self.classes))
        if not 0 <= label < (n := len(self.classes)):
            text = f"data: image {index} has label {label}, but there are {n} classes, 0 to {n - 1}"
            raise RecipeError(text, one_process=True)
        if self.multi_label:  # one label where there could be several
            return torch.nn.functional.one_hot(torch.tensor(int(label)), len(self.classes)).float()
        return int(label)

    def labels(self) -> np.ndarray:
        """The label of every image, without reading one."""
        return labels_of(self.images)


def unpickled(modules: None, fields: dict[str, Any]) -> ImageDataset:
    """An ImageDataset of these fields, the cache included; `modules` is there to be unpickled first."""
    images = object.__new__(ImageDataset)
    images.__dict__.update(fields)
    return images


def is_unreadable(labels: torch.Tensor) -> torch.Tensor:
    """Which labels, [n] or [n, classes], are those of images that could not be read: bool [n]."""
    first = labels if labels.ndim == 1 else labels[:, 0]
    return first.isnan() if first.is_floating_point() else first == UNREADABLE


def epoch_batches(recipe: Recipe, images: ImageDataset, epoch: int, cut: Cut = WHOLE) -> list[BatchPlan]:
    """The batches of an epoch as the recipe samples them: see `plan_epoch`."""
    if recipe.batch_norm != "frozen" and recipe.data.batch_size >= 2 * cut.processes * cut.micro_batches:
        cut = cut._replace(fewest=2)
    weights = balanced_sample_weights(images.labels()) if recipe.data.sampling == "balanced" else None
    return plan_epoch(len(images), recipe.data.batch_size, recipe.seed, epoch, cut, weights, pairs=recipe.augment.mixes)


class BatchLoader(DataLoader[Any]):
    """Loads what `keys` holds when it is iterated over: (epoch, index) of each image of each batch."""

    def __init__(self, images: ImageDataset, workers: int):
        self.keys = NextBatches()
        super().__init__(
            images,
            batch_sampler=self.keys,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            worker_init_fn=outlast_interrupts,  # the process that trains finishes its step first
        )


class NextBatches:
    """The batches to load next, as a sampler of them."""

    batches: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


def name_others(error: RecipeError, images: Images, seconds: float = 60) -> RecipeError:
    """The error of an image that can't be read, with the others of its set that can't, as far as that time goes."""
    unreadable = "can't read the image "
    if not str(error).startswith(unreadable) or not isinstance(images, ImageList):
        return error
    faults, looked, end = dict[str, str](), 0, time.monotonic() + seconds
    for i in progress(range(len(images)), len(images), "looking for others that can't be read"):
        if time.monotonic() > end:
            break
        looked += 1
        try:
            images[i]
        except RecipeError as fault:
            path, _, why = str(fault).removeprefix(unreadable).rpartition(": ")
            faults[path] = why
    return RecipeError(name_faults(faults, looked), one_process=True) if faults else error


def load(
    images: ImageDataset, epoch: int, batches: Sequence[Sequence[int]], workers: int, device: torch.device | str = "cpu"
) -> Iterator[Loaded]:
    """(float images [n, 3, H, W], labels [n]) for each list of indices, on `device`."""
    loader = images.loader(workers)
    loader.keys.batches = ([(epoch, index) for index in batch] for batch in batches)
    try:
        for batch, labels in loader:
            batch, labels = (part.to(device, non_blocking=True) for part in (batch, labels))
            yield images.transform.batch(batch).contiguous(memory_format=images.memory_format), labels
    except RecipeError as error:  # a worker's error arrives with its traceback in the text: keep the sentence
        sentence = RecipeError(str(error).rpartition("RecipeError: ")[2].strip(), one_process=True)
        raise name_others(sentence, images.images) from None
    except (OSError, RuntimeError) as error:
        if not (getattr(error, "errno", None) == errno.ENOSPC or "shared memory" in str(error)):
            raise
        free_frames(error)
        raise RecipeError(
            f"no room in /dev/shm, through which {workers} loader processes hand over images: fewer --workers (0 needs "
            "none), or more shared memory (docker run --shm-size 8g)",
            one_process=True,
        ) from error


def load_batches(
    images: ImageDataset, epoch: int, plans: Sequence[BatchPlan], workers: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches of these plans, loaded in the background."""
    loaded = load(images, epoch, [indices for plan in plans for indices in plan.micro_batches], workers, device)
    for plan in plans:
        yield Batch(plan, [next(loaded) for _ in plan.micro_batches])
