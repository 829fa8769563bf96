"""What frozen layers make of each image: computed once for each view, and kept on disk for the epochs of a stage."""

import itertools
import math
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from finetune.data.loader import ImageDataset, load
from finetune.images.transforms import Timm
from finetune.models.frozen_prefix import FrozenPrefix, Suffix, find_prefix, frozen_part, share_of_forward
from finetune.recipe import Recipe
from finetune.utils.text import progress

AT_ONCE = 64  # images through the frozen layers: always as many, so that a resumed run keeps the same bits
WORTH_KEEPING = 0.25  # of a forward pass; without it a step, of three passes, is a tenth shorter


class KeptImages(ImageDataset):
    """What the frozen layers make of images, in place of their pixels, for each of `views` augmentations."""

    in_background: ClassVar[bool] = False

    def __init__(self, images: ImageDataset, example: torch.Tensor, views: int):
        """`example`, [1, ...], is what is kept of one image."""
        self.__dict__.update(images.__dict__ | {"kept_loader": None})
        self.source, self.filled = images, set[int]()
        self.transform = Timm(images.transform.preprocessing, torch.as_tensor)  # which leaves a batch as it is
        self.shape, self.dtype = (views * len(images), *example.shape[1:]), example.dtype
        if example.ndim != 4:
            self.memory_format = torch.contiguous_format
        self.target_shape = (len(images), len(images.classes)) if images.has_floats else (len(images),)
        self.target_dtype = torch.float32 if images.has_floats else torch.long

    @property
    def sizes(self) -> list[int]:
        """Bytes of what is kept, and of the labels."""
        parts = ((self.shape, self.dtype), (self.target_shape, self.target_dtype))
        return [math.prod(shape) * dtype.itemsize for shape, dtype in parts]

    def lie_in(self, values: memoryview, targets: memoryview) -> None:
        """Take these bytes, of `sizes`, to keep all in."""
        flat = torch.frombuffer(values, dtype=self.dtype)
        if self.memory_format == torch.channels_last:
            rows, channels, height, width = self.shape
            self.values = flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
        else:
            self.values = flat.view(self.shape)
        self.targets = torch.frombuffer(targets, dtype=self.target_dtype).view(self.target_shape)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[torch.Tensor, Any]]:
        return [self[key] for key in keys]  # of whose files none is needed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, Any]:
        view, index = key
        return self.values[view * len(self) + index], self.targets[index]

    def fill(
        self, view: int, net: nn.Module, prefix: FrozenPrefix, accelerator: Accelerator, workers: int, shown: bool
    ) -> None:
        """Compute a view that is not there yet; the processes of a machine share the work, and all must call."""
        if view in self.filled:
            return
        net.eval()
        chunks = [range(i, min(i + AT_ONCE, len(self))) for i in range(0, len(self), AT_ONCE)]
        mine = chunks[accelerator.local_process_index :: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
        loaded = progress(load(self.source, view, mine, workers, accelerator.device), len(mine), "frozen layers", shown)
        for rows, (images, targets) in zip(mine, loaded, strict=True):
            with accelerator.autocast():
                kept = frozen_part(net, prefix.last, images)
            self.values[view * len(self) + rows.start : view * len(self) + rows.stop] = kept.cpu()
            self.targets[rows.start : rows.stop] = targets.cpu()
        accelerator.wait_for_everyone()
        self.filled.add(view)


@dataclass(frozen=True)
class StageInputs:
    """What the epochs of a stage train and validate on: images, or what the frozen layers make of them.

    `prefixes` are the frozen layers at the size of the one and of the other.
    """

    train: ImageDataset
    val: ImageDataset
    prefixes: tuple[FrozenPrefix, FrozenPrefix] | None = None
    views: int = 1

    def view(self, epoch: int) -> int:
        """Which augmentation an epoch sees: behind frozen layers one of `views`, else a new one."""
        return epoch % self.views if self.prefixes else epoch

    def model(self, net: nn.Module) -> nn.Module:
        """What is run on training images: the network, or what comes after its frozen layers."""
        return Suffix(net, self.prefixes[0]) if self.prefixes and isinstance(self.train, KeptImages) else net

    def validated(self, net: nn.Module) -> tuple[nn.Module, ImageDataset]:
        """What is run on validation images, and these."""
        return Suffix(net, self.prefixes[1]) if self.prefixes and isinstance(self.val, KeptImages) else net, self.val

    def prepare(self, epoch: int, net: nn.Module, accelerator: Accelerator, workers: int, quiet: bool) -> None:
        """Compute what the epoch needs and is not kept yet, with a bar unless it is `quiet`."""
        views, shown = (self.view(epoch), 0), accelerator.is_main_process and not quiet
        for images, view, prefix in zip((self.train, self.val), views, self.prefixes or (), strict=False):
            if isinstance(images, KeptImages):
                images.fill(view, net, prefix, accelerator, workers, shown)


def stage_inputs(
    recipe: Recipe,
    net: nn.Module,
    datasets: tuple[ImageDataset, ImageDataset],
    epochs: int,
    accelerator: Accelerator,
    folder: Path,
    say: Callable[[str], None],
) -> StageInputs:
    """What a stage of so many epochs trains on: with `frozen_views`, what frozen layers make of images, kept in `folder`."""
    views, shapes = recipe.augment.frozen_views, (recipe.data.shape, recipe.data.test_shape)
    found = {shape: find_prefix(net, shape, recipe.batch_norm) for shape in dict.fromkeys(shapes)} if views else {}
    of_train, of_val = (found.get(shape) for shape in shapes)
    if not of_train or not of_val:
        if views:
            say("frozen_views: no effect on this stage: no frozen first layers whose output is all that the others see")
        return StageInputs(*datasets)

    def keep(images: ImageDataset, prefix: FrozenPrefix, views: int) -> KeptImages:
        with accelerator.autocast():
            example = frozen_part(net.eval(), prefix.last, torch.zeros(1, *prefix.shape, device=accelerator.device))
        return KeptImages(images, example, views)

    prefixes, kept = (of_train, of_val), (keep(datasets[0], of_train, views), keep(datasets[1], of_val, 1))
    sizes = [size for part in kept for size in part.sizes]
    text = f"the output of {of_train.last} for {views} views of each image, {sum(sizes) / 2**20:,.0f} MiB"
    if epochs <= views:
        say(f"frozen_views: nothing is kept: this stage sees none of {views} views twice")
    elif (share := share_of_forward(net, of_train)) < WORTH_KEEPING:
        say(f"frozen_views: nothing is kept: the frozen layers are {share:.0%} of the network's computation")
    elif buffers := shared_buffers(folder, sizes, accelerator):
        say(f"frozen_views: kept: {text}")
        for part in kept:
            part.lie_in(buffers.pop(0), buffers.pop(0))
        return StageInputs(*kept, prefixes, views)
    else:
        say(f"frozen_views: computed anew in each epoch, for want of room on the disk: {text}")
    return StageInputs(*datasets, prefixes, views)


def shared_buffers(folder: Path, sizes: Sequence[int], accelerator: Accelerator) -> list[memoryview]:
    """Memory of these sizes that the processes of a machine share; none if a disk has not twice the room.

    It lies in a file without a name, which goes with the last process: what is read or written often stays in memory.
    """
    starts = [0, *itertools.accumulate(64 * -(-size // 64) for size in sizes)]
    file = folder / f"activations-{accelerator.process_index - accelerator.local_process_index}"
    fault, mapped = "", None
    if accelerator.is_local_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as new:
                if shutil.disk_usage(folder).free < 2 * starts[-1]:
                    raise OSError("no room")
                new.truncate(starts[-1])
                if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
                    os.posix_fallocate(new.fileno(), 0, starts[-1])
        except OSError as error:
            fault = str(error)
    if not any(gather_object([fault])):
        with open(file, "r+b") as opened:
            mapped = mmap.mmap(opened.fileno(), 0)
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        with suppress(OSError):  # Windows keeps the name while the file is open
            file.unlink()
    return [memoryview(mapped)[start : start + size] for start, size in zip(starts, sizes, strict=False)] if mapped else []
