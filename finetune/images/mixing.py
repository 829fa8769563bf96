"""Mixup and cutmix: images of a batch mixed with their neighbours."""

import torch
from timm.data import Mixup

from finetune.recipe import Recipe
from finetune.utils.seed import seed_all


def make_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's Mixup, which draws once for a batch; None without mixup and cutmix. The loss smooths labels, not this."""
    augment = recipe.augment
    if not augment.mixes:
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=num_classes)


def mix_neighbours(
    mixup: Mixup, images: torch.Tensor, labels: torch.Tensor, key: tuple[int | str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [n, 3, H, W], targets [n, classes]), each image mixed with its neighbour: 0 with 1, 2 with 3, ...

    The draw depends on `key` alone, so the result is the same however a batch is cut into micro-batches. A last image without
    a neighbour is mixed with itself. Images come back in another order, with their targets.
    """
    n = len(images)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2)) + [n - 1] * (n % 2)
    order = even + odd[::-1]  # timm mixes the first image with the last, the second with the last but one, ...
    seed_all("mix", *key)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    if labels.ndim == 1:
        images, targets = mixup(images[order], labels[order])
    else:  # timm mixes several labels an image from 1.0.31 on only: here it mixes their places, whose shares mix the labels
        mixup.num_classes = len(order)
        images, shares = mixup(images[order], torch.arange(len(order), device=labels.device))
        targets = shares @ labels[order].float()
    if n % 2:  # the last image came twice
        images, targets = (torch.cat([part[: len(even)], part[len(even) + 1 :]]) for part in (images, targets))
    return images.contiguous(memory_format=layout), targets
