"""The end of a run: its result, how far each group moved, its pictures, its last words."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from finetune.data.loader import ImageDataset
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Recipe
from finetune.recipe.recipe import METRICS, REPORTED_METRICS
from finetune.results.baseline import promise
from finetune.results.plots import confusion, curves, mistakes
from finetune.train.evaluate import compute_metrics
from finetune.train.logger import Logger


def report(
    record: Logger,
    file: Path,
    recipe: Recipe,
    net: nn.Module,
    start: dict[str, torch.Tensor],
    val_images: ImageDataset,
    smoke: bool,
) -> None:
    """Write the finished run's last files and say its last words; result.json, written last, makes it a finished run.

    `net` is the network whose scores were logged, `start` its parameters from before the run, by name.
    """
    folder = record.folder
    result = {
        "recipe": file.stem,
        **({"smoke": True} if smoke else {}),
        **record.result(recipe.seed),
        "drift": drift(recipe, net, start),
    }
    record.save_model(folder / "model", net)
    curves(folder, recipe.metric)
    predictions = safetensors.torch.load_file(folder / "predictions.safetensors")
    logits, labels = predictions["logits"], predictions["labels"]
    if recipe.loss != "multi_label":
        confusion(folder, logits, labels, val_images.classes)
        mistakes(folder, logits, labels, val_images)
    if kinds := getattr(val_images.images, "kinds", None):
        result["by_kind"] = {
            kind: compute_metrics(recipe, *(part[[one == kind for one in kinds]] for part in (logits, labels)))
            for kind in sorted(set(kinds))
        }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")

    words = {recipe.metric: METRICS[recipe.metric], **REPORTED_METRICS}
    reached = ", ".join(f"{words[name]} {result[name]:.2%}" for name in words if name in result)
    moved = ", ".join(f"{name} {share:.2%}" for name, share in result["drift"].items())
    promised = "nothing: a smoke run" if smoke else promise(file, recipe)
    early = f" (stopped early, of {recipe.epochs} epochs)" if result["epochs"] < recipe.epochs else ""
    when = "before the first epoch" if result["best_epoch"] == -1 else f"in epoch {result['best_epoch']}"
    kinds = "".join(
        f"          {kind}: {METRICS[recipe.metric]} {part[recipe.metric]:.2%} of {part['val_images']} images\n"
        for kind, part in result.get("by_kind", {}).items()
    )
    record.say(
        f"\nreached   {reached}, loss {result['loss']:.4f}; {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.0f} images/s, {result['peak_memory_gib']:.1f} GiB{early}\n{kinds}"
        f"promised  {promised}\n"
        f"{paid(recipe.metric, result)}"
        f"moved     {moved} of their first norm\n"
        f"best      {METRICS[recipe.metric]} {result['best_' + recipe.metric]:.2%} {when}: "
        f"{folder / 'model-best'}\n"
        f"model     {folder / 'model'}\n"
        f"all else  {folder}: {', '.join(sorted(path.name for path in folder.glob('[!.]*.*')))}",
        even_if_quiet=True,
    )


def paid(score: str, result: dict[str, Any]) -> str:
    """A line on what fine-tuning has added to the head alone, or nothing for a run that did not begin with it.

    Within chance is what 2 standard errors of the difference of two binomial shares cover.
    """
    if f"head_{score}" not in result:
        return ""
    before, after = result[f"head_{score}"], result[score]
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / result["val_images"])
    if after <= before:
        words = "fine-tuning the rest did not pay: model-best is at least as good"
    else:
        words = f"fine-tuning the rest added {100 * (after - before):.2f} points"
        words += ", which may be chance" if after - before < 2 * error else ""
    return f"head      {METRICS[score]} {before:.2%} with the head alone; {words}\n"


def drift(recipe: Recipe, net: nn.Module, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each group moved: the norm of its change over the norm it began with; 0 for what was frozen."""

    def norm(tensors: Iterable[torch.Tensor]) -> float:
        return torch.nn.utils.get_total_norm([tensor.double() for tensor in tensors]).item()

    moved = {}
    for group in build_param_groups(recipe, net):
        changes = [parameter.detach().cpu() - start[name] for name, parameter in group.params.items()]
        moved[group.name] = norm(changes) / max(norm(start[name] for name in group.params), 1e-12)
    return moved
