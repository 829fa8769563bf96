"""How often each class, and each pair of classes, was labelled and predicted."""

import torch


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
