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


def weighted_counts(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(right predictions, images, predictions) of each class, [draws, classes], of weights [draws, n] of the images."""
    if labels.ndim == 2:
        truth, guess = labels.to(weights), (logits > 0).to(weights)  # a probability above 0.5
        return weights @ (truth * guess), weights @ truth, weights @ guess
    said, none = logits.argmax(1), weights.new_zeros(len(weights), logits.shape[1])
    right = said == labels
    pairs = ((labels[right], weights[:, right]), (labels, weights), (said, weights))
    hits, labelled, predicted = (none.index_add(1, place, part) for place, part in pairs)
    return hits, labelled, predicted
