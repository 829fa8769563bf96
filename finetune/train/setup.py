"""A recipe's accelerator, data, weights and network, put together."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune.augment import image_sets
from finetune.backbone import build_backbone, preprocessing
from finetune.batches import SeededImages, seed_all
from finetune.image_data import is_downloaded, load_data
from finetune.image_lists import ImageData
from finetune.memory import keep_freed_memory
from finetune.processes import first_on_main
from finetune.recipe import Recipe, RecipeError
from finetune.unfreeze import synchronise_norms
from finetune.weights import pretrained_state


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
) -> tuple[ImageData, nn.Module, dict[str, Any], tuple[SeededImages, SeededImages]]:
    """(data, network, its preprocessing, training and validation images) as a run begins with them.

    What lies here is checked first, then come weights over the network, then data.
    """
    data = None if is_downloaded(recipe.data.source) else first_on_main(accelerator, lambda: load_data(recipe))
    state = first_on_main(accelerator, lambda: pretrained_state(recipe))
    data = data or first_on_main(accelerator, lambda: load_data(recipe))
    seed_all(recipe.seed)  # the new head's first values
    net = synchronise_norms(build_backbone(recipe, len(data.classes), state), recipe.norm_stats, accelerator)
    inputs = preprocessing(recipe, net)
    return data, net, inputs, image_sets(recipe, data, inputs)
