"""What logits are worth against labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from finetune.data.loader import is_unreadable
from finetune.metrics.calibration import in_parts, with_labels
from finetune.metrics.counts import count_classes
from finetune.metrics.measure import intervals_of, metrics_of
from finetune.metrics.numbers import number_metrics, to_grades
from finetune.models.linear_probe import Units
from finetune.optim.loss import binary_losses, number_losses
from finetune.recipe import Recipe
from finetune.recipe.metrics import REPORTED_METRICS, direction
from finetune.utils.errors import RecipeError


def compute_metrics(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor, units: Units | None = None) -> dict[str, Any]:
    """Metrics of logits [n, classes] against labels [n], or [n, classes] of 0 and 1; images without a label are left out.

    Of one label an image: loss, top-1 (top-5 where there are more than 5 classes), macro F1 and the accuracy of each class. Of
    several: loss, mean average precision, macro F1 at a probability of 0.5 and the average precision of each class. All but
    the loss are fractions; a class without an image, or with none predicted, counts as 0.

    Of numbers: MAE, RMSE, R2 and Spearman's correlation, the means over them and, of several, as lists, "number_mae"; with
    `units` the loss and, of grades, quadratic kappa.
    """
    metrics = defined_metrics(recipe, logits, labels, units)
    if recipe.metric not in metrics:
        other = "labels" if recipe.of_numbers else "classes"
        raise RecipeError(f"metric='{recipe.metric}' is not defined here: it takes images of two {other} or more")
    return metrics


def defined_metrics(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor, units: Units | None = None) -> dict[str, Any]:
    """Those of `compute_metrics` that are defined on these images: of one class alone the recipe's own may not be."""
    logits, labels = with_labels(logits, labels)
    if recipe.of_numbers:
        return metrics_of_numbers(recipe.loss, logits.double(), labels, units)
    total = 0.0
    for part, own in in_parts(logits, labels):
        if recipe.loss == "cross_entropy":
            total += cross_entropy(part, own, reduction="sum").item()
        else:
            total += binary_losses(part, own, 0.0, recipe.loss == "multi_label").sum().item()
    compute = multi_label_metrics if recipe.loss == "multi_label" else single_label_metrics
    metrics = {"loss": total / len(labels), "val_images": len(labels), **compute(logits, labels)}
    if recipe.metric not in metrics:
        value = metrics_of(recipe.loss, logits, labels)[recipe.metric](torch.ones(1, len(labels), dtype=torch.float64)).item()
        metrics |= {recipe.metric: value} if value == value else {}
    return metrics


def subgroup_metrics(
    recipe: Recipe,
    logits: torch.Tensor,
    labels: torch.Tensor,
    subgroups: Sequence[str],
    groups: Sequence[str] | None = None,
    units: Units | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of the images of each subgroup, with their "intervals"; `subgroups` names that of each image.

    Where images belong to `groups`, these are drawn for the intervals.
    """
    found, readable = dict[str, dict[str, Any]](), ~is_unreadable(labels)
    for name in sorted(set(subgroups)):
        own = [i for i, one in enumerate(subgroups) if one == name]
        found[name] = defined_metrics(recipe, logits[own], labels[own], units)
        own = [i for i in own if readable[i]]
        metrics = metrics_of(recipe.loss, logits[own], labels[own], units=units)
        shown = {key: metrics[key] for key in (*REPORTED_METRICS, recipe.metric) if key in found[name]}
        found[name]["intervals"] = intervals_of(shown, len(own), [groups[i] for i in own] if groups else None)
    return found


def metrics_of_numbers(loss: str, outputs: torch.Tensor, labels: torch.Tensor, units: Units | None) -> dict[str, Any]:
    """Of numbers: those that are defined."""
    whole = torch.ones(1, len(labels), dtype=torch.float64)
    found = {name: metric(whole)[0] for name, metric in number_metrics(outputs, labels, to_grades(outputs, units)).items()}
    means = {name: value for name, values in found.items() if (value := values.nanmean().item()) == value}
    lists = {f"number_{name}": [None if value != value else value for value in found[name].tolist()] for name in means}
    loss_of = dict[str, float]()
    if units:
        errors = (outputs - labels) / torch.tensor(units.deviation, dtype=torch.float64)
        loss_of = {"loss": number_losses(loss, errors).mean().item()}
    return {**loss_of, "val_images": len(labels), **means, **(lists if labels.shape[1] > 1 else {})}


def single_label_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Of one label an image."""
    true_positives, labelled, predicted = (counts.double() for counts in count_classes(logits, labels))
    metrics = {
        "top1": (true_positives.sum() / len(labels)).item(),
        "macro_f1": (2 * true_positives / (predicted + labelled).clamp(min=1)).mean().item(),
    }
    if logits.shape[1] > 5:
        metrics["top5"] = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    return metrics | {"class_accuracy": (true_positives / labelled.clamp(min=1)).tolist()}


def multi_label_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Of several labels an image."""
    labels, predicted = labels.bool(), logits > 0  # a probability above 0.5
    true_positives = (labels & predicted).sum(0).double()
    precisions = [average_precision(logits[:, i], labels[:, i]) for i in range(labels.shape[1])]
    return {
        "mean_average_precision": sum(precisions) / len(precisions),
        "macro_f1": (2 * true_positives / (labels.sum(0) + predicted.sum(0)).clamp(min=1)).mean().item(),
        "class_average_precision": precisions,
    }


def average_precision(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Precision at each threshold, weighted by the recall that it adds (scikit-learn's definition): of one class, [n]."""
    order = logits.argsort(descending=True)
    hits = labels[order].cumsum(0).double()
    ends = torch.cat([logits[order].diff().nonzero().flatten(), torch.tensor([len(order) - 1])])  # of runs of equal logits
    recall = hits[ends] / hits[-1].clamp(min=1)
    return (recall.diff(prepend=recall.new_zeros(1)) * hits[ends] / (ends + 1)).sum().item()


def best_row(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first row of metrics with the best value."""
    return max(rows, key=lambda row: direction(metric) * row[metric])
