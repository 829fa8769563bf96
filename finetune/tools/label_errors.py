"""Likely wrong labels and outliers, by the features of a frozen network."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.channels import fit_preprocessing
from finetune.data.dataset import Images
from finetune.data.loader import ImageDataset, unpickled
from finetune.data.split import place
from finetune.images.transforms import eval_transform
from finetune.models.backbone import build_backbone, memory_format
from finetune.models.linear_probe import Loss, Units, check_probe, fit, give_units, returns_features
from finetune.models.pretrained import preprocessing, pretrained_state
from finetune.recipe import Recipe
from finetune.training.evaluate import predict_logits
from finetune.training.setup import DEFAULTS, RunOptions, make_accelerator

FOLDS = 5
NEIGHBOURS = 10
FAR = 5.0  # robust standard deviations above the median distance to the neighbours


def compute_features(recipe: Recipe, images: Images, classes: Sequence[str]) -> torch.Tensor:
    """Features [n, d] of the recipe's network, without its head, of a map-style set of (PIL image, label).

    Raises:
        RecipeError: if there are no such weights, or the head is no linear layer.
    """
    net = build_backbone(recipe, len(classes), pretrained_state(recipe))
    inputs = fit_preprocessing(preprocessing(recipe, net), images, recipe.data)
    return features_of(recipe, net, ImageDataset(images, eval_transform(inputs), 0, classes))


def features_of(
    recipe: Recipe, net: nn.Module, dataset: ImageDataset, options: RunOptions = DEFAULTS, text: str = "features"
) -> torch.Tensor:
    """Features [n, d] of the recipe's network, which is `net`, of images, preprocessed as for evaluation; `text` stands before
    the bar."""
    accelerator, layout = make_accelerator(recipe), memory_format(recipe, net)
    layer = check_probe(recipe, net)
    net.to(accelerator.device).to(memory_format=layout)
    inputs = dataset.transform.preprocessing if recipe.data.channels else preprocessing(recipe, net)
    of_net = {"transform": eval_transform(inputs), "memory_format": layout, "kept_loader": None}
    own = unpickled(None, dataset.__dict__ | of_net)  # the decoded images stay those of the dataset
    with returns_features(layer):
        return predict_logits(recipe, net, own, accelerator, options, text=text)[0]


def deal_folds(labels: np.ndarray, units: Sequence[str]) -> torch.Tensor:
    """The fold of each image, [n]: each class is spread evenly, in the order of hashes of the units' names.

    Images of one unit, a name or a group of images that belong together, stay together. Several labels an image are not spread.
    """
    first: dict[str, int] = {}
    for i, unit in enumerate(units):
        first.setdefault(unit, i)
    order = sorted(first, key=lambda unit: (0 if labels.ndim > 1 else labels[first[unit]], place(unit)))
    fold_of = {unit: number % FOLDS for number, unit in enumerate(order)}
    return torch.tensor([fold_of[unit] for unit in units])


def new_probe(features: torch.Tensor, targets: torch.Tensor, outputs: int, of_numbers: bool) -> nn.Linear:
    """A head for features [n, d]; where targets [n, numbers] are numbers, it gives them in their own units."""
    head = nn.Linear(features.shape[1], outputs, device=features.device).eval()
    if of_numbers:
        deviation, mean = torch.std_mean(targets.double(), 0, correction=0)
        give_units(head, Units(tuple(mean.tolist()), tuple(deviation.clamp(min=1e-30).tolist())))
    return head


def out_of_fold_logits(
    features: torch.Tensor,
    targets: torch.Tensor,
    folds: torch.Tensor,
    num_classes: int,
    loss: Loss,
    own_l2: bool = True,
    of_numbers: bool = False,
) -> torch.Tensor:
    """Logits [n, classes] of each image, by linear probes that were fitted to the other folds' images; or numbers.

    Each probe chooses its penalty on the images that it is fitted to; without `own_l2` the first one's is that of all.
    """
    logits, l2 = features.new_empty(len(targets), num_classes), None
    for fold in range(FOLDS):
        inside = folds == fold
        head = new_probe(features, targets[~inside], num_classes, of_numbers)
        l2 = fit(head, features[~inside], targets[~inside], loss, None if own_l2 else l2)
        with torch.no_grad():
            logits[inside] = head(features[inside])
    return logits


def out_of_fold_probs(features: torch.Tensor, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Probabilities [n, classes] of each image by `out_of_fold_logits`, in folds of `deal_folds`, with one penalty."""
    loss, folds = partial(cross_entropy, reduction="sum"), deal_folds(labels, names)
    logits = out_of_fold_logits(features, torch.from_numpy(labels), folds, int(labels.max()) + 1, loss, own_l2=False)
    return logits.double().softmax(1).numpy()


def find_label_errors(probs: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, float]]:
    """(image, likely label, probability of the given label) of each likely wrong label, the least probable first.

    Confident learning (arXiv 1911.00068), as cleanlab's find_label_issues(filter_by="confident_learning"): a class counts as
    confident where its probability reaches the mean of those of the images that are labelled so.
    """
    rows = np.arange(len(labels))
    thresholds = np.array([probs[labels == k, k].mean() if (labels == k).any() else np.inf for k in range(probs.shape[1])])
    confident = probs >= thresholds - 1e-6
    guesses = np.where(confident.sum(1) > 1, probs.argmax(1), confident.argmax(1))
    given = probs[rows, labels]
    wrong = confident.any(1) & (guesses != labels) & (probs.max(1) > given + 1e-6)
    found = [(int(i), int(guesses[i]), float(given[i])) for i in np.flatnonzero(wrong)]
    return sorted(found, key=lambda row: row[2])


def find_outliers(features: torch.Tensor) -> list[tuple[int, float]]:
    """(image, distance) of images that are far from their nearest neighbours, by the cosine of features, the farthest first.

    The distance is a mean over 10 neighbours, in robust standard deviations above the median of all images.
    """
    units = nn.functional.normalize(features.float() - features.float().mean(0))
    most = min(NEIGHBOURS, len(units) - 1)
    if most < 1:
        return []
    parts = [(part @ units.T).topk(most + 1).values[:, 1:].mean(1) for part in units.split(1000)]  # the first is itself
    distances = 1 - torch.cat(parts).numpy()
    middle = np.median(distances)
    spread = 1.4826 * np.median(np.abs(distances - middle))
    scores = (distances - middle) / max(spread, 1e-9)
    return sorted(((int(i), float(scores[i])) for i in np.flatnonzero(scores > FAR)), key=lambda row: -row[1])
