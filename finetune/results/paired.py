"""Whether one network is better than another on the same images, or chance explains the difference."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetune.data.loader import is_unreadable
from finetune.metrics.compute import compute_metrics
from finetune.metrics.intervals import exact_interval, wilson
from finetune.metrics.numbers import mean_metrics
from finetune.recipe import Recipe
from finetune.recipe.metrics import NO_SHARES, OF_GRADES, direction

DRAWS = 1000  # of the bootstrap
Score = Callable[[torch.Tensor], float]  # the metric of the images at these positions


def score(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor) -> Score:
    """The recipe's metric of these logits, as a function of the positions of the images that count.

    Of numbers that are grades, `logits` are the grades predicted.
    """
    if recipe.metric == "top1":
        right = (logits.argmax(1) == labels).double()
        return lambda at: right[at].mean().item()
    if recipe.of_numbers:
        whole = torch.ones(1, len(labels), dtype=torch.float64)
        grades = logits if recipe.metric in OF_GRADES else None

        def value(at: torch.Tensor) -> float:
            metrics = mean_metrics(logits[at], labels[at], None if grades is None else grades[at])
            return metrics[recipe.metric](whole[:, : len(at)]).item()

        return value
    return lambda at: compute_metrics(recipe, logits[at], labels[at])[recipe.metric]


def compare(recipe: Recipe, ours: torch.Tensor, others: Sequence[torch.Tensor], labels: torch.Tensor) -> dict[str, Any]:
    """How far `ours` is above the mean of `others`, logits [n, classes] of the same images: difference, 95 % interval.

    Top-1 against one other: exact, of the images that only one of the two has right (McNemar 1947), with the two-sided
    "p_value". All else: the bootstrap of the images (Efron 1979), with the same draws for all. "verdict" is "gain", "loss" or
    "chance"; of errors a gain is below 0.
    """
    seen = ~is_unreadable(labels)
    labels, ours, others = labels[seen], ours[seen], [one[seen] for one in others]
    if recipe.metric == "top1" and len(others) == 1:
        right, other = (one.argmax(1) == labels for one in (ours, others[0]))
        found = mcnemar(int((right & ~other).sum()), int((other & ~right).sum()), len(labels))
    else:
        own, rest = score(recipe, ours, labels), [score(recipe, one, labels) for one in others]
        found = bootstrap(lambda at: own(at) - sum(one(at) for one in rest) / len(rest), len(labels))
    low, high = sorted(direction(recipe.metric) * end for end in found["interval"])
    return found | {"verdict": "gain" if low > 0 else "loss" if high < 0 else "chance"}


def mcnemar(wins: int, losses: int, images: int) -> dict[str, Any]:
    """The difference of two top-1 of as many images, where one alone is right on `wins` and the other alone on `losses`.

    Given how many these are, wins are binomial: the p-value is that of 1/2, the interval Clopper and Pearson's (1934).
    """
    number = wins + losses
    tail = sum(math.comb(number, i) for i in range(min(wins, losses) + 1)) / 2**number
    low, high = exact_interval(wins, number)
    interval = [number * (2 * end - 1) / images + 0.0 for end in (low, high)]  # no -0.0
    return {"difference": (wins - losses) / images, "interval": interval, "p_value": min(1.0, 2 * tail)}


def bootstrap(statistic: Callable[[torch.Tensor], float], images: int) -> dict[str, Any]:
    """A statistic of all images, and where 95 % of those of as many, drawn with replacement, lie."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([statistic(torch.randint(images, (images,), generator=generator)) for _ in range(DRAWS)])
    ends = draws.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"difference": statistic(torch.arange(images)), "interval": ends}


def interval_of(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The 95 % interval of the recipe's metric: of top-1 Wilson's, of all else the bootstrap's."""
    seen = ~is_unreadable(labels)
    own = score(recipe, logits[seen], labels[seen])
    if recipe.metric == "top1":
        return [*wilson(own(torch.arange(int(seen.sum()))), int(seen.sum()))]
    return bootstrap(own, int(seen.sum()))["interval"]


def in_points(found: dict[str, Any], metric: str = "top1") -> str:
    """A difference in points of a percent, or of numbers in their own unit, with its interval."""
    if metric in NO_SHARES:
        difference, low, high = (f"{value + 0.0:+.3g}" for value in (found["difference"], *found["interval"]))
        return f"{difference} ({low} to {high})"
    points, low, high = (round(100 * value, 1) + 0.0 for value in (found["difference"], *found["interval"]))  # no -0.0
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"
