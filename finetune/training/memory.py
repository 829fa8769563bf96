"""Memory: kept from step to step on a CPU; smaller micro-batches where a GPU's runs out; decoded images on a disk.

The step is the same with any of it, but for norms whose statistics move, and the draws of dropout.
"""

import ctypes
import hashlib
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import PIL
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from finetune.data.dataset import FileRow
from finetune.data.loader import ImageDataset
from finetune.images.cache import PHOTOGRAPHS, DiskCache
from finetune.models.backbone import memory_format
from finetune.models.batch_norm import has_statistics, keep_buffers
from finetune.models.sharding import is_sharded
from finetune.recipe import Recipe
from finetune.recipe.data import Sides
from finetune.utils.errors import RecipeError


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step, rather than return it and have it mapped and zeroed anew.

    The GNU library returns blocks above 32 MiB at once, and a layer's activations are as large.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of a mapping of its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def find_micro_batches(
    recipe: Recipe, net: nn.Module, accelerator: Accelerator, accumulate: int, say: Callable[[str], None]
) -> int:
    """`accumulate`, doubled until forward and backward of one micro-batch fit into every process's memory.

    Tried before a stage is wrapped for several processes: in the middle of a step, one process that runs out of memory
    would leave the others waiting. Not tried on a CPU, nor in shards, where each layer needs all processes. Says so where
    norms see less than the step's images at once.

    Raises:
        RecipeError: if not even one image fits.
    """
    if says_when_full(accelerator.device) and not is_sharded(net):
        accumulate = fit_memory(recipe, net, accelerator, accumulate, say)
    parts = accumulate * (1 if recipe.batch_norm == "sync" else accelerator.num_processes)
    if parts > 1 and any(has_statistics(module) and module.training for module in net.modules()):
        at_once, size = recipe.data.batch_size // parts, recipe.data.batch_size
        say(f"batch norm that trains sees {at_once} of a step's {size} images at a time: another result than with all at once")
    return accumulate


def fit_memory(recipe: Recipe, net: nn.Module, accelerator: Accelerator, accumulate: int, say: Callable[[str], None]) -> int:
    """`accumulate`, doubled until a micro-batch fits into every process's memory."""
    share = recipe.data.batch_size // accelerator.num_processes
    while True:
        size = share // accumulate
        try:
            try_micro_batch(recipe, net, accelerator, size)
            short = 0
        except torch.OutOfMemoryError:
            short = 1
        except ValueError as error:  # of norms that can't take statistics of one image
            if size > 1:
                raise
            raise RecipeError(
                f"out of memory with 2 images of {recipe.data.pixels} px at once, and batch_norm='{recipe.batch_norm}' "
                "can't do with one: --set batch_norm=frozen, or a smaller data.image_size"
            ) from error
        finally:
            for parameter in net.parameters():
                parameter.grad = None
        if not accelerator.reduce(torch.tensor(short, device=accelerator.device), "sum").item():
            return accumulate
        if size % 2:
            raise RecipeError(
                f"out of memory with {size} images of {recipe.data.pixels} px at once, an odd number that "
                "can't be halved; try a smaller data.image_size or a data.batch_size with more factors of 2"
            )
        accumulate *= 2
        say(
            f"out of memory with {size} images at once: now {size // 2}, {accumulate} times a step; the batch stays "
            f"{recipe.data.batch_size}"
        )


def says_when_full(device: torch.device) -> bool:
    """Whether memory that runs out is an error: where a CPU's does, the system ends the process instead."""
    return device.type != "cpu"


def try_micro_batch(recipe: Recipe, net: nn.Module, accelerator: Accelerator, size: int) -> None:
    """Forward and backward passes of the smallest and the largest images, and a forward pass of those that are evaluated, that
    leave no trace but gradients, with room kept for what comes later."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    # An Adam's two moments and the buckets in which processes exchange gradients are not there yet at the first try.
    room = torch.empty(3 * sum(parameter.numel() for parameter in trained), device=accelerator.device)

    def logits_of(sides: Sides) -> torch.Tensor:
        images = torch.zeros(size, *recipe.data.shape_of(sides), device=accelerator.device)
        with accelerator.autocast():
            logits: torch.Tensor = net(images.contiguous(memory_format=memory_format(recipe, net)))
        return logits.float()

    try:
        with keep_buffers(net):
            for sides in dict.fromkeys((recipe.data.start_sides, recipe.data.sides)):  # norms may refuse small ones
                logits_of(sides).sum().backward()
            if recipe.data.test_sides != recipe.data.sides:
                with torch.no_grad():
                    logits_of(recipe.data.test_sides)
    finally:
        del room


@contextmanager
def disk_caches(
    folder: Path | None,
    gib: float | None,
    datasets: Sequence[ImageDataset],
    rows: Sequence[FileRow],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Within, decoded images are kept in files of `folder`, up to so many GiB, half of what is free by default.

    `rows` are those of the first process. A file is found by the content of a set's images, their order and how they are read.

    Raises:
        RecipeError: for images that are no files, and for a folder that can't be used so.
    """
    if folder is None:
        yield
        return
    digests = [[row[2] for row in rows if row[0] == split] for split in ("train", "val")]
    keys = broadcast_object_list([cache_key(*pair) for pair in zip(datasets, digests, strict=True)])
    if not all(keys):
        raise RecipeError("--cache keeps images that are files, in folders or of a table; these are not: leave it out")
    total, found = sum(map(len, datasets)), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        limit = gib * 2**30 if gib else shutil.disk_usage(folder).free / 2
        for images, key in zip(datasets, keys, strict=True):
            share, kind = int(limit * len(images) / total), images.kind or PHOTOGRAPHS
            images.cache = DiskCache(folder / str(key), len(images), share, kind)
            found += int((images.cache.places[:, 0] > 0).sum())
    except OSError as error:
        raise RecipeError(
            f"--cache {folder}: {error.strerror or error}; it takes a folder on a disk of a Linux machine"
        ) from error
    say(f"cache: {folder} has {found:,} of {total:,} images, decoded")
    try:
        yield
    finally:
        for images in datasets:
            assert isinstance(images.cache, DiskCache)  # set above
            images.cache.flush()


def cache_key(images: ImageDataset, digests: Sequence[str]) -> str:
    """The name of the files in which a set's decoded images are kept; "" for images that are no files."""
    options = getattr(getattr(images.images, "read", None), "keywords", {})
    key = repr((digests, sorted(options.items()), images.background, PIL.__version__, platform.node()))
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest() if digests else ""
