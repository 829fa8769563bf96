"""What is gained by leaving out the images of which a network is least sure."""

import torch

from finetune.metrics.calibration import confidences, in_parts, probabilities, with_labels

SHARES = (1.0, 0.95, 0.9, 0.8, 0.5)


def coverage_table(loss: str, logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> list[dict[str, float]]:
    """A row for each share of the images that are kept, the surest first: {"coverage", "threshold", "error"}.

    "threshold" is the lowest probability among those kept, "error" the share of these that is wrong. Images of one probability
    are kept or left out together, so the coverage may be more than asked for.
    """
    confidence, errors = risk_by_coverage(loss, logits, labels, temperature)
    rows = []
    for share in SHARES if len(errors) else ():
        threshold = confidence[max(1, round(share * len(confidence))) - 1].item()
        kept = int((confidence >= threshold).sum())
        rows.append({"coverage": kept / len(confidence), "threshold": threshold, "error": errors[kept - 1].item()})
    return rows


def risk_by_coverage(
    loss: str, logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities of what is predicted, falling; the share of errors among the images up to each), each [n].

    Of one label an image.
    """
    parts = in_parts(*with_labels(logits, labels))
    found = [confidences(loss, probabilities(loss, part, temperature), own) for part, own in parts]
    confidence, right = map(torch.cat, zip(*found, strict=True))
    order = confidence.argsort(descending=True, stable=True)
    return confidence[order], (1 - right[order]).cumsum(0) / torch.arange(1, len(order) + 1)
