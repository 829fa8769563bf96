"""Whether probabilities can be trusted: a temperature, and errors of probabilities before and after it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from finetune.data.loader import is_unreadable
from finetune.recipe.metrics import NUMBER_LOSSES

COLDEST, HOTTEST = 0.05, 20.0  # temperatures: of logits that are always right, or no better than chance, none is the best
BINS = 15
FOLDS = 5
FEWEST = 10  # images to fit a temperature to
AT_ONCE = 2**18  # logits of which there are copies in memory


def probabilities(loss: str, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """A recipe's probabilities of logits [n, classes]: their softmax, or sigmoids where its loss is binary or multi_label."""
    logits = logits.double() / temperature
    return logits.softmax(1) if loss == "cross_entropy" else logits.sigmoid()


def targets(loss: str, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels [n], or [n, classes] of 0 and 1, as [n, classes]."""
    return labels.double() if loss == "multi_label" else one_hot(labels, classes).double()


def in_parts(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some images at a time, [k, classes] of float64 and what else is known of them: a copy of all might not fit in memory."""
    rows = max(1, AT_ONCE // max(1, logits.shape[1]))
    for part, *more in zip(logits.split(rows), *(other.split(rows) for other in others), strict=True):
        yield part.double(), *more


def with_labels(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the images that have a label; if all have, no copy is made."""
    seen = ~is_unreadable(labels)
    return (logits, labels) if seen.all() else (logits[seen], labels[seen])


def groups_with_labels(groups: Sequence[str] | None, labels: torch.Tensor) -> list[str] | None:
    """The groups of the images that have a label, where images belong to some."""
    return [one for one, gone in zip(groups, is_unreadable(labels).tolist(), strict=True) if not gone] if groups else None


def fit_temperature(loss: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, from 0.05 to 20, by which logits are divided for the least log loss on these labels.

    Guo et al. 2017 (arXiv 1706.04599). The log loss is convex in its inverse: found where the slope is 0, by Newton's method
    between bounds. Of n images, 1 / (n + 2) of each label is spread over all classes, as Platt 1999 does it: a few images that
    are all right don't make the network certain. Images without a label are left out; without any other the temperature is 1.
    """
    logits, labels = with_labels(logits, labels)
    if not len(labels) or not all(part.isfinite().all() for part, _ in in_parts(logits, labels)):
        return 1.0
    spread, ways = 1 / (len(logits) + 2), logits.shape[1] if loss == "cross_entropy" else 2
    low, high, guess = math.log(1 / HOTTEST), math.log(1 / COLDEST), 0.0  # logarithms of the temperature's inverse
    tried = set[float]()
    for _ in range(40):
        slope = curvature = 0.0
        for part, own in in_parts(logits, labels):
            probs = probabilities(loss, part * math.exp(guess))
            truth = (1 - spread) * targets(loss, own, part.shape[1]) + spread / ways
            slope += ((probs - truth) * part).sum().item()
            mean = (probs * part).sum(1, keepdim=True) if loss == "cross_entropy" else probs * part
            curvature += math.exp(guess) * (probs * part * (part - mean)).sum().item()  # the variance of logits
        low, high = (low, guess) if slope > 0 else (guess, high)
        before, guess = guess, guess - slope / curvature if curvature > 0 else low
        if not low < guess < high:  # a bound is tried once, as it may be the answer
            end = low if guess <= low else high
            guess = (low + high) / 2 if end in tried else end
            tried.add(end)
        if abs(guess - before) < 1e-10:
            break
    return math.exp(-guess)


def probability_errors(
    loss: str, logits: torch.Tensor, labels: torch.Tensor, temperatures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log loss [n], Brier score [n], how far each bin's probabilities are from what is right [n, bins]) of each image.

    Each image's logits are divided by its temperature, [n]. With sigmoids all are means over the classes.
    """
    found = []
    for part, own, divisors in in_parts(logits, labels, temperatures):
        part = part / divisors[:, None]
        probs, truth = probabilities(loss, part), targets(loss, own, part.shape[1])
        if loss == "cross_entropy":
            losses = cross_entropy(part, own, reduction="none")
        else:
            losses = binary_cross_entropy_with_logits(part, truth, reduction="none").mean(1)
        confidence, right = (values.view(len(own), -1) for values in confidences(loss, probs, own))
        gaps = torch.zeros(len(own), BINS, dtype=torch.float64).scatter_add_(1, bin_of(confidence), right - confidence)
        found.append((losses, squares(loss, probs, truth), gaps / confidence.shape[1]))
    losses, scores, gaps = map(torch.cat, zip(*found, strict=True))
    return losses, scores, gaps


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
    owners = groups_with_labels(groups, labels)
    logits, labels = with_labels(logits, labels)

    def errors(temperatures: torch.Tensor) -> tuple[float, float]:
        losses, _, gaps = probability_errors(loss, logits, labels, temperatures)
        return losses.mean().item(), (gaps.sum(0).abs().sum() / len(labels)).item()  # a weighted mean over bins

    one = torch.ones(len(labels), dtype=torch.float64)
    before = errors(one)
    if temperature is None:
        temperature, by_fold, folds = fit_temperature(loss, logits, labels), one.clone(), deal(len(labels), owners)
        for fold in range(FOLDS):
            by_fold[folds == fold] = fit_temperature(loss, logits[folds != fold], labels[folds != fold])
        after = errors(by_fold)
        if len(labels) < FEWEST or not after[0] < before[0]:
            temperature, after = 1.0, before
    else:
        after = errors(one * temperature)
    (loss_before, ece_before), (loss_after, ece_after) = before, after
    return {"temperature": temperature, "log_loss": [loss_before, loss_after], "ece": [ece_before, ece_after]}


def deal(images: int, groups: Sequence[str] | None) -> torch.Tensor:
    """The fold of each image, [n], at random, the same each time; images of one group have the same."""
    names: Sequence[object] = groups or range(images)
    units = {name: i for i, name in enumerate(dict.fromkeys(names))}
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))
    return order[[units[name] for name in names]] % FOLDS
