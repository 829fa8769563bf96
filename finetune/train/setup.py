"""A recipe's accelerator, data, weights and network, put together."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune.data.dataset import ImageData
from finetune.data.loader import ImageDataset
from finetune.data.sources import is_downloaded, load_data
from finetune.data.transforms import eval_transform, training_transform
from finetune.models.backbone import build_backbone, meta_backbone, preprocessing
from finetune.models.batch_norm import convert_sync_batch_norm
from finetune.models.linear_probe import head_layer
from finetune.models.pretrained import pretrained_state
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Data, Frozen, Group, LayerDecay, Recipe, Schedule
from finetune.recipe.load import override
from finetune.train.distributed import main_process_first
from finetune.train.micro_batch import keep_freed_memory
from finetune.utils.errors import RecipeError
from finetune.utils.seed import seed_all


def make_accelerator(recipe: Recipe, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The Accelerator; on a machine without GPUs its processes use the CPU, with all cores if there is one process.

    Raises:
        RecipeError: for fp16 on a CPU, which Accelerate would quietly compute in float32, and for a tracker that is not there.
    """
    cpu = not torch.accelerator.is_available()
    if recipe.mixed_precision == "fp16" and cpu:
        raise RecipeError("mixed_precision='fp16' needs a GPU; on this CPU: --set mixed_precision=bf16 or no")
    if cpu and os.environ.get("LOCAL_WORLD_SIZE", "1") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if cpu:
        keep_freed_memory()
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=recipe.mixed_precision, log_with=list(trackers) or None, project_dir=folder
        )
    except ValueError as error:
        raise RecipeError(f"--track: {error}") from error
    missing = set(trackers) - {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if missing:
        raise RecipeError(f"--track {sorted(missing)[0]}: that package is not installed: pip install {sorted(missing)[0]}")
    return accelerator


def assemble(
    recipe: Recipe, accelerator: Accelerator
) -> tuple[ImageData, nn.Module, dict[str, Any], tuple[ImageDataset, ImageDataset]]:
    """(data, network, its preprocessing, training and validation images) as a run begins with them.

    What lies here is checked first, then come weights over the network, then data.
    """
    data = None if is_downloaded(recipe.data.source) else main_process_first(accelerator, lambda: load_data(recipe))
    state = main_process_first(accelerator, lambda: pretrained_state(recipe))
    data = data or main_process_first(accelerator, lambda: load_data(recipe))
    seed_all(recipe.seed)  # the new head's first values
    net = convert_sync_batch_norm(build_backbone(recipe, len(data.classes), state), recipe.batch_norm, accelerator)
    inputs = preprocessing(recipe, net)
    return data, net, inputs, build_datasets(recipe, data, inputs)


def check(recipe: Recipe, net: nn.Module) -> None:
    """Raise RecipeError for whatever is wrong with the recipe's groups, optimizers or transforms on this network."""
    for epoch in {0, recipe.optimizer_begins(recipe.epochs)}:
        build_optimizer(build_param_groups(recipe, net, epoch))
    training_transform(recipe, preprocessing(recipe, net))
    if recipe.linear_probe:
        head_layer(recipe, net)


def smoke(recipe: Recipe, parts: int) -> Recipe:
    """The recipe cut down to seconds: a stage an epoch, a batch that divides by `parts`, small generated images."""
    rows = [recipe.groups] if isinstance(recipe.groups, LayerDecay) else recipe.groups
    stages = sorted({0} | {row.unfreeze_at for row in rows if not isinstance(row, Frozen)})

    def early(row: Group) -> Group:
        """The row with its stage's epoch, and no time to lose on warmup."""
        own = row.schedule and quick(row.schedule)
        return dataclasses.replace(
            row, unfreeze_at=stages.index(row.unfreeze_at), schedule=own, warmup_epochs=min(0.5, row.warmup_epochs)
        )

    def quick(schedule: Schedule) -> Schedule:
        return dataclasses.replace(schedule, warmup_epochs=min(0.5, schedule.warmup_epochs))

    groups: tuple[Group | Frozen, ...] | LayerDecay
    if isinstance(recipe.groups, LayerDecay):
        groups = dataclasses.replace(recipe.groups, unfreeze_at=stages.index(recipe.groups.unfreeze_at))
    else:
        groups = tuple(row if isinstance(row, Frozen) else early(row) for row in recipe.groups)
    switch = recipe.switch and dataclasses.replace(recipe.switch, at=stages.index(recipe.switch.at))
    weights = None if isinstance(recipe.class_weights, tuple) else recipe.class_weights  # for other classes
    small = dataclasses.replace(
        recipe,
        weights="none",
        groups=groups,
        switch=switch,
        schedule=quick(recipe.schedule),
        epochs=len(stages) + 1,
        class_weights=weights,
        early_stop=None,
        data=Data("generated", 32, parts * -(-8 // parts), recipe.data.crop_pct, recipe.data.sampling),
    )
    try:
        meta_backbone(small)
    except RecipeError:  # a network for one size only
        small = override(small, [f"data.image_size={recipe.data.image_size}"])
    return small


def build_datasets(recipe: Recipe, data: ImageData, preprocessing: dict[str, Any]) -> tuple[ImageDataset, ImageDataset]:
    """The training images as they are varied, and the validation images as they are scored."""
    train, val = (
        ImageDataset(
            part, transform, recipe.seed, data.classes, recipe.data.on_bad_image, multi_label=recipe.loss == "multi_label"
        )
        for part, transform in (
            (data.train, training_transform(recipe, preprocessing)),
            (data.val, eval_transform(preprocessing)),
        )
    )
    return train, val
