"""What is counted on the validation images: each one once, the same on any number of processes."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.loader import ImageDataset, is_unreadable, load
from finetune.models.backbone import memory_format
from finetune.optim.loss import binary_loss
from finetune.recipe import Recipe
from finetune.train.distributed import gather_strided


def compute_metrics(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The scores of logits [n, classes] against labels [n], or [n, classes] of 0 and 1; images without a label are left out.

    Of one label an image: loss, top-1 (top-5 where there are more than 5 classes), macro F1 and the accuracy of each class. Of
    several: loss, mean average precision, macro F1 at a probability of 0.5 and the average precision of each class. All but
    the loss are fractions.
    """
    seen = ~is_unreadable(labels)
    logits, labels = logits[seen].double(), labels[seen]
    if recipe.loss == "cross_entropy":
        loss = cross_entropy(logits, labels)
    else:
        loss = binary_loss(logits, labels, 0.0, recipe.loss == "multi_label") / len(labels)
    several = of_several_labels if recipe.loss == "multi_label" else of_one_label
    return {"loss": loss.item(), "val_images": len(labels), **several(logits, labels)}


def of_one_label(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Macro F1 is the mean over classes of 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0."""
    matrix = confusion_matrix(logits, labels).double()
    right, there, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    found = {
        "top1": (right.sum() / matrix.sum()).item(),
        "macro_f1": (2 * right / (predicted + there).clamp(min=1)).mean().item(),
    }
    if logits.shape[1] > 5:
        found["top5"] = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    return found | {"class_accuracy": (right / there.clamp(min=1)).tolist()}


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images by label (rows) and by predicted class (columns): int [classes, classes]."""
    num_classes = logits.shape[1]
    return torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2).reshape(num_classes, num_classes)


def of_several_labels(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """By torchmetrics; a class that no image has counts as 0."""
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score  # takes a second

    chances, labels, num_classes = logits.sigmoid(), labels.long(), logits.shape[1]
    precisions = multilabel_average_precision(chances, labels, num_classes, average=None).nan_to_num(0.0)
    f1 = multilabel_f1_score(chances, labels, num_classes)
    return {
        "mean_average_precision": precisions.mean().item(),
        "macro_f1": f1.item(),
        "class_average_precision": precisions.tolist(),
    }


@torch.no_grad()
def predict_logits(
    recipe: Recipe,
    net: nn.Module,
    images: ImageDataset,
    accelerator: Accelerator,
    accumulate: int = 1,
    workers: int = 0,
    epoch: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], labels) of every image once, in their order, on the CPU; the same on every process.

    `epoch` decides how images that are varied are.

    With `flip_test` the logits are the mean of those of the image and of its mirror image.
    """
    net.eval()
    mine = list(range(accelerator.process_index, len(images), accelerator.num_processes))
    size = recipe.data.batch_size // (accelerator.num_processes * accumulate)
    outputs, targets = [], []
    for batch, labels in load(
        images, epoch, [mine[i : i + size] for i in range(0, len(mine), size)], workers, accelerator.device
    ):
        batch = batch.contiguous(memory_format=memory_format(recipe))
        with accelerator.autocast():
            logits = (net(batch) + net(batch.flip(-1))) / 2 if recipe.flip_test else net(batch)
        outputs.append(logits.float())
        targets.append(labels)
    total = len(images)
    return gather_strided(outputs, total, accelerator).cpu(), gather_strided(targets, total, accelerator).cpu()
