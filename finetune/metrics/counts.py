"""How often each class, and each pair of classes, was labelled and predicted."""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.data.loader import is_unreadable


def count_classes(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(right predictions, images, predictions) of each class [classes]."""
    said = logits.argmax(1)
    right, labelled, predicted = (
        torch.bincount(part, minlength=logits.shape[1]) for part in (labels[said == labels], labels, said)
    )
    return right, labelled, predicted


def count_pairs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels, predicted classes, numbers of images) of the pairs that there are, in order: no more of them than images."""
    pairs, counts = torch.unique(labels * logits.shape[1] + logits.argmax(1), return_counts=True)
    return pairs // logits.shape[1], pairs % logits.shape[1], counts


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images by label (rows) and by predicted class (columns): int [classes, classes]."""
    num_classes = logits.shape[1]
    return torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2).reshape(num_classes, num_classes)


def class_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images, precision, recall and F1 of each class, of labels [n], or [n, classes] of 0 and 1, that could be read."""
    seen = ~is_unreadable(labels)
    logits, labels = logits[seen], labels[seen]
    if labels.ndim == 2:
        truth, guess = labels.bool(), logits.sigmoid() > 0.5
        true_positives, labelled, predicted = (part.sum(0) for part in (truth & guess, truth, guess))
    else:
        true_positives, labelled, predicted = count_classes(logits, labels)
    columns = {
        "images": labelled,
        "precision": true_positives / predicted.clamp(min=1),
        "recall": true_positives / labelled.clamp(min=1),
        "f1": 2 * true_positives / (predicted + labelled).clamp(min=1),
    }
    return [
        {"class": name, **{key: column[label].item() for key, column in columns.items()}} for label, name in enumerate(classes)
    ]
