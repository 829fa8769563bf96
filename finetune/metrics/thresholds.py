"""Of several labels an image: the probability above which each class is predicted."""

from collections.abc import Sequence

import torch

from finetune.metrics.calibration import FEWEST, FOLDS, calibrate, deal, groups_with_labels, probabilities, with_labels

HALF = 0.5


def fit_outputs(
    loss: str, logits: torch.Tensor, labels: torch.Tensor, groups: Sequence[str] | None
) -> tuple[float, list[float] | None]:
    """(the temperature, of several labels an image the thresholds) that are kept with a network of these logits."""
    temperature = calibrate(loss, logits, labels, groups)["temperature"]
    return temperature, choose_thresholds(logits, labels, temperature, groups)[0] if loss == "multi_label" else None


def choose_thresholds(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    groups: Sequence[str] | None = None,
    thresholds: Sequence[float] | None = None,
) -> tuple[list[float], torch.Tensor]:
    """(a threshold for each class, which classes are predicted of each image that has labels, bool [n, classes]).

    If none are given, they are those with the highest F1 on these images, and what is predicted is so by those of the other
    four fifths of the images, or of their `groups`. Where its macro F1 is not above that at 0.5, or of fewer than 10 images,
    all thresholds are 0.5.
    """
    owners, (logits, labels) = groups_with_labels(groups, labels), with_labels(logits, labels)
    probs, truth = probabilities("multi_label", logits, round(temperature, 4)), labels.bool()  # as it is saved
    if thresholds is not None:
        return list(thresholds), probs > torch.tensor(thresholds, dtype=torch.float64)
    folds = deal(len(truth), owners)
    plain, crossed = probs > HALF, torch.empty_like(truth)
    if len(truth) >= FEWEST and probs.isfinite().all():
        for fold in range(FOLDS):
            here = folds == fold
            crossed[here] = probs[here] > best_thresholds(probs[~here], truth[~here])
        if macro_f1(crossed, truth) > macro_f1(plain, truth):
            return best_thresholds(probs, truth).tolist(), crossed
    return [HALF] * probs.shape[1], plain


def best_thresholds(probs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The threshold of each class, [classes], above which its probabilities [n, classes] have the highest F1.

    All are tried, midway between two probabilities. It is 0.5 where that does as well as any, and of a class without images. A
    class that the network can't tell is best predicted of every image: F1 asks for it (Lipton et al. 2014, arXiv 1402.1892).
    """
    ranked, order = probs.sort(0, descending=True)
    below = torch.cat([ranked[1:], torch.zeros_like(ranked[:1])])
    hits, predicted = truth.gather(0, order).cumsum(0), torch.arange(1, len(probs) + 1)[:, None]
    scores = 2 * hits.double() / (predicted + truth.sum(0))
    scores[ranked == below] = -1  # nothing lies between them
    middle = torch.where((below <= HALF) & (ranked > HALF), HALF, (ranked + below) / 2)
    away = torch.where(scores == scores.max(0).values, (middle - HALF).abs(), torch.inf)
    nearest = middle.gather(0, away.argmin(0)[None])[0]
    return torch.where(truth.any(0), nearest, HALF)


def macro_f1(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean over classes of their F1, 0 of one that is neither labelled nor predicted: of bool [n, classes]."""
    hits = (predicted & truth).sum(0)
    return (2 * hits / (predicted.sum(0) + truth.sum(0)).clamp(min=1)).double().mean().item()


def over_thresholds(logits: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """Logits that are above 0 where the probability of these is above its class's threshold: [n, classes]."""
    return logits.double() - torch.tensor(thresholds, dtype=torch.float64).logit()
