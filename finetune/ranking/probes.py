"""Linear probes on the features of frozen networks: how well they tell a task's images apart, and what they cost."""

import platform
from collections.abc import Callable
from pathlib import Path
from timeit import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from finetune.data.dataset import ImageData, Images
from finetune.data.loader import ImageDataset
from finetune.images.transforms import eval_transform
from finetune.metrics.compute import compute_metrics
from finetune.models.backbone import build_backbone, memory_format
from finetune.models.linear_probe import Loss, fit
from finetune.models.pretrained import pretrained_state
from finetune.optim.loss import binary_losses
from finetune.ranking.candidates import Candidate
from finetune.ranking.features import digest_array, digest_images, keep, place_of, recall
from finetune.recipe import Recipe
from finetune.results.paired import interval_of
from finetune.tools.label_errors import features_of, new_probe, out_of_fold_logits
from finetune.training.distributed import default_workers
from finetune.training.setup import RunOptions, make_accelerator
from finetune.utils.text import progress

UNEVEN = 1.5  # largest class / smallest, from which macro F1 stands beside top-1


class Task(NamedTuple):
    """The images of a source, with what is asked of every candidate."""

    data: ImageData
    source: str
    base: Recipe  # has loss and metric
    uneven: float
    content: str  # of the training images
    folds: torch.Tensor  # [n] of the training images
    cache: Path

    @property
    def metrics(self) -> list[str]:
        """The one that ranks, and one to stand beside it."""
        if self.base.of_numbers:
            return [self.base.metric, "spearman"]
        return [self.base.metric, *["macro_f1"] * (self.uneven >= UNEVEN and self.base.metric != "macro_f1")]


def preprocessing_of(one: Candidate) -> dict[str, Any]:
    """A candidate's preprocessing."""
    return dict(one.key["preprocessing"])


def feature_file(task: Task, one: Candidate, content: str) -> Path:
    """Where a candidate's features of images with this digest are kept."""
    return place_of(task.cache, one.key | {"images": content})


def speed_of(task: Task, one: Candidate) -> float:
    """Images a second of the forward pass on this machine: as it was measured with features that are kept, or measured now.

    Of 8 random images on a CPU, 64 on a GPU, the fastest pass of three, or of those of a second. The pretrained network is
    built for it, so that what does not fit is found before the long part.

    Raises:
        RecipeError: for weights that do not fit the network, or a network whose logits are not its head's.
    """
    kept = recall(feature_file(task, one, task.content))
    device = make_accelerator(one.recipe).device
    if kept and kept[1].get("machine") == machine_of(device):
        return float(kept[1]["images_per_second"])
    net = build_backbone(one.recipe, len(task.data.classes), pretrained_state(one.recipe))
    layout, images = memory_format(one.recipe, net), 8 if device.type == "cpu" else 64
    net.eval().to(device).to(memory_format=layout)
    batch = torch.rand(images, *one.recipe.data.shape).to(device).contiguous(memory_format=layout)
    with torch.no_grad():
        seconds = repeat(lambda: net(batch).sum().item(), number=1, repeat=3)
        while sum(seconds) < 1:
            seconds += repeat(lambda: net(batch).sum().item(), number=1, repeat=3)
    return images / min(seconds)


def machine_of(device: torch.device) -> str:
    """What tells a machine's speeds from another's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{platform.node()} {name} {torch.get_num_threads()}"


def features_for(task: Task, one: Candidate, dataset: ImageDataset, content: str, speed: float) -> torch.Tensor:
    """A candidate's features [n, d] of a dataset whose images have this digest, kept or computed and then kept."""
    file = feature_file(task, one, content)
    if kept := recall(file):
        return kept[0]
    net = build_backbone(one.recipe, len(task.data.classes), pretrained_state(one.recipe))
    device = make_accelerator(one.recipe).device
    options, machine = RunOptions(workers=default_workers(None, device.type)), machine_of(device)
    features = features_of(one.recipe, net, dataset, options, one.label)
    keep(file, features, {"backbone": one.recipe.backbone, "images_per_second": speed, "machine": machine})
    return features


def score(task: Task, one: Candidate, dataset: ImageDataset, speed: float) -> dict[str, Any]:
    """A candidate's row: metrics of linear probes on training images out of their folds, and what it costs."""
    features, targets = features_for(task, one, dataset, task.content, speed), targets_of(task, task.data.train)
    labels = digest_array(targets)
    key = {"features": feature_file(task, one, task.content).stem, "labels": labels, "folds": digest_array(task.folds)}
    file = place_of(task.cache, key)
    if kept := recall(file):
        logits = kept[0]
    else:
        device = make_accelerator(one.recipe).device
        x, y, folds = (part.to("cpu" if device.type == "mps" else device) for part in (features, targets, task.folds))
        with progress(None, None, f"{one.label}: fits of the head") as bar:
            loss, of_numbers = loss_of(task.base, bar.update), task.base.of_numbers
            logits = out_of_fold_logits(x, y, folds, len(task.data.classes), loss, of_numbers=of_numbers).cpu()
        keep(file, logits, {})
    metrics = compute_metrics(one.recipe, logits, targets)
    row: dict[str, Any] = {"name": one.label, "backbone": one.recipe.backbone, "weights": one.recipe.weights}
    row |= {"image_size": one.recipe.data.image_size, "parameters": one.parameters, "features": features.shape[1]}
    row |= {metric: metrics[metric] for metric in task.metrics}
    interval = interval_of(one.recipe, logits, targets)
    return row | {"interval": interval, "images_per_second": speed, "licence": one.licence}


def dataset_of(task: Task, one: Candidate, images: Images) -> ImageDataset:
    """Images as a candidate takes them."""
    dataset = ImageDataset(images, eval_transform(preprocessing_of(one)), 0, task.data.classes)
    dataset.multi_label, dataset.of_numbers = task.base.loss == "multi_label", task.base.of_numbers
    return dataset


def targets_of(task: Task, images: Any) -> torch.Tensor:
    """Labels [n], or [n, classes] of 0 and 1, or numbers."""
    labels = torch.as_tensor(np.asarray(images.labels))
    if task.base.of_numbers:
        return labels
    return labels.float() if task.base.loss == "multi_label" else labels.long()


def loss_of(recipe: Recipe, called: Callable[[], Any] = lambda: None) -> Loss:
    """The loss of a linear probe, a sum over images; `called` hears of each time that it is computed. Of numbers none is."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        called()
        if recipe.loss == "multi_label":
            return binary_losses(logits, labels.to(logits), 0.0, True).sum()
        return cross_entropy(logits, labels, reduction="sum")

    return loss


def validate(task: Task, one: Candidate) -> dict[str, Any]:
    """The metric on the validation images of the network that was chosen without them; its head is fitted to all training
    images."""
    train, _ = recall(feature_file(task, one, task.content)) or (None, None)
    assert train is not None  # just ranked
    speed, dataset = speed_of(task, one), dataset_of(task, one, task.data.val)
    val = features_for(task, one, dataset, digest_images(task.data.val), speed)
    known = targets_of(task, task.data.train)
    head = new_probe(train, known, len(task.data.classes), task.base.of_numbers)
    l2 = fit(head, train, known, loss_of(task.base), None)
    targets = targets_of(task, task.data.val)
    with torch.no_grad():
        logits = head(val)
    value = compute_metrics(one.recipe, logits, targets)[task.base.metric]
    interval = interval_of(one.recipe, logits, targets)
    return {"name": one.label, "images": len(targets), task.base.metric: value, "interval": interval, "l2": l2}
