"""Metrics of weighted images, so that one formula gives both a metric and, from resampled images, its interval."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from finetune.metrics.calibration import calibrate, groups_with_labels, in_parts, probability_errors, with_labels
from finetune.metrics.counts import weighted_counts
from finetune.metrics.intervals import wilson
from finetune.metrics.numbers import baseline, mean_metrics, quadratic_kappa, to_grades
from finetune.metrics.thresholds import choose_thresholds
from finetune.models.linear_probe import Units
from finetune.recipe import Recipe
from finetune.recipe.metrics import NUMBER_LOSSES, OF_GRADES, OF_NUMBERS, OF_PROBABILITIES

T = TypeVar("T")
DRAWS = 1000  # of the bootstrap
AT_ONCE = 4_000_000  # weights of draws in memory
COLUMNS = 64  # classes whose probabilities are in memory
CURVES = 300_000  # logits, beyond which the intervals of AUROC and average precision would take minutes
NAMES = {  # in words, in the order of a table
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "macro_f1_at_thresholds": "macro F1, own thresholds",
    "mean_average_precision": "mean average precision",
    "average_precision": "average precision",
    "auroc": "AUROC",
    "kappa": "kappa",
    **OF_GRADES,
    **OF_PROBABILITIES,
    **OF_NUMBERS,
}
NUMBERS = ("kappa", "log_loss", "brier", *OF_NUMBERS)  # all else are shares
OF_CURVES = ("auroc", "average_precision", "mean_average_precision")
Metric = Callable[[torch.Tensor], torch.Tensor]  # weights of images [draws, n] -> [draws]; NaN where it is not defined


def measure(
    recipe: Recipe,
    logits: torch.Tensor,
    labels: torch.Tensor,
    groups: Sequence[str] | None = None,
    fitted: tuple[float, Sequence[float] | None] | None = None,
    names: Sequence[str] = (),
    units: Units | None = None,
) -> dict[str, Any]:
    """What is measured once, at the end: all metrics, "intervals" and "calibration" of logits [n, classes] against labels.

    Of several labels an image "thresholds" as well. A model's temperature and thresholds are `fitted`; without them `calibrate`
    fits the one and `choose_thresholds` chooses the others.

    Intervals are of 95 %: Wilson's of top-1 and top-5, of all else the percentiles of 1,000 bootstraps of the images (Efron
    1979); of the `groups`, where images belong to some, as those of one group are not independent. Log loss, Brier score and
    calibration error ("ece") are those at the temperature; where one of them is the recipe's metric, as in each epoch, at
    temperature 1: "used". The last has no interval, since by chance alone resampled images are further off. A metric that is
    not defined, such as the AUROC of one class alone, is left out; so are images without a label.

    Of numbers there is no calibration, but "numbers", a row for each of the `names`, and with the `units` "baseline".
    """
    owners = groups_with_labels(groups, labels)
    logits, labels = with_labels(logits, labels)
    if recipe.of_numbers:
        return measure_numbers(logits, labels, owners, names, units)
    temperature, thresholds = fitted or (None, None)
    calibration = calibrate(recipe.loss, logits, labels, owners, temperature)
    used = 1.0 if recipe.metric in OF_PROBABILITIES else calibration["temperature"]
    metrics = metrics_of(recipe.loss, logits, labels, used)
    if recipe.metric != "quadratic_kappa":  # or classes need not be grades
        metrics.pop("quadratic_kappa", None)
    chosen: dict[str, Any] = {"calibration": calibration | {"used": used}}
    if recipe.loss == "multi_label":
        chosen["thresholds"], said = choose_thresholds(logits, labels, calibration["temperature"], owners, thresholds)
        metrics["macro_f1_at_thresholds"] = several_f1(said, labels)
    whole = torch.ones(1, len(labels), dtype=torch.float64)
    values = {name: metric(whole).item() for name, metric in metrics.items()}
    values = {name: value for name, value in values.items() if value == value}
    left_out = ("ece", *OF_CURVES) if logits.numel() > CURVES else ("ece",)
    wanted = {name: metrics[name] for name in values if name not in left_out}
    return values | {"intervals": intervals_of(wanted, len(labels), owners), **chosen}


def measure_numbers(
    outputs: torch.Tensor, labels: torch.Tensor, groups: Sequence[str] | None, names: Sequence[str], units: Units | None
) -> dict[str, Any]:
    """What `measure` says of numbers: the means over them, each of them and, beside, the error of the training images' mean."""

    def intervals(metrics: dict[str, Metric]) -> dict[str, list[float]]:
        slow = ("spearman",) if outputs.numel() > CURVES else ()
        return intervals_of({name: metric for name, metric in metrics.items() if name not in slow}, len(labels), groups)

    def values(outputs: torch.Tensor, labels: torch.Tensor, grades: torch.Tensor | None) -> dict[str, Any]:
        metrics, whole = mean_metrics(outputs, labels, grades), torch.ones(1, len(labels), dtype=torch.float64)
        known = {name: value for name, metric in metrics.items() if (value := metric(whole).item()) == value}
        return {**known, "intervals": intervals({name: metrics[name] for name in known})}

    grades = to_grades(outputs, units)
    each = [None] * len(names) if grades is None else grades.split(1, 1)
    parts = zip(names, outputs.split(1, 1), labels.split(1, 1), each, strict=False)
    found = values(outputs, labels, grades) | {"numbers": [{"name": name, **values(*part)} for name, *part in parts]}
    return found | ({"baseline": baseline(labels, units)} if units else {})


def intervals_of(metrics: dict[str, Metric], images: int, groups: Sequence[str] | None) -> dict[str, list[float]]:
    """The 95 % interval of each metric of so many images: Wilson's of top-1 and top-5, of all else by the bootstrap.

    With `groups` these are drawn, and no interval is Wilson's.
    """
    whole, drawn = torch.ones(1, images, dtype=torch.float64), {name: list[torch.Tensor]() for name in metrics}
    shares = {name: metrics[name](whole).item() for name in ("top1", "top5") if name in metrics and not groups}
    for weights in resampled(images, groups):
        for name in drawn.keys() - shares.keys():
            drawn[name].append(metrics[name](weights))
    return {name: [*wilson(shares[name], images)] if name in shares else middle_of(torch.cat(drawn[name])) for name in metrics}


def middle_of(drawn: torch.Tensor) -> Any:
    """Where the middle 95 % of the draws [draws, ...] begin and end, [2, ...] as a list; draws that are NaN are left out."""
    return drawn.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()


def resampled(images: int, groups: Sequence[str] | None) -> Iterator[torch.Tensor]:
    """How often each image is drawn, [draws, images], in 1,000 draws with replacement of as many images, or groups."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups or ()))}
    owner = torch.tensor([numbers[name] for name in groups]) if groups else torch.arange(images)
    units = len(numbers) or images
    generator, left = torch.Generator().manual_seed(0), DRAWS
    while left:
        draws = min(left, max(1, AT_ONCE // units))
        drawn = torch.randint(units, (draws, units), generator=generator)
        yield torch.zeros(draws, units).scatter_add_(1, drawn, torch.ones(draws, units))[:, owner]
        left -= draws


def metrics_of(
    loss: str, logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, units: Units | None = None
) -> dict[str, Metric]:
    """Each metric as a function of weights [draws, n] of the images, of logits [n, classes] that have a label.

    Of one label an image: top-1, top-5, balanced accuracy, macro F1, Cohen's kappa, the same with quadratic weights, AUROC and
    average precision (the mean over classes, each against the rest); of several: mean average precision, macro F1 at a
    probability of 0.5, AUROC. Of both: log loss, Brier score and calibration error, at the temperature. Of numbers those of
    `mean_metrics`. Definitions are scikit-learn's; docs/metrics.md has them.
    """
    if loss in NUMBER_LOSSES:
        return mean_metrics(logits, labels, to_grades(logits, units))
    kind = "softmax" if loss == "cross_entropy" else "sigmoid"
    curves = once(lambda weights: over_classes((area_under, precision), weights, class_columns(kind, logits, labels)))
    if loss == "multi_label":
        ranked = once(lambda weights: over_classes((precision,), weights, class_columns("logits", logits, labels)))
        found: dict[str, Metric] = {
            "mean_average_precision": lambda weights: ranked(weights)[0].nan_to_num().mean(1),  # 0 of a class without images
            "macro_f1": several_f1(logits > 0, labels),
        }
    else:
        found = single_label(logits, labels) | {"average_precision": lambda weights: curves(weights)[1].nanmean(1)}
    found["auroc"] = lambda weights: curves(weights)[0].nanmean(1)
    return found | of_probabilities(loss, logits, labels, temperature)


def once(function: Callable[[torch.Tensor], T]) -> Callable[[torch.Tensor], T]:
    """Keeps the last answer: several metrics ask with the same weights, one after the other."""
    kept: list[tuple[torch.Tensor, T]] = []

    def ask(weights: torch.Tensor) -> T:
        if not kept or kept[0][0] is not weights:
            kept[:] = [(weights, function(weights))]
        return kept[0][1]

    return ask


def several_f1(predicted: torch.Tensor, labels: torch.Tensor) -> Metric:
    """Macro F1 of what is predicted of each image, bool [n, classes], against several labels."""
    guess, truth = predicted.float(), labels.float()
    return lambda weights: f1(sums(weights, truth * guess), sums(weights, truth), sums(weights, guess)).mean(1)


def single_label(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Metric]:
    """Those that depend on which classes are predicted alone, and not on how surely."""
    said = logits.argmax(1)
    right = (said == labels).float()
    counts = once(lambda weights: weighted_counts(logits, labels, weights))

    def balanced(weights: torch.Tensor) -> torch.Tensor:
        hits, labelled, _ = counts(weights)
        return (hits / labelled).nanmean(1)  # of the classes that are there

    def kappa(weights: torch.Tensor) -> torch.Tensor:
        images, (_, labelled, predicted) = weights.sum(1).double(), counts(weights)
        by_chance = (labelled.double() * predicted.double()).sum(1) / images**2
        return (sums(weights, right) / images - by_chance) / (1 - by_chance)

    found: dict[str, Metric] = {
        "top1": lambda weights: sums(weights, right) / weights.sum(1),
        "balanced_accuracy": balanced,
        "macro_f1": lambda weights: f1(*counts(weights)).mean(1),
        "kappa": kappa,
        "quadratic_kappa": lambda weights: quadratic_kappa(weights, said[:, None], labels[:, None])[:, 0],
    }
    if logits.shape[1] > 5:
        among = (logits.topk(5).indices == labels[:, None]).any(1).float()
        found["top5"] = lambda weights: sums(weights, among) / weights.sum(1)
    return found


def of_probabilities(loss: str, logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> dict[str, Metric]:
    """Those of the probabilities themselves."""
    same = torch.full((len(labels),), temperature, dtype=torch.float64)
    losses, scores, gaps = probability_errors(loss, logits, labels, same)

    def mean(values: torch.Tensor) -> Metric:
        return lambda weights: sums(weights.double(), values) / weights.sum(1)

    return {
        "log_loss": mean(losses),
        "brier": mean(scores),
        "ece": lambda weights: sums(weights.double(), gaps).abs().sum(1) / weights.sum(1),
    }


def sums(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weighted sums, [draws, ...], of values of the images, [n, ...]."""
    return weights @ values.to(weights.dtype)


def f1(hits: torch.Tensor, labelled: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """The F1 of each class, 0 of one that is neither labelled nor predicted."""
    return 2 * hits / (labelled + predicted).clamp(min=1)


def class_columns(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(scores, "softmax", "sigmoid" or "logits"; 1 where it is labelled, else 0) of each class, [n], in float64."""
    if kind == "softmax":
        total = torch.cat([part.logsumexp(1, keepdim=True) for (part,) in in_parts(logits)])
    for first in range(0, logits.shape[1], COLUMNS):
        part = logits[:, first : first + COLUMNS].double()
        if kind != "logits":
            part = (part - total).exp() if kind == "softmax" else part.sigmoid()
        for i, scores in enumerate(part.T.contiguous(), first):
            yield scores, (labels[:, i] if labels.ndim == 2 else labels == i).double()


def over_classes(
    curves: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    weights: torch.Tensor,
    columns: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> list[torch.Tensor]:
    """Of each kind of curve a number for each class, [draws, classes]; NaN where it is not defined."""
    values, weights = [list[torch.Tensor]() for _ in curves], weights.double()
    for score, there in columns:
        levels, place = score.unique(return_inverse=True)  # in order: images of equal scores share a threshold
        none, at = weights.new_zeros(len(weights), len(levels)), there.nonzero()[:, 0]
        whole, positive = none.index_add(1, place, weights), none.index_add(1, place[at], weights[:, at])
        for found, curve in zip(values, curves, strict=True):
            found.append(curve(positive, whole - positive))
    return [torch.stack(found, 1) for found in values]


def area_under(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The area under the ROC curve, [draws], of weights [draws, levels] by rising score: ties count half (Mann-Whitney)."""
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def precision(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The average precision, [draws]: precision at each threshold, weighted by the recall that it adds."""
    hits, false = (part.flip(1).cumsum(1) for part in (positive, negative))
    return (hits / (hits + false).clamp(min=1e-12) * positive.flip(1)).sum(1) / hits[:, -1]
