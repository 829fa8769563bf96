"""A recipe written for a set of images: each choice with its reason."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
from torch import nn

from finetune.models.backbone import fresh_norms, head_parameters, meta_backbone
from finetune.models.batch_norm import has_statistics
from finetune.models.linear_probe import head_layer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Recipe
from finetune.recipe.load import override
from finetune.tools.defaults import Choice, choose_backbone, choose_image_size
from finetune.tools.image_stats import ImageStats
from finetune.tuning.tryouts import LONG, choose_precision, choose_resize, fit_minutes
from finetune.utils.errors import RecipeError

NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
SIDES = {"left", "right", "clockwise", "counterclockwise", "anticlockwise"}
ANGLES = {"angle", "direction", "heading", "orientation", "rotation", "steering", "yaw", "roll"}
TEMPLATE = '''"""{backbone} on {train:,} images {of_what}, as written by finetune suggest.

    finetune train {target}

The images: {train:,} for training and {val:,} for validation, {sizes}, {colours};
the shorter side has {side} px (median; the smallest {least}), the longer side {aspect:g} times that. Not measured.
"""
from finetune import AdamW, Augment, Cosine, Data, {imports}, Recipe

recipe = Recipe(
    backbone="{backbone}",  # {why_backbone}
{weights}    data=Data(
        {source},
        image_size={image_size},  # {why_size}
        batch_size={batch_size},  # of one step, over all processes: about the square root of the number of images
        crop_pct=1.0,  # evaluate on all of the image, or its largest square: what tells {labels} apart may lie at the edge
{shape}    ),
    augment=Augment(
{augment}    ),

{linear_probe}{groups}    optimizer=AdamW(weight_decay=0.05),  # no weight decay on biases and norms
    schedule=Cosine(warmup_epochs=0.5),  # does not depend on a metric, which is noisy on few validation images
    batch_norm="{batch_norm}",  # {why_batch_norm}

    epochs={epochs},  # {steps:,} steps; {why_epochs}
{options}    mixed_precision="{precision}",  # {why_precision}
)
'''
LAYER_DECAY = """    groups=LayerDecay(
        head_lr={head:g},  # {why_lr}
        stem_ratio=0.01,  # each layer slower than the one above: the first layers are general features
{unfreeze}    ),
"""
GROUPS = """    groups=(  # {why_lr}
        Group("head", r"{patterns[head]}", lr={head:g}),
        Group("top", r"{patterns[top]}", lr={top:g}{unfreeze}),
        Group("middle", r"{patterns[middle]}", lr={middle:g}{unfreeze}),
        Group("bottom", r".", lr={bottom:g}{unfreeze}),
    ),
"""
WHY_HEAD_FIRST = "a random head's gradients distort pretrained features (arXiv 2202.10054)"
LINEAR_PROBE = f"    linear_probe=LinearProbe(),  # {WHY_HEAD_FIRST}\n"
HEAD_FIRST = f"    # Only the head trains in the first {{steps:,}} steps: {WHY_HEAD_FIRST}.\n"
LR_SHARES = {"head": 1, "top": 1 / 2, "middle": 1 / 10, "bottom": 1 / 50}  # about the thirds of LayerDecay
LOSSES = {  # of numbers
    "huber": 'loss="huber",  # squared up to one standard deviation, absolute beyond: wrong labels pull less (Huber 1964)',
    "mse": 'loss="mse",  # squared errors, as asked for',
    "l1": 'loss="l1",  # absolute errors, as asked for',
}
WHY_REDUCED = "half of each side or less, still twice the input's, in a fraction of the time"
WHY_CHANNELS = "as asked for: arrays of their own numbers, whose mean and deviation are kept with the model"
WHY_LR = "for AdamW: 1e-3 at batch size 32, and with the square root of smaller ones (arXiv 2205.10287)"


def suggest_recipe(
    stats: ImageStats,
    backbone: str | None = None,
    weights: str | None = None,
    target: str = "my_recipe.py",
    minutes: float | None = None,
    ranked: Choice | None = None,
) -> str:
    """The text of a recipe file for such images, to be written to `target`; without a backbone, for one that is available.

    With `minutes`, epochs and image size are what this machine trains in about that time, found by trying a few steps. With
    `ranked`, backbone, weights and image size are those of a ranking.

    Raises:
        RecipeError: for a backbone or weights that are not there, and for too few `minutes`.
    """
    if ranked:
        backbone, weights, why_backbone = ranked.backbone, ranked.weights, ranked.why
    else:
        backbone, weights, why_backbone = choose_backbone(stats, backbone, weights)
    recipe, net, why_size = choose_image_size(stats, backbone)
    if ranked and ranked.image_size != recipe.data.image_size:
        (recipe, net, _), why_size = choose_image_size(stats, backbone, ranked.image_size), "the size at which it was ranked"
    if stats.ranges:
        recipe = override(recipe, [f"loss={stats.loss}", "metric=r2"])
    batch_size = min(128, max(8, 2 ** int(math.log2(stats.train) / 2)))
    recipe = override(recipe, [f"data.batch_size={batch_size}"])
    precision, why_precision = choose_precision(recipe)
    epochs, why_epochs = min(30, max(8, math.ceil(12_000 / stats.train))), "12,000 images in all, but 8 epochs to 30"
    reduced = 2 if stats.side >= 4 * max(recipe.data.sides) and not stats.channels else None
    if minutes is not None:
        usual = max(recipe.data.sides)
        recipe = override(recipe, [f"mixed_precision={precision}", f"data.reduced_decode={reduced}"])
        recipe, epochs, why_epochs = fit_minutes(recipe, minutes)
        if max(recipe.data.sides) < usual:
            net, why_size = meta_backbone(recipe, len(stats.classes)), f"{usual} would take too long"
    resize, why_resize = "crop", ""
    if stats.longest >= LONG:
        resize, why_resize = choose_resize(dataclasses.replace(recipe, weights=weights))
    steps_per_epoch = math.ceil(stats.train / batch_size)
    batch_norm, why_batch_norm = choose_batch_norm(recipe, net)
    linear_probe, imports, unfreeze_at = LINEAR_PROBE, ", LinearProbe", 0
    try:
        head_layer(recipe, net)
    except RecipeError:  # a head of several layers has no linear probe
        if stats.ranges:  # nor numbers
            raise
        unfreeze_at = min(epochs // 4, max(1, round(100 / steps_per_epoch)))
        linear_probe, imports = HEAD_FIRST.format(steps=unfreeze_at * steps_per_epoch), ""
    head_lr = 1e-3 * min(1, math.sqrt(batch_size / 32))
    lrs = {name: float(f"{head_lr * share:.1g}") for name, share in LR_SHARES.items()}
    try:
        build_param_groups(recipe, net)
        imports = f"LayerDecay{imports}"
        unfreeze = f"        unfreeze_at={unfreeze_at},  # the first epoch of all but the head\n" if unfreeze_at else ""
        groups = LAYER_DECAY.format(**lrs, why_lr=WHY_LR, unfreeze=unfreeze)
    except RecipeError:  # not timm's, or without a list of its layers
        imports = f"Group{imports}"
        unfreeze = f", unfreeze_at={unfreeze_at}" if unfreeze_at else ""
        groups = GROUPS.format(**lrs, why_lr=WHY_LR, unfreeze=unfreeze, patterns=group_patterns(recipe, net))
    return TEMPLATE.format(
        **dataclasses.asdict(stats)
        | {
            "source": json.dumps(stats.source, ensure_ascii=False) if stats.source.isprintable() else repr(stats.source),
            **describe_labels(stats),
            "colours": describe_channels(stats),
            "target": Path(target).as_posix(),  # a docstring takes Windows's backslashes for escapes
            "imports": imports,
            "backbone": backbone,
            "why_backbone": why_backbone,
            "weights": "" if weights == "hub" else f"    weights={json.dumps(weights, ensure_ascii=False)},\n",
            "image_size": recipe.data.image_size,
            "why_size": why_size,
            "batch_size": batch_size,
            "shape": shape_lines(stats.channels, resize, why_resize, reduced),
            "augment": augment_lines(stats, resize),
            "linear_probe": linear_probe,
            "groups": groups,
            "batch_norm": batch_norm,
            "why_batch_norm": why_batch_norm,
            "epochs": epochs,
            "why_epochs": why_epochs,
            "steps": epochs * steps_per_epoch,
            "options": option_lines(stats, epochs * steps_per_epoch),
            "precision": precision,
            "why_precision": why_precision,
        }
    )


def choose_batch_norm(recipe: Recipe, net: nn.Module) -> tuple[str, str]:
    """(a value of `batch_norm`, the reason)."""
    if fresh_norms(recipe, net):
        return "train", "the new head has a batch norm of its own, without statistics to keep"
    if any(map(has_statistics, net.modules())):
        return "frozen", "the pretrained statistics are better than those of small batches"
    return "frozen", "no effect: there is no batch norm in this network"


def describe_labels(stats: ImageStats) -> dict[str, str]:
    """What a recipe's docstring says of classes and their sizes, or of numbers and their ranges."""
    if not stats.ranges:
        sizes = f"{stats.smallest:,} to {stats.largest:,} a class"
        return {"of_what": f"of {len(stats.classes)} classes", "sizes": sizes, "labels": "classes"}
    names = [re.sub(r"[^\w .-]", "_", name) for name in stats.classes]  # it stands in a docstring
    sizes = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in zip(names, stats.ranges, strict=True))
    of_what = f"with {len(names)} numbers each" if len(names) > 1 else "with a number each"
    return {"of_what": of_what, "sizes": sizes, "labels": "numbers"}


def shape_lines(channels: int | None, resize: str, why_resize: str, reduced: int | None) -> str:
    """The lines within Data(...) on what images are, and how they are cut and decoded."""
    lines = [f"channels={channels},  # {WHY_CHANNELS}"] if channels else []
    lines += [f"resize={json.dumps(resize)},  # {why_resize}"] if why_resize else []
    lines += [f"reduced_decode={reduced},  # large JPEGs: {WHY_REDUCED}"] if reduced else []
    return "".join(f"        {line}\n" for line in lines)


def describe_channels(stats: ImageStats) -> str:
    """What a recipe's docstring says of colours."""
    if stats.channels:
        return f"as arrays of {stats.channels} channel{'s' * (stats.channels > 1)}"
    return "grey" if stats.grey else "in colour"


def augment_lines(stats: ImageStats, resize: str) -> str:
    """The lines within Augment(...)."""
    signs = not stats.ranges and all(len(name) == 1 or name.lower() in NUMBERS for name in stats.classes)
    words = {word for name in stats.classes for word in re.split(r"[\W_]+", name.lower())}
    sided = signs or words & SIDES or stats.ranges and words & ANGLES
    low, high, why = 0.5, 1.0, "at least half of the area, so that the object mostly stays in view"
    if signs:
        low, why = 0.8, "a letter or digit stays whole"
    if stats.aspect >= LONG and resize == "crop":
        low, high = round(low / stats.aspect, 2), round(high / stats.aspect, 2)
        why = "of long images at most the area of the square that is evaluated"
    kind = "numbers" if stats.ranges else "classes"
    colours = "arrays have no colours to change" if stats.channels else f"colours may tell {kind} apart"
    flip = "hflip=0.5,  # a flip does not change the class; 0.0 where left and right matter"
    if sided:
        flip = "hflip=0.0,  # by their names, classes are letters, digits or sides, which a flip would change"
    if stats.ranges:
        flip = "hflip=0.5,  # 0.0 where a number is an angle or a place, which a flip would change, as a rotation would"
        flip = "hflip=0.0,  # by their names, numbers are angles or sides, which a flip would change" if sided else flip
    lines = [
        f"crop_scale=({low}, {high}),  # {why}",
        *["# (1.0, 1.0) where a number is a size, a count or a place, which a crop would change"] * bool(stats.ranges),
        flip,
        f"color_jitter=0.0,  # {'the images are grey' if stats.grey else colours}",
    ]
    if stats.train >= 20_000:
        lines.append("mixup=0.1,  # from 20,000 images on, as in BiT's rule (arXiv 1912.11370)")
    return "".join(f"        {line}\n" for line in lines)


def option_lines(stats: ImageStats, steps: int) -> str:
    """The lines of the loss and the metric of numbers, or of options for imbalanced classes, and of the moving average."""
    lines, ratio = ["label_smoothing=0.1,  # against overconfidence on training images seen many times"], 1.0
    if stats.ranges:
        lines = [LOSSES[stats.loss], 'metric="mae",  # the mean error, in the unit of the labels']
        if len(stats.ranges) > 1:
            lines[1] = 'metric="r2",  # the mean over the numbers, whose units may differ'
    else:
        ratio = stats.largest / stats.smallest
    if ratio >= 1.5:
        lines += [
            f'class_weights="balanced",  # the largest class has {ratio:.3g} times the images of the smallest',
            'metric="macro_f1",  # every class counts the same, however rare',
        ]
    decay, span = (0.999, "1,000") if steps >= 5000 else (0.99, "100")
    lines.append(f"ema_decay={decay},  # evaluate an average over about {span} steps: single ones vary on few images")
    return "".join(f"    {line}\n" for line in lines)


def group_patterns(recipe: Recipe, net: nn.Module) -> dict[str, str]:
    """Regular expressions for the head, and for the last and the middle third of the layers in the network's order."""
    head = head_parameters(recipe, net)
    names = [name for name, _ in net.named_parameters() if name not in head]
    paths = [name.rpartition(".")[0] or name for name in names]
    for depth in range(1, 6):
        layers = list(dict.fromkeys(".".join(path.split(".")[:depth]) for path in paths))
        if len(layers) >= 6:
            break
    _, middle, top = np.array_split([re.escape(layer) + ("$" if layer in names else r"\.") for layer in layers], 3)
    heads = dict.fromkeys(re.escape(name.rpartition(".")[0]) + r"\." for name in sorted(head))
    return {"head": "|".join(heads), "top": "|".join(top), "middle": "|".join(middle)}
