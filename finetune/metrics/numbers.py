"""Metrics of numbers, each a function of the images' weights, and the error of always saying the training images' mean."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from finetune.models.linear_probe import Units
from finetune.recipe.metrics import OF_NUMBERS, write_number

Errors = Callable[[torch.Tensor], torch.Tensor]  # weights of images [draws, n] -> [draws, numbers]


def number_metrics(outputs: torch.Tensor, labels: torch.Tensor, grades: torch.Tensor | None = None) -> dict[str, Errors]:
    """MAE, RMSE, R2 and Spearman's rank correlation of outputs [n, numbers], each as a function of the weights of the images.

    They give one value for each number, [draws, numbers]. Definitions are scikit-learn's and scipy's; NaN is R2, and
    Spearman's, of labels that are all the same. Of outputs that are all the same, which rank nothing, the latter is 0.
    With the outputs as `grades` there is quadratic kappa, too.
    """
    outputs, labels = outputs.double(), labels.double()
    gaps = outputs - labels
    found: dict[str, Errors] = {
        "mae": lambda weights: mean_of(weights, gaps.abs()),
        "rmse": lambda weights: mean_of(weights, gaps.square()).sqrt(),
        "r2": lambda weights: r2(weights.double(), gaps, labels),
        "spearman": lambda weights: rank_correlation(weights.double(), outputs, labels),
    }
    if grades is not None:
        found["quadratic_kappa"] = partial(quadratic_kappa, grades=grades, labels=labels)
    return found


def mean_metrics(
    outputs: torch.Tensor, labels: torch.Tensor, grades: torch.Tensor | None = None
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The mean of each metric over the numbers, [draws], of those for which it is defined."""

    def mean(metric: Errors, weights: torch.Tensor) -> torch.Tensor:
        return metric(weights).nanmean(1)

    return {name: partial(mean, metric) for name, metric in number_metrics(outputs, labels, grades).items()}


def to_grades(outputs: torch.Tensor, units: Units | None) -> torch.Tensor | None:
    """Numbers [n, numbers] as the nearest grades, none beyond those of the training images; None where there are no grades."""
    if units is None or not units.lowest:
        return None
    lowest, highest = (torch.tensor(ends, dtype=torch.float64) for ends in (units.lowest, units.highest))
    return outputs.double().round().clamp(lowest, highest)


def quadratic_kappa(weights: torch.Tensor, grades: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cohen's kappa with quadratic weights (Cohen 1968) of predicted and labelled grades [n, numbers]: [draws, numbers].

    1 minus the mean squared difference over that of pairs drawn by chance. It is 0 where either are all the same; NaN where
    both are.
    """
    weights, first = weights.double(), labels[:1].double()  # subtracted, so that sums stay exact
    grades, labels = grades.double() - first, labels.double() - first
    squares = mean_of(weights, grades.square()) + mean_of(weights, labels.square())
    by_chance = squares - 2 * mean_of(weights, grades) * mean_of(weights, labels)
    apart = mean_of(weights, (grades - labels).square())
    return torch.where(by_chance > 1e-12, 1 - apart / by_chance, torch.nan)


def mean_of(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weighted means [draws, numbers] of values [n, numbers]."""
    return weights.double() @ values / weights.sum(1, keepdim=True).double()


def r2(weights: torch.Tensor, gaps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of the labels' variance that is explained: below 0 where their own mean would be nearer."""
    labels = labels - labels.mean(0)  # or squares of large numbers would take the digits
    variance = mean_of(weights, labels.square()) - mean_of(weights, labels).square()
    return torch.where(variance > 1e-12 * labels.square().amax(0), 1 - mean_of(weights, gaps.square()) / variance, torch.nan)


def rank_correlation(weights: torch.Tensor, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation of each number, [draws, numbers]: Pearson's of the ranks, where ties have their mean rank."""
    columns = []
    for output, label in zip(outputs.T, labels.T, strict=True):
        own, other = (ranks(weights, values) for values in (output, label))
        both = (weights * own * other).sum(1)
        one, two = ((weights * part.square()).sum(1) for part in (own, other))
        found = torch.where(one > 1e-9, both / (one * two).sqrt(), 0.0)
        columns.append(torch.where(two > 1e-9, found, torch.nan))
    return torch.stack(columns, 1)


def ranks(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The rank of each image, [draws, n], among all that the weights stand for, minus the mean rank."""
    levels, place = values.unique(return_inverse=True)
    there = torch.zeros(len(weights), len(levels), dtype=torch.float64).index_add_(1, place, weights)
    return (there.cumsum(1) - there / 2)[:, place] - weights.sum(1, keepdim=True) / 2


def baseline(labels: torch.Tensor, units: Units) -> dict[str, Any]:
    """The errors of always saying the training images' mean, in the order of the numbers and as their mean."""
    means = torch.tensor(units.mean, dtype=torch.float64).expand(labels.shape)
    whole, metrics = torch.ones(1, len(labels), dtype=torch.float64), number_metrics(means, labels)
    errors = {name: metrics[name](whole)[0].tolist() for name in ("mae", "rmse")}
    return {name: sum(found) / len(found) for name, found in errors.items()} | {"numbers": errors}


def describe_numbers(result: dict[str, Any]) -> list[str]:
    """The errors of a result beside those of always saying the mean, and, of several numbers, a line for each."""
    rows, lines = result.get("numbers", []), list[str]()
    if base := result.get("baseline"):
        both = ", ".join(f"{OF_NUMBERS[name]} {write_number(base[name])}" for name in ("mae", "rmse"))
        lines.append(f"always saying the training images' mean: {both}")
    for row in rows if len(rows) > 1 else ():
        known = (f"{word} {write_number(row[name])}" for name, word in OF_NUMBERS.items() if name in row)
        lines.append(f"{row['name']}: {', '.join(known)}")
    return lines
