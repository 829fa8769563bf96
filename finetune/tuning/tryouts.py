"""What is tried before a recipe is suggested: how long images are best cut; what an epoch takes here, and what bf16 saves."""

import os
import time
from dataclasses import replace
from functools import partial
from timeit import repeat, timeit
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from finetune.data.batches import BatchPlan
from finetune.data.channels import fit_preprocessing
from finetune.data.dataset import ImageData, ImageList
from finetune.data.loader import Batch, ImageDataset, load_batches
from finetune.data.sources import load_data
from finetune.images.cache import USED
from finetune.images.transforms import eval_transform
from finetune.metrics.compute import compute_metrics
from finetune.models.backbone import build_backbone, is_timm, memory_format, meta_backbone
from finetune.models.batch_norm import set_train_mode
from finetune.models.linear_probe import check_probe
from finetune.models.pretrained import preprocessing, pretrained_state
from finetune.optim.loss import Criterion
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.ranking.candidates import is_cached
from finetune.ranking.probes import loss_of
from finetune.recipe import Group, Recipe
from finetune.recipe.load import override
from finetune.results.paired import compare, in_points
from finetune.tools.label_errors import deal_folds, features_of, out_of_fold_logits
from finetune.training.loop import train_step
from finetune.training.setup import build_datasets, make_accelerator, own_accelerator_state
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.seed import keep_random_state
from finetune.utils.text import duration

SMALLER_SIZES = (160, 128, 96, 64)  # pixels, to try where time is short, in whole patches
LONG = 1.5  # longer side / shorter side, from which it matters
TRIED = 400  # training images, at most
FEWEST = 20
TIMED = 32  # images of a step that is timed, at most: with fewer, bf16 looks slower than it is
Way = Literal["crop", "pad", "squash"]
WAYS: tuple[Way, ...] = ("crop", "pad", "squash")
Precision = Literal["no", "bf16"]
FASTER = 1.2  # times, from which bf16 is worth its rounding


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
    recipe = replace(recipe, data=replace(recipe.data, batch_size=64, crop_pct=1.0))
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
            inputs = fit_preprocessing(preprocessing(one, net), train, one.data)
            images = ImageDataset(train, eval_transform(inputs), 0, data.classes)
            images.of_numbers = recipe.of_numbers
            features = features_of(one, net, images, text=f"features, resize={name}")
            options: dict[str, Any] = {"loss": loss_of(recipe), "of_numbers": recipe.of_numbers}
            logits[name] = out_of_fold_logits(features.cpu(), labels, folds, len(data.classes), **options)
    best: Way = max(WAYS, key=lambda name: compute_metrics(recipe, logits[name], labels)[recipe.metric])
    found = compare(recipe, logits[best], [logits[way]], labels) if best != way else {"verdict": "none"}
    tried = f"in linear probes on {len(train)} training images"
    if found["verdict"] == "gain":
        points = f"R2 {in_points(found, recipe.metric)}, " if recipe.of_numbers else f"{in_points(found)} points "
        return best, f"{points}better than crop {tried}"
    return way, f"no worse than pad and squash {tried}" if best == way else f"{best} is within chance of it {tried}"


def choose_precision(recipe: Recipe) -> tuple[Precision, str]:
    """(a value of `mixed_precision`, the reason): "bf16" if this machine trains the network markedly faster so.

    That depends on both. Two cores of an AMD EPYC with AVX512-BF16 train ResNet-18 1.6 times as fast, and EfficientNet-Lite0,
    whose convolutions are of single channels, at half the speed: `python -m benchmarks.cpu`.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":  # each process writes the recipe: they must not find different things
        return "no", '"bf16" is not tried by several processes'
    try:
        times = times_faster_in_bf16(recipe)
    except RuntimeError as error:  # out of memory, or an operation that a device does not have in bf16
        return "no", f'"bf16" cannot be tried here: {first_line(error)[:60]}'
    return "bf16" if times >= FASTER else "no", f'"bf16" is {times:.1f} times as fast here, in a few steps of each'


@keep_random_state()
def times_faster_in_bf16(recipe: Recipe) -> float:
    """Seconds of a forward and backward pass in float32 to those in bf16, on random images and weights."""
    with own_accelerator_state():
        device = make_accelerator(recipe).device  # which has memory and threads as in a run
    net = build_backbone(replace(recipe, weights="none"), 10).to(device)
    set_train_mode(net, recipe.batch_norm)
    images = torch.randn(min(TIMED, recipe.data.batch_size), *recipe.data.shape, device=device)
    images = images.contiguous(memory_format=memory_format(recipe, net))

    def step(bf16: bool) -> float:
        net.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = net(images)
        logits.float().square().sum().backward()
        return max(parameter.grad.sum().item() for parameter in net.parameters() if parameter.grad is not None)  # it waits

    rounds, start = list[list[float]](), time.monotonic()
    while len(rounds) < 6 and (len(rounds) < 2 or time.monotonic() < start + 3):  # kernels are chosen in the first
        rounds.append([timeit(partial(step, bf16), number=1) for bf16 in (False, True)])
    single, half = map(min, zip(*rounds[1:], strict=True))
    return single / half


def fit_minutes(recipe: Recipe, minutes: float) -> tuple[Recipe, int, str]:
    """(recipe, epochs, the reason): the largest image size of which 3 epochs, or else 1, fit into so many minutes here."""
    usual, found, data = max(recipe.data.sides), None, load_data(recipe)
    patch = patch_size(meta_backbone(recipe, len(data.classes)))
    for size in (usual, *(size - size % patch for size in SMALLER_SIZES if size < usual)):
        smaller = override(recipe, [f"data.image_size={size}"])
        try:
            meta_backbone(smaller, len(data.classes))
        except RecipeError:  # a network for one size only
            break
        probe, epoch = time_training(smaller, data)
        each = f"an epoch takes about {duration(epoch)} here, the linear probe {duration(probe)}"
        if (epochs := int(min(30, (60 * minutes - probe) / epoch))) >= 1:
            found = smaller, epochs, f"what {minutes:g} minutes allow: {each}"
        if epochs >= 3:
            break
    if not found:
        raise RecipeError(f"{minutes:g} minutes are too few for these images: at {size} px {each}")
    return found


def patch_size(net: nn.Module) -> int:
    """The side in pixels of the patches that an attention network cuts an image into; 1 of a network without."""
    side = getattr(getattr(net, "patch_embed", None), "patch_size", 1)
    return int(side if isinstance(side, int) else max(side))


def time_training(recipe: Recipe, data: ImageData) -> tuple[float, float]:
    """Seconds of a linear probe, and of an epoch in which all layers train, from a few images on this machine."""
    recipe = replace(recipe, weights="none", groups=(Group("all", ".", lr=1e-6),))
    with own_accelerator_state():
        accelerator = make_accelerator(recipe)
        net = build_backbone(recipe, len(data.classes)).to(accelerator.device)
        images = build_datasets(recipe, net, data)[0]
        groups = build_param_groups(recipe, net)
        optimizer, criterion = accelerator.prepare(build_optimizer(groups)), Criterion(recipe, net, images, accelerator.device)
        sample = np.linspace(0, len(images) - 1, min(recipe.data.batch_size, len(images)), dtype=int).tolist()
        plan, batches = BatchPlan(0, sample, [sample], [0]), list[Batch]()
        first, again = (
            timeit(lambda: batches.extend(load_batches(images, 0, [plan], 0, accelerator.device)), number=1) for _ in range(2)
        )
        set_train_mode(net, recipe.batch_norm)
        step = min(repeat(lambda: train_step(recipe, net, criterion, optimizer, batches[0], accelerator)[0].item(), number=1))
        with torch.no_grad(), accelerator.autocast():
            forward = min(repeat(lambda: net.eval()(batches[0].micro_batches[0][0]).sum().item(), number=1))
    if images.cache is None or images.cache.header[USED] * len(images) > len(sample) * images.cache.limit:
        again = first  # memory does not hold them all
    train, val = (len(part) / len(sample) for part in (data.train, data.val))
    return (train + val) * (first + forward), train * (again + step) + val * (again + forward)
