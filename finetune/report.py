"""The end of a run: its result, how far each group moved, its pictures, its last words."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from finetune.baseline import promise
from finetune.batches import SeededImages
from finetune.param_groups import split_parameters
from finetune.plots import confusion, curves, mistakes
from finetune.recipe import SCORES, Recipe
from finetune.run_record import RunRecord


def report(record: RunRecord, file: Path, recipe: Recipe, net: nn.Module, start: dict[str, torch.Tensor],
           val_images: SeededImages, smoke: bool) -> None:
    """Write the finished run's last files and say its last words; result.json, written last, makes it a finished run.

    `net` is the network whose scores were logged, `start` its parameters from before the run, by name.
    """
    folder = record.folder
    result = {"recipe": file.stem, **({"smoke": True} if smoke else {}), **record.result(recipe.seed),
              "drift": drift(recipe, net, start)}
    record.save_model(folder / "model", net)
    curves(folder, recipe.score)
    if recipe.loss != "multi_label":
        predictions = safetensors.torch.load_file(folder / "predictions.safetensors")
        confusion(folder, **predictions, classes=val_images.classes)
        mistakes(folder, **predictions, images=val_images)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")

    words = {recipe.score: SCORES[recipe.score], "top1": "top-1", "top5": "top-5", **SCORES}
    reached = ", ".join(f"{words[name]} {result[name]:.2%}" for name in words if name in result)
    moved = ", ".join(f"{name} {share:.2%}" for name, share in result["drift"].items())
    promised = "nothing: a smoke run" if smoke else promise(file, recipe)
    early = f" (stopped early, of {recipe.epochs} epochs)" if result["epochs"] < recipe.epochs else ""
    record.say(f"\nreached   {reached}, loss {result['loss']:.4f}; {result['seconds']:.0f} s, "
               f"{result['images_per_second']:.0f} images/s, {result['peak_memory_gib']:.1f} GiB{early}\n"
               f"promised  {promised}\n"
               f"moved     {moved} of their first norm\n"
               f"best      {SCORES[recipe.score]} {result['best_' + recipe.score]:.2%} in epoch {result['best_epoch']}: "
               f"{folder / 'model-best'}\n"
               f"model     {folder / 'model'}\n"
               f"all else  {folder}: {', '.join(sorted(path.name for path in folder.glob('[!.]*.*')))}",
               even_if_quiet=True)


def drift(recipe: Recipe, net: nn.Module, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each group moved: the norm of its change over the norm it began with; 0 for what was frozen."""
    def norm(tensors) -> float:
        return torch.nn.utils.get_total_norm([tensor.double() for tensor in tensors]).item()

    moved = {}
    for group in split_parameters(recipe, net):
        changes = [parameter.detach().cpu() - start[name] for name, parameter in group.params.items()]
        moved[group.name] = norm(changes) / max(norm(start[name] for name in group.params), 1e-12)
    return moved
