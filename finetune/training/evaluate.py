"""Logits and metrics on validation images."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from finetune.data.loader import ImageDataset, is_unreadable, load
from finetune.recipe import Recipe
from finetune.training.distributed import gather_strided
from finetune.training.setup import DEFAULTS, RunOptions
from finetune.utils.errors import RecipeError
from finetune.utils.text import print_error, progress


@torch.no_grad()
def predict_logits(
    recipe: Recipe,
    net: nn.Module,
    images: ImageDataset,
    accelerator: Accelerator,
    options: RunOptions = DEFAULTS,
    epoch: int = 0,
    text: str = "images",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], labels) of every image once, in their order, on the CPU; the same on every process.

    `epoch` decides how images that are augmented look, `text` stands before the bar.
    """
    net.eval()
    # Every process computes on as many, the last image again where there is none: all take part in gathering.
    processes, total = accelerator.num_processes, len(images)
    mine = [min(i, total - 1) for i in range(accelerator.process_index, -(-total // processes) * processes, processes)]
    size = recipe.data.batch_size // (processes * options.accumulate)
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    outputs, targets = [], []
    loaded = load(images, epoch, batches, options.workers, accelerator.device)
    for batch, labels in progress(loaded, len(batches), text, accelerator.is_main_process and not options.quiet):
        outputs.append(batch_logits(recipe, net, batch, accelerator))
        targets.append(labels)
    logits, labels = gather_strided(outputs, total, accelerator).cpu(), gather_strided(targets, total, accelerator).cpu()
    if (missing := is_unreadable(labels)).any():
        check_left_out(images, missing)
        if accelerator.is_main_process:
            which = "" if text == "images" else f" ({text})"
            print_error(f"{int(missing.sum())} of {total} images could not be read and were left out{which}")
    return logits, labels


def batch_logits(recipe: Recipe, net: nn.Module, batch: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Logits [n, classes] in float32 of a batch of images; with `flip_test` the mean over each image and its mirror image."""
    with accelerator.autocast():
        logits: torch.Tensor = (net(batch) + net(batch.flip(-1))) / 2 if recipe.flip_test else net(batch)
    return logits.float()


def check_left_out(images: ImageDataset, missing: torch.Tensor) -> None:
    """Raise RecipeError if, without the `missing` images, bool [n], nothing is left of them all or of a class."""
    if missing.all():
        raise RecipeError("no image could be read")
    labels = getattr(images.images, "labels", None)  # a function's data set need not know them
    if labels is not None and np.ndim(labels) == 1:
        gone = sorted({*np.asarray(labels).tolist()} - {*np.asarray(labels)[~missing.numpy()].tolist()})
        if gone:
            raise RecipeError(f"no image of class '{images.classes[gone[0]]}' could be read")
