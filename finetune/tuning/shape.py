"""Whether long images are better cut, given borders or squashed: tried with linear probes."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from finetune.data.dataset import ImageList
from finetune.data.loader import ImageDataset
from finetune.data.sources import load_data
from finetune.images.transforms import eval_transform
from finetune.metrics.compute import compute_metrics
from finetune.models.backbone import build_backbone, is_timm, meta_backbone
from finetune.models.linear_probe import check_probe
from finetune.models.pretrained import preprocessing, pretrained_state
from finetune.ranking.candidates import is_cached
from finetune.ranking.probes import loss_of
from finetune.recipe import Recipe
from finetune.results.paired import compare, in_points
from finetune.tools.image_stats import recipe_for
from finetune.tools.label_errors import deal_folds, features_of, out_of_fold_logits
from finetune.training.setup import own_accelerator_state
from finetune.utils.errors import RecipeError
from finetune.utils.seed import keep_random_state

LONG = 1.5  # median of longer side / shorter side, from which it matters
TRIED = 400  # training images, at most
FEWEST = 20
Way = Literal["crop", "pad", "squash"]
WAYS: tuple[Way, ...] = ("crop", "pad", "squash")


def choose_resize(recipe: Recipe) -> tuple[Way, str]:
    """(a value of `Data.resize`, the reason), by linear probes on features of training images out of their folds.

    "crop" unless another way is better by more than chance, on the same images. Without weights that are here already, with
    few images or a head of several layers, nothing is tried.
    """
    way, why = WAYS[0], "the middle of long images; pad and squash show all of them: not tried, for want of "
    if recipe.weights == "none" or recipe.weights == "hub" and not (is_timm(recipe) and is_cached(str(recipe.backbone))):
        return way, f"{why}weights"
    try:
        check_probe(recipe, meta_backbone(recipe, 10))
    except RecipeError:
        return way, f"{why}a head of one linear layer"
    asked = recipe_for(str(recipe.data.source))
    recipe = replace(recipe, loss=asked.loss, metric=asked.metric, data=replace(recipe.data, batch_size=64, crop_pct=1.0))
    data = load_data(recipe)
    train = data.train
    assert isinstance(train, ImageList)  # as of every source but a function
    train = train.part(np.unique(np.linspace(0, len(train) - 1, TRIED, dtype=int)).tolist())
    if len(train) < FEWEST:
        return way, f"{why}images"
    labels = torch.as_tensor(np.asarray(train.labels))
    folds = deal_folds(labels.numpy(), train.groups or [str(i) for i in range(len(train))])
    logits = {}
    with own_accelerator_state(), keep_random_state():
        state = pretrained_state(recipe)
        for name in WAYS:
            one = replace(recipe, data=replace(recipe.data, resize=name))
            net = build_backbone(one, len(data.classes), state)
            images = ImageDataset(train, eval_transform(preprocessing(one, net)), 0, data.classes)
            features = features_of(one, net, images, text=f"features, resize={name}")
            logits[name] = out_of_fold_logits(features.cpu(), labels, folds, len(data.classes), loss_of(recipe))
    best: Way = max(WAYS, key=lambda name: compute_metrics(recipe, logits[name], labels)[recipe.metric])
    found = compare(recipe, logits[best], [logits[way]], labels) if best != way else {"verdict": "none"}
    tried = f"in linear probes on {len(train)} training images"
    if found["verdict"] == "gain":
        return best, f"{in_points(found)} points better than crop {tried}"
    return way, f"no worse than pad and squash {tried}" if best == way else f"{best} is within chance of it {tried}"
