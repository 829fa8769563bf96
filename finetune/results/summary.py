"""The end of a run: result.json, pictures, and the summary in the terminal."""

import json
import platform
import shlex
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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
from finetune.metrics.compute import best_row, subgroup_metrics
from finetune.metrics.measure import measure
from finetune.metrics.numbers import describe_numbers
from finetune.models.backbone import head_parameters, is_timm
from finetune.models.linear_probe import units_of
from finetune.models.saved import model_to_use, more_than_chance
from finetune.models.saving import plain_head, save_model
from finetune.models.sharding import gather_state
from finetune.optim.lora import adapters, merged, save_adapter
from finetune.optim.param_groups import ParamGroup
from finetune.page.write import PAGE, write_page
from finetune.recipe import Recipe
from finetune.recipe.metrics import METRICS, NO_SHARES, REPORTED_METRICS, beats, write_number, write_value
from finetune.report.confusion import plot_confusion_matrix
from finetune.report.curves import plot_curves
from finetune.report.drawing import run_title
from finetune.report.numbers import plot_largest_errors, plot_number_predictions, plot_numbers
from finetune.report.sheets import plot_mistakes, plot_predictions
from finetune.results.baseline import describe_verdict
from finetune.results.paired import in_points
from finetune.training.logger import Logger
from finetune.training.run_dir import run_name
from finetune.utils.device import peak_memory
from finetune.utils.files import write_file
from finetune.utils.text import WIDTH, colour, print_error

VERDICTS = {"as expected": "green", "than expected": "yellow", "did not pay": "yellow"}
ParamsByGroup = dict[str, dict[str, torch.Tensor]]  # by the group's name, then by the parameter's


def finish_run(
    recipe: Recipe,
    file: Path | None,
    net: nn.Module,
    start: ParamsByGroup,
    images: ImageDataset,
    logger: Logger,
    smoke: bool,
) -> dict[str, Any]:
    """Write the finished run's last files and return its result; result.json makes it a finished run, pictures come after it.

    `file` is the recipe's, `net` the network whose metrics were logged, `start` its parameters from before the run, `images`
    are the validation images.
    """
    folder = logger.folder
    predictions = safetensors.torch.load_file(logger.predictions_file)
    logits, labels = predictions["logits"], predictions["labels"]
    groups = getattr(images.images, "groups", None)
    measured = measure(recipe, logits, labels, groups, names=images.classes, units=units_of(net))
    temperature = measured.get("calibration", {}).get("temperature", 1.0)
    with merged(net):
        inputs, thresholds = images.transform.preprocessing, measured.get("thresholds")
        save_model(folder / "model", net, inputs, images.classes, temperature, thresholds)
    if adapters(net):
        with plain_head(net):
            save_adapter(folder / "adapter", net, {name.rpartition(".")[0] for name in head_parameters(recipe, net)})
    result = {"recipe": run_name(folder), **({"smoke": True} if smoke else {}), **measured, **run_result(recipe, logger)}
    result["use"], result["use_reason"] = model_to_use(result, recipe.metric)
    result["drift"] = drift(net, start)
    if subgroups := getattr(images.images, "subgroups", None):
        result["by_subgroup"] = subgroup_metrics(recipe, logits, labels, subgroups, groups, units_of(net))
    write_file(folder / "result.json", json.dumps(result, indent=1) + "\n")
    try_to(plot_curves, folder, recipe.metric)
    certain = logits / temperature  # as predict has them
    if units := units_of(net):
        try_to(plot_numbers, folder, logits, labels, images.classes, run_title(folder), units)
        try_to(plot_number_predictions, folder, logits, labels, images)
        try_to(plot_largest_errors, folder, logits, labels, images, units.deviation)
    else:
        try_to(plot_predictions, folder, certain, labels, images)
    if recipe.loss in ("cross_entropy", "binary"):
        try_to(plot_confusion_matrix, folder, logits, labels, images.classes, run_title(folder))
        try_to(plot_mistakes, folder, certain, labels, images, net)
    try_to(write_page, folder, images.images, describe_verdicts(recipe, file, result))
    return result


def try_to(plot: Callable[..., Path | None], *arguments: Any) -> None:
    """Draw a picture or write the page, or say why not: the result is there without it."""
    try:
        plot(*arguments)
    except Exception as error:
        print_error(f"{plot.__name__} failed: {type(error).__name__}: {error}")


def run_result(recipe: Recipe, logger: Logger) -> dict[str, Any]:
    """The run in numbers: the last epoch's metrics (not the best's: that one was chosen on these very images)."""
    last, best, seconds = logger.history[-1], best_row(logger.rows(), recipe.metric), logger.elapsed()
    probe = {}
    if row := logger.linear_probe:
        probe = {f"linear_probe_{recipe.metric}": row[recipe.metric], "linear_probe_l2": row.get("linear_probe_l2")}
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


def describe_result(recipe: Recipe, file: Path | None, result: dict[str, Any], folder: Path, verbose: bool = False) -> str:
    """A finished run's last lines: what it reached, how that is to be read, which network to use, and how to go on.

    `file` is the recipe's. Lines are folded at 80 columns; `verbose` adds how far each group moved, and the files.
    """
    metric, images = recipe.metric, result["val_images"]
    written = partial(write_value, metric, sign=" %")
    words = {metric: METRICS[metric], **REPORTED_METRICS}
    reached = [f"{words[name]} {write_value(name, result[name], sign=' %')}" for name in words if name in result]
    reached[0] += around(result, metric)
    early = f"; stopped early, after {result['epochs']} of {recipe.epochs} epochs" if result["epochs"] < recipe.epochs else ""
    cost = f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} images/s, {result['peak_memory_gib']:.1f} GiB"
    lines = [
        ("result", f"{reached[0]} of {images} images"),
        ("", ", ".join([*reached[1:], f"loss {result['loss']:.4f}"])),
        ("", describe_calibration(result)),
        ("", describe_thresholds(result)),
        *(("", line) for line in describe_numbers(result)),
        *(
            ("", f"{name}: {words[metric]} {written(part[metric])} of {part['val_images']} images{around(part, metric)}")
            for name, part in result.get("by_subgroup", {}).items()
            if metric in part
        ),
        ("cost", cost + early),
        *describe_verdicts(recipe, file, result),
        ("report", str(page) if (page := folder / PAGE).is_file() else ""),
    ]
    if verbose:
        lines.append(("moved", ", ".join(f"{name} {100 * share:.2f} %" for name, share in result["drift"].items())))
        lines.append(("files", f"in {folder}: {', '.join(sorted(path.name for path in folder.glob('[!.]*')))}"))
    run, formats = shlex.quote(str(folder)), "timm" if is_timm(recipe) else "torch"
    steps = [f"predict {run} PHOTO", f"evaluate {run} --data DIR", f"export {run} --to {formats}"]
    return "\n".join(["", *(highlight(*line) for line in lines if line[1]), "", *(f"finetune {step}" for step in steps)])


def around(result: dict[str, Any], metric: str) -> str:
    """The interval of a metric in brackets, where a result has it."""
    interval = result.get("intervals", {}).get(metric)
    return f" (95 % interval {' to '.join(write_value(metric, end, 1, '') for end in interval)})" if interval else ""


def describe_calibration(result: dict[str, Any]) -> str:
    """How far the probabilities are from the shares that are right, as they come and at the model's temperature."""
    if "calibration" not in result:
        return ""
    before, after = (f"{100 * value:.1f} %" for value in result["calibration"]["ece"])
    temperature = result["calibration"]["temperature"]
    cooled = f", by {after} at the model's temperature, {temperature:.2f}" if temperature != 1 else ""
    return f"probabilities off by {before} on average{cooled}"


def describe_thresholds(result: dict[str, Any]) -> str:
    """What a threshold for each of several labels is worth."""
    if {*result.get("thresholds", ())} <= {0.5}:
        return ""
    own, plain = (f"{100 * result[name]:.2f} %" for name in ("macro_f1_at_thresholds", "macro_f1"))
    return f"macro F1 {own} with a threshold for each class, {plain} at 0.5"


def describe_verdicts(recipe: Recipe, file: Path | None, result: dict[str, Any]) -> list[tuple[str, str]]:
    """How a result is to be read, as (label, sentence): against recorded runs and the linear probe, and which network to use.

    `file` is the recipe's. A soup is compared with the runs it was made of.
    """
    use = ("use", f"{result['use']}: {result['use_reason']}")
    if soup := result.get("soup"):
        gained = in_points(soup["soup_minus_best"], recipe.metric) + " points" * (recipe.metric not in NO_SHARES)
        against = f"{gained} against {soup['best_run']}, the best run on these very images"
        return [("soup", against), ("measured", f"on {soup['measured_on']}"), use]
    baseline = "none: a smoke run" if result.get("smoke") else describe_verdict(file, recipe, result[recipe.metric])
    return [
        ("baseline", baseline),
        ("probe", describe_gain(recipe.metric, result, recipe.lr_scale)),
        use,
    ]


def highlight(label: str, text: str) -> str:
    """A label and its text, folded: in a terminal the label is bold, and a verdict has its colour."""
    verdict = next((name for words, name in VERDICTS.items() if words in text), None)
    folded = fold(label, text)
    return colour(label, "bold") + folded[len(label) :] if verdict is None else colour(folded, verdict)


def fold(label: str, text: str) -> str:
    """A label and its text in lines of at most 80 columns."""
    return textwrap.fill(
        text, WIDTH, initial_indent=f"{label:10}", subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )


def describe_gain(metric: str, result: dict[str, Any], lr_scale: float = 1.0) -> str:
    """What fine-tuning has added to the linear probe; nothing for a run that did not start with one.

    Where it has harmed, learning rates are often too high for so few steps: see docs/results.md.
    """
    if f"linear_probe_{metric}" not in result:
        return ""
    before, after = result[f"linear_probe_{metric}"], result[metric]
    of_numbers = metric in NO_SHARES
    if beats(metric, after, before):
        gained = f"took it to {write_number(after)}" if of_numbers else f"added {100 * (after - before):.2f} points"
        words = f"fine-tuning {gained}" + ("" if more_than_chance(metric, before, after, result) else ", which may be chance")
    else:
        lower = f"fine-tuning did not pay; lower learning rates may: --lr-scale {0.3 * lr_scale:.2g}"
        words = lower if beats(metric, before, after) else "fine-tuning added nothing"
    l2 = result.get("linear_probe_l2")  # runs of old versions did not keep it
    reached = f"{METRICS[metric]} {write_number(before)}" if of_numbers else f"{100 * before:.2f} %"
    return f"linear probe {reached}{f' (l2 {l2:g})' if l2 else ''}; {words}"


def copy_params(groups: Sequence[ParamGroup]) -> ParamsByGroup:
    """The parameters as they are now, on the CPU; those in shards on the first process."""

    def copies(group: ParamGroup) -> dict[str, torch.Tensor]:
        params = gather_state({name: param.detach() for name, param in group.params.items()})
        return {name: param.cpu().clone() for name, param in params.items()}

    return {group.name: copies(group) for group in groups}


def drift(net: nn.Module, start: ParamsByGroup) -> dict[str, float]:
    """How far each group moved: the norm of its change over the norm that it started with, 0 for what was frozen."""

    def norm(tensors: Iterable[torch.Tensor]) -> float:
        return torch.nn.utils.get_total_norm([tensor.double() for tensor in tensors]).item()

    now = dict(net.named_parameters())
    return {
        group: norm(now[name].detach().cpu() - before for name, before in params.items()) / max(norm(params.values()), 1e-12)
        for group, params in start.items()
    }


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
