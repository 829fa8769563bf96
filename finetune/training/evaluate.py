"""Logits and metrics on validation images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.loader import ImageDataset, is_unreadable, load
from finetune.optim.loss import binary_losses
from finetune.recipe import Recipe
from finetune.training.distributed import gather_strided
from finetune.training.setup import DEFAULTS, RunOptions
from finetune.utils.errors import RecipeError
from finetune.utils.text import print_error, progress


@torch.no_grad()
def predict_logits(
    recipe: Recipe,
    net: nn.Module,
    images: ImageDataset,
    accelerator: Accelerator,
    options: RunOptions = DEFAULTS,
    epoch: int = 0,
    text: str = "images",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], labels) of every image once, in their order, on the CPU; the same on every process.

    `epoch` decides how images that are augmented look, `text` stands before the bar.
    """
    net.eval()
    # Every process computes on as many, the last image again where there is none: all take part in gathering.
    processes, total = accelerator.num_processes, len(images)
    mine = [min(i, total - 1) for i in range(accelerator.process_index, -(-total // processes) * processes, processes)]
    size = recipe.data.batch_size // (processes * options.accumulate)
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    outputs, targets = [], []
    loaded = load(images, epoch, batches, options.workers, accelerator.device)
    for batch, labels in progress(loaded, len(batches), text, accelerator.is_main_process and not options.quiet):
        outputs.append(batch_logits(recipe, net, batch, accelerator))
        targets.append(labels)
    logits, labels = gather_strided(outputs, total, accelerator).cpu(), gather_strided(targets, total, accelerator).cpu()
    if (missing := is_unreadable(labels)).any():
        check_left_out(images, missing)
        if accelerator.is_main_process:
            which = "" if text == "images" else f" ({text})"
            print_error(f"{int(missing.sum())} of {total} images could not be read and were left out{which}")
    return logits, labels


def batch_logits(recipe: Recipe, net: nn.Module, batch: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Logits [n, classes] in float32 of a batch of images; with `flip_test` the mean over each image and its mirror image."""
    with accelerator.autocast():
        logits: torch.Tensor = (net(batch) + net(batch.flip(-1))) / 2 if recipe.flip_test else net(batch)
    return logits.float()


def check_left_out(images: ImageDataset, missing: torch.Tensor) -> None:
    """Raise RecipeError if, without the `missing` images, bool [n], nothing is left of them all or of a class."""
    if missing.all():
        raise RecipeError("no image could be read")
    labels = getattr(images.images, "labels", None)  # a function's data set need not know them
    if labels is not None and np.ndim(labels) == 1:
        gone = sorted({*np.asarray(labels).tolist()} - {*np.asarray(labels)[~missing.numpy()].tolist()})
        if gone:
            raise RecipeError(f"no image of class '{images.classes[gone[0]]}' could be read")


def compute_metrics(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Metrics of logits [n, classes] against labels [n], or [n, classes] of 0 and 1; images without a label are left out.

    Of one label an image: loss, top-1 (top-5 where there are more than 5 classes), macro F1 and the accuracy of each class. Of
    several: loss, mean average precision, macro F1 at a probability of 0.5 and the average precision of each class. All but
    the loss are fractions; a class without an image, or with none predicted, counts as 0.
    """
    seen = ~is_unreadable(labels)
    logits, labels = logits[seen].double(), labels[seen]
    if recipe.loss == "cross_entropy":
        loss = cross_entropy(logits, labels)
    else:
        loss = binary_losses(logits, labels, 0.0, recipe.loss == "multi_label").sum() / len(labels)
    compute = multi_label_metrics if recipe.loss == "multi_label" else single_label_metrics
    return {"loss": loss.item(), "val_images": len(labels), **compute(logits, labels)}


def subgroup_metrics(
    recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor, subgroups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The metrics of the images of each subgroup; `subgroups` names that of each image."""
    return {
        name: compute_metrics(recipe, *(part[[one == name for one in subgroups]] for part in (logits, labels)))
        for name in sorted(set(subgroups))
    }


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


def best_row(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first row of metrics with the highest value."""
    return max(rows, key=lambda row: row[metric])
