"""The loss: of classes or numbers, of mixed targets, weighted, plus a pull towards the pretrained weights."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, huber_loss, one_hot

from finetune.data.loader import ImageDataset, is_unreadable
from finetune.images.mixing import make_mixup, mix_neighbours
from finetune.models.backbone import head_parameters
from finetune.models.linear_probe import units_of
from finetune.optim.param_groups import no_weight_decay
from finetune.recipe import Recipe
from finetune.utils.errors import RecipeError


class Criterion:
    """The recipe's loss for one network and one training set; made before the network's weights move."""

    def __init__(self, recipe: Recipe, net: nn.Module, images: ImageDataset, device: torch.device):
        self.recipe, self.mixup = recipe, make_mixup(recipe, len(images.classes))
        self.class_weights, self.pos_weight = class_weights(recipe, images, device), pos_weight(recipe, images, device)
        self.units = units_of(net)
        self.standards = torch.tensor(self.units[:2], device=device) if self.units else None  # mean, deviation [2, numbers]
        self.start: dict[nn.Parameter, torch.Tensor] = {}
        if recipe.l2_sp:
            free = head_parameters(recipe, net) | no_weight_decay(net)
            self.start = {own: own.detach().clone() for name, own in net.named_parameters() if name not in free}

    def mix(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch as `step` sees it: as it is, or with mixup or cutmix."""
        return mix_neighbours(self.mixup, images, labels, (self.recipe.seed, step)) if self.mixup else (images, labels)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum over images of the loss of `logits` [n, classes]; targets are labels [n] or [n, classes] in 0..1, or numbers.

        Smoothing takes this share of each target away and spreads it evenly: over the classes, or with several labels an image
        over yes and no. A class weight is a factor on the loss of that class's images; of a mixed image, on each of its parts.
        `pos_weight` is a factor on what each class's positive targets add, as in torch's BCEWithLogitsLoss.
        """
        recipe, weights = self.recipe, None
        if recipe.loss != "cross_entropy":  # torch's leaves out what can't be read by itself
            seen = ~is_unreadable(targets)
            logits, targets = logits[seen], targets[seen]
        if self.class_weights is not None:
            targets, weights = weigh_images(targets, self.class_weights.to(logits))
        if recipe.loss == "cross_entropy":
            # Not by its own `weight`: that weighs the smoothed share of each class by this class, not by the image's own.
            reduction = "sum" if weights is None else "none"
            losses = cross_entropy(logits, targets, reduction=reduction, label_smoothing=recipe.label_smoothing)
        elif self.standards is not None:
            mean, deviation = self.standards
            losses = number_losses(recipe.loss, logits - (targets - mean) / deviation)
        else:
            losses = binary_losses(logits, targets, recipe.label_smoothing, recipe.loss == "multi_label", self.pos_weight)
        return losses.sum() if weights is None else (weights * losses).sum()

    def l2_sp(self) -> torch.Tensor | float:
        """L2-SP (Li et al. 2018, arXiv 1802.01483): l2_sp / 2 times the squared distance of what trains from its start."""
        distances = [(parameter - start).square().sum() for parameter, start in self.start.items() if parameter.requires_grad]
        return self.recipe.l2_sp / 2 * sum(distances)


def weigh_images(targets: torch.Tensor, class_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(targets, weights [n]) with which the weighted sum of the images' losses is the sum of all their parts' weighted losses.

    An image of one label has its class's weight. The loss of a mixed image is linear in its target: it is the mean weight of
    its parts, times the loss of the target that has each part in proportion to its weight.
    """
    if targets.ndim == 1:
        return targets, class_weights[targets.clamp(min=0)]  # whatever weight for what can't be read
    parts = targets * class_weights
    weights = parts.sum(1)
    return parts / weights[:, None], weights


def binary_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    smoothing: float,
    multi_label: bool,
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each image's mean over classes of their binary cross-entropies [n]."""
    if targets.ndim == 1:
        targets = one_hot(targets, logits.shape[1])
    targets = targets * (1 - smoothing) + smoothing / (2 if multi_label else logits.shape[1])
    factors = None if pos_weight is None else pos_weight.to(logits)
    return binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none", pos_weight=factors).mean(1)


def number_losses(loss: str, errors: torch.Tensor) -> torch.Tensor:
    """Each image's mean, over its numbers, of the loss of standardised errors, [n, numbers] -> [n]."""
    if loss == "huber":  # Huber 1964: squared up to one deviation, absolute beyond
        return huber_loss(errors, torch.zeros_like(errors), reduction="none").mean(1)
    return (errors.abs() if loss == "l1" else errors.square()).mean(1)


def class_weights(recipe: Recipe, images: ImageDataset, device: torch.device) -> torch.Tensor | None:
    """The factor of each class's images in the loss [classes]; "balanced" is scikit-learn's formula."""
    weights: Any = recipe.class_weights
    num_classes = len(images.classes)
    if weights is None:
        return None
    if weights == "balanced":
        counts = np.bincount(images.labels(), minlength=num_classes)
        if not counts.all():
            raise RecipeError(f"class_weights: class '{images.classes[int(counts.argmin())]}' has no training image")
        weights = len(images) / (num_classes * counts)
    elif len(weights) != num_classes:
        raise RecipeError(f"class_weights: {len(weights)} for {num_classes} classes: {', '.join(images.classes)}")
    return torch.tensor(weights, dtype=torch.float32, device=device)


def pos_weight(recipe: Recipe, images: ImageDataset, device: torch.device) -> torch.Tensor | None:
    """The factor of each class's positive targets in the loss [classes]; "balanced" is how many negatives there are to each."""
    weights: Any = recipe.pos_weight
    classes = images.classes
    if weights is None:
        return None
    if weights == "balanced":
        labels = images.labels()
        positives = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(classes))
        for count, what in ((0, "no training image has"), (len(labels), "every training image has")):
            if (positives == count).any():
                name = classes[int((positives == count).argmax())]
                raise RecipeError(f"pos_weight='balanced': {what} the class '{name}', and there is nothing to weigh")
        weights = (len(labels) - positives) / positives
    elif isinstance(weights, int | float):
        weights = [weights] * len(classes)
    elif len(weights) != len(classes):
        raise RecipeError(f"pos_weight: {len(weights)} for {len(classes)} classes: {', '.join(classes)}")
    return torch.tensor(weights, dtype=torch.float32, device=device)
