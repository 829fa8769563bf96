"""The end of a run: result.json, pictures, and the summary in the terminal."""

import json
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import timm
import torch
import torchvision
from accelerate import Accelerator
from torch import nn

from finetune.data.loader import ImageDataset
from finetune.models.saved import save_model
from finetune.optim.param_groups import ParamGroup
from finetune.recipe import Recipe
from finetune.recipe.recipe import METRICS, REPORTED_METRICS
from finetune.results.baseline import describe_baseline
from finetune.results.plots import plot_confusion_matrix, plot_curves, plot_mistakes
from finetune.training.evaluate import best_row, compute_metrics
from finetune.training.logger import Logger
from finetune.training.run_dir import run_name

ParamsByGroup = dict[str, dict[str, torch.Tensor]]  # by the group's name, then by the parameter's


def finish_run(
    recipe: Recipe,
    file: Path | None,
    net: nn.Module,
    start: ParamsByGroup,
    images: ImageDataset,
    logger: Logger,
    smoke: bool,
) -> None:
    """Write the finished run's last files and print its summary; result.json, written last, makes it a finished run.

    `net` is the network whose metrics were logged, `start` its parameters from before the run, `images` are the validation
    images.
    """
    folder = logger.folder
    save_model(folder / "model", net, images.transform.preprocessing, images.classes)
    plot_curves(folder, recipe.metric)
    predictions = safetensors.torch.load_file(folder / "predictions.safetensors")
    logits, labels = predictions["logits"], predictions["labels"]
    if recipe.loss != "multi_label":
        plot_confusion_matrix(folder, logits, labels, images.classes)
        plot_mistakes(folder, logits, labels, images)
    result = {"recipe": run_name(folder), **({"smoke": True} if smoke else {}), **run_result(recipe, logger)}
    result["drift"] = drift(net, start)
    if subgroups := getattr(images.images, "subgroups", None):
        result["by_subgroup"] = {
            name: compute_metrics(recipe, *(part[[one == name for one in subgroups]] for part in (logits, labels)))
            for name in sorted(set(subgroups))
        }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    baseline = "none: a smoke run" if smoke else describe_baseline(file, recipe)
    logger.say(describe_result(recipe, result, baseline, folder), even_if_quiet=True)


def run_result(recipe: Recipe, logger: Logger) -> dict[str, Any]:
    """The run in numbers: the last epoch's metrics (not the best's: that one was chosen on these very images)."""
    last, best, seconds = logger.history[-1], best_row(logger.rows(), recipe.metric), logger.elapsed()
    probe = {f"linear_probe_{recipe.metric}": logger.linear_probe[recipe.metric]} if logger.linear_probe else {}
    return {
        **{key: value for key, value in last.items() if key not in ("epoch", "step")},
        "epochs": len(logger.history),
        "steps": last["step"],
        **probe,
        "best_epoch": best["epoch"],
        f"best_{recipe.metric}": best[recipe.metric],
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "clock": [round(moment, 1) for moment in logger.clock],
        "images_per_second": round(logger.images / seconds, 1),
        "peak_memory_gib": round(peak_memory(logger.accelerator.device), 3),
        **environment(logger.accelerator),
    }


def describe_result(recipe: Recipe, result: dict[str, Any], baseline: str, folder: Path) -> str:
    """The summary in the terminal."""
    words = {recipe.metric: METRICS[recipe.metric], **REPORTED_METRICS}
    reached = ", ".join(f"{words[name]} {result[name]:.2%}" for name in words if name in result)
    moved = ", ".join(f"{name} {share:.2%}" for name, share in result["drift"].items())
    early = f" (stopped early, of {recipe.epochs} epochs)" if result["epochs"] < recipe.epochs else ""
    when = "before the first epoch" if result["best_epoch"] == -1 else f"in epoch {result['best_epoch']}"
    subgroups = "".join(
        f"          {name}: {METRICS[recipe.metric]} {part[recipe.metric]:.2%} of {part['val_images']} images\n"
        for name, part in result.get("by_subgroup", {}).items()
    )
    return (
        f"\nresult    {reached}, loss {result['loss']:.4f}; {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.0f} images/s, {result['peak_memory_gib']:.1f} GiB{early}\n{subgroups}"
        f"baseline  {baseline}\n"
        f"{describe_gain(recipe.metric, result)}"
        f"moved     {moved} of their first norm\n"
        f"best      {METRICS[recipe.metric]} {result['best_' + recipe.metric]:.2%} {when}: {folder / 'model-best'}\n"
        f"model     {folder / 'model'}\n"
        f"all else  {folder}: {', '.join(sorted(path.name for path in folder.glob('[!.]*.*')))}"
    )


def describe_gain(metric: str, result: dict[str, Any]) -> str:
    """A line on what fine-tuning has added to the linear probe, or nothing for a run that did not start with one.

    Within chance is what 2 standard errors of the difference of two binomial proportions cover.
    """
    if f"linear_probe_{metric}" not in result:
        return ""
    before, after = result[f"linear_probe_{metric}"], result[metric]
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / result["val_images"])
    if after <= before:
        words = "fine-tuning the rest did not pay: model-best is at least as good"
    else:
        words = f"fine-tuning the rest added {100 * (after - before):.2f} points"
        words += ", which may be chance" if after - before < 2 * error else ""
    return f"probe     {METRICS[metric]} {before:.2%} of the linear probe; {words}\n"


def copy_params(groups: Sequence[ParamGroup]) -> ParamsByGroup:
    """The parameters as they are now, on the CPU."""
    return {group.name: {name: param.detach().cpu().clone() for name, param in group.params.items()} for group in groups}


def drift(net: nn.Module, start: ParamsByGroup) -> dict[str, float]:
    """How far each group moved: the norm of its change over the norm that it started with, 0 for what was frozen."""

    def norm(tensors: Iterable[torch.Tensor]) -> float:
        return torch.nn.utils.get_total_norm([tensor.double() for tensor in tensors]).item()

    now = dict(net.named_parameters())
    return {
        group: norm(now[name].detach().cpu() - before for name, before in params.items()) / max(norm(params.values()), 1e-12)
        for group, params in start.items()
    }


def peak_memory(device: torch.device) -> float:
    """The most memory ever taken, in GiB: of the GPU on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """The versions and the hardware that a number depends on."""
    device = accelerator.device
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "accelerate": accelerate.__version__,
        },
        "hardware": {
            "device": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
        },
    }


def cpu_name() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
