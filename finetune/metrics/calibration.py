"""Whether probabilities can be trusted: a temperature, and errors of probabilities before and after it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from finetune.data.loader import is_unreadable
from finetune.recipe.metrics import NUMBER_LOSSES

COLDEST, HOTTEST = 0.05, 20.0  # temperatures: of logits that are always right, or no better than chance, none is the best
BINS = 15
FOLDS = 5
FEWEST = 10  # images to fit a temperature to


def probabilities(loss: str, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """A recipe's probabilities of logits [n, classes]: their softmax, or sigmoids where its loss is binary or multi_label."""
    logits = logits.double() / temperature
    return logits.softmax(1) if loss == "cross_entropy" else logits.sigmoid()


def targets(loss: str, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels [n], or [n, classes] of 0 and 1, as [n, classes]."""
    return labels.double() if loss == "multi_label" else one_hot(labels, classes).double()


def fit_temperature(loss: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, from 0.05 to 20, by which logits are divided for the least log loss on these labels.

    Guo et al. 2017 (arXiv 1706.04599). The log loss is convex in its inverse: found where the slope is 0. Of n images,
    1 / (n + 2) of each label is spread over all classes, as Platt 1999 does it: a few images that are all right don't make the
    network certain. Images without a label are left out; without any other the temperature is 1.
    """
    if not len(labels) or (unread := is_unreadable(labels)).all() or not logits[~unread].isfinite().all():
        return 1.0
    logits, truth = logits[~unread].double(), targets(loss, labels[~unread], logits.shape[1])
    spread = 1 / (len(logits) + 2)
    truth = (1 - spread) * truth + spread / (logits.shape[1] if loss == "cross_entropy" else 2)
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((probabilities(loss, logits * math.exp(middle)) - truth) * logits).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def log_loss(loss: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Minus the mean logarithm of the probability of what is labelled: of an image, or of each of its classes' sigmoids."""
    if loss == "cross_entropy":
        return cross_entropy(logits.double(), labels).item()
    return binary_cross_entropy_with_logits(logits.double(), targets(loss, labels, logits.shape[1])).item()


def squares(loss: str, probs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The Brier score of each image, [n] (Brier 1950): the squared distance of its probabilities from what is labelled.

    It is a sum over the classes of a softmax, a mean over sigmoids.
    """
    apart = (probs - truth) ** 2
    return apart.sum(1) if loss == "cross_entropy" else apart.mean(1)


def confidences(loss: str, probs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, 1 where what they are of is labelled, else 0): of each image's likeliest class, [n], or of each class."""
    if loss == "multi_label":
        return probs, labels.double()
    best = probs.max(1)
    return best.values, (best.indices == labels).double()


def bin_of(confidence: torch.Tensor) -> torch.Tensor:
    """Which of 15 equal bins a probability falls into; one on an edge into the lower."""
    return (confidence * BINS).ceil().long().clamp(1, BINS) - 1


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """How far probabilities are from the shares that are right: a weighted mean over bins (Guo et al. 2017)."""
    confidence, right = confidence.flatten(), right.flatten()
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bin_of(confidence), right - confidence)
    return gaps.abs().sum().item() / len(right)


def calibrate(
    loss: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    groups: Sequence[str] | None = None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """{"temperature", "log_loss": [before, after], "ece": [before, after]} of logits; without a `temperature`, one is fitted.

    "After" is then measured on each fifth of the images, or of their `groups`, with the temperature of the other four: the one
    that is kept has seen them all. Where it does not help, or there are fewer than 10 images, it is 1; and of numbers, alone.
    """
    if loss in NUMBER_LOSSES:
        return {"temperature": 1.0}
    seen = ~is_unreadable(labels)
    before, labels = logits[seen].double(), labels[seen]
    after = before / (temperature or 1.0)
    if temperature is None:
        temperature, after = fit_temperature(loss, before, labels), before.clone()
        folds = deal(len(labels), [one for one, there in zip(groups, seen.tolist(), strict=True) if there] if groups else None)
        for fold in range(FOLDS):
            after[folds == fold] /= fit_temperature(loss, before[folds != fold], labels[folds != fold])
        if len(labels) < FEWEST or not log_loss(loss, after, labels) < log_loss(loss, before, labels):
            temperature, after = 1.0, before

    def ece(logits: torch.Tensor) -> float:
        return calibration_error(*confidences(loss, probabilities(loss, logits), labels))

    both = before, after
    losses, errors = [log_loss(loss, one, labels) for one in both], [ece(one) for one in both]
    return {"temperature": temperature, "log_loss": losses, "ece": errors}


def deal(images: int, groups: Sequence[str] | None) -> torch.Tensor:
    """The fold of each image, [n], at random, the same each time; images of one group have the same."""
    names: Sequence[object] = groups or range(images)
    units = {name: i for i, name in enumerate(dict.fromkeys(names))}
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))
    return order[[units[name] for name in names]] % FOLDS
