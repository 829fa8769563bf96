"""How well each class is told from the others, and how far chance moves that."""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.metrics.calibration import groups_with_labels, with_labels
from finetune.metrics.counts import weighted_counts
from finetune.metrics.intervals import wilson
from finetune.metrics.measure import f1, middle_of, resampled


def class_metrics(
    logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], groups: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Images, precision, recall and F1 of each class, of labels [n], or [n, classes] of 0 and 1, that could be read.

    "intervals" are of 95 %: Wilson's, of F1 by way of the share J of the right predictions among the images that are labelled
    or predicted as the class, as F1 = 2 J / (1 + J); where images belong to `groups`, those of 1,000 bootstraps of these.
    What has no images to be a share of, such as the precision of a class that is never predicted, has no interval.
    """
    owners = groups_with_labels(groups, labels)
    logits, labels = with_labels(logits, labels)
    counts = weighted_counts(logits, labels, torch.ones(1, len(labels), dtype=torch.float64))
    values, (hits, labelled, predicted) = shares_of(*counts), (part[0].long().tolist() for part in counts)
    drawn = bootstrap(logits, labels, owners) if owners else None
    rows = []
    for i, name in enumerate(classes):
        sizes = {"precision": predicted[i], "recall": labelled[i], "f1": labelled[i] + predicted[i] - hits[i]}
        shown = [key for key, size in sizes.items() if size]
        if drawn:
            intervals = {key: [ends[i] for ends in drawn[key]] for key in shown}
        else:
            intervals = {key: [*wilson(hits[i] / sizes[key], sizes[key])] for key in shown}
            if "f1" in shown:
                intervals["f1"] = [2 * share / (1 + share) for share in intervals["f1"]]
        row = {"class": name, "images": labelled[i], **{key: column[0, i].item() for key, column in values.items()}}
        rows.append(row | {"intervals": intervals})
    return rows


def bootstrap(logits: torch.Tensor, labels: torch.Tensor, groups: Sequence[str]) -> dict[str, list[list[float]]]:
    """The ends of the intervals, [2, classes] for each share."""
    drawn = [shares_of(*weighted_counts(logits, labels, weights)) for weights in resampled(len(labels), groups)]
    return {name: middle_of(torch.cat([shares[name] for shares in drawn])) for name in drawn[0]}


def shares_of(hits: torch.Tensor, labelled: torch.Tensor, predicted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Precision, recall and F1, 0 where they are 0 / 0."""
    return {
        "precision": hits / predicted.clamp(min=1),
        "recall": hits / labelled.clamp(min=1),
        "f1": f1(hits, labelled, predicted),
    }
