"""Learning rates as planned, and a run's curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.optim.param_groups import ParamGroup, planned_lrs, sampled_steps
from finetune.recipe.metrics import METRICS, direction, scale_of, unit_of, write_value
from finetune.report.drawing import Picture, legend_above, new_figure, run_title, save_figure, shorten, style, tidy


def plot_lrs(axes: Axes, lrs: Mapping[str, Sequence[float]], steps: Sequence[int], steps_per_epoch: float) -> None:
    """Every group's learning rate at `steps`, by epoch, on a log axis; a dotted line where a group starts to train."""
    time = [step / steps_per_epoch for step in steps]
    trained = {name: values for name, values in lrs.items() if any(values)}
    starts = set()
    for i, (name, values) in enumerate(trained.items()):
        colour = colormaps["viridis"](0.92 * i / max(1, len(trained) - 1))
        start = round(next(at for at, value in zip(time, values, strict=True) if value))
        label = f"{name}, from epoch {start + 1}" if start else name
        axes.plot(time, [value or math.nan for value in values], color=colour, label=label)
        starts.add(start)
    for start in starts - {0}:
        axes.axvline(start, color="0.6", linestyle=":", linewidth=1)
    lowest = min(max(values) for values in trained.values())  # a cosine's last dive to 0 hides all else
    axes.set(ylabel="learning rate", xlabel="epochs", yscale="log", ylim=(lowest / 100, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, columns=3 if starts - {0} else 6)


def plot_plan(file: Path, groups: Sequence[ParamGroup], steps_per_epoch: int, epochs: int) -> Path:
    """The learning rates of a run that is still to come."""
    steps = sampled_steps(0, epochs * steps_per_epoch)
    figure, axes = new_figure()
    plot_lrs(axes, planned_lrs(groups, steps, steps_per_epoch, epochs), steps, steps_per_epoch)
    axes.set_xlim(0, epochs)
    title = f"{shorten(file.stem.removesuffix('-plan'), 60)}: learning rates as planned"
    figure.suptitle(title, fontsize="medium", **style(title))
    return save_figure(figure, [axes], file)


def plot_curves(run: Path, metric: str) -> Path:
    """Draw a run's metrics.jsonl as curves.png."""
    return save_figure(draw_curves(run, metric), [], run / "curves.png")


def draw_curves(run: Path, metric: str) -> Figure:
    """A run's loss, metric, gradient norm and every group's learning rate by epoch; what came after epoch 1 stands at 1."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    epochs = [row for row in rows if "train_loss" in row]
    measured = [row for row in rows if metric in row]  # the first may be of the linear probe
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1)
    time = [(row["step"] + 1) / per_epoch for row in steps]  # in epochs, so that all four share an axis
    ends = [row["epoch"] + 1 for row in epochs]

    figure = Picture(figsize=(8, 10), layout="constrained")
    loss, validation, norm, lr = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 2, 4))
    loss.plot(time, [row["loss"] for row in steps], color="0.75", linewidth=0.8, label="each step, as augmented")
    loss.plot(
        ends,
        [row["train_loss"] for row in epochs],
        "o-",
        markersize=3,
        color="C0",
        clip_on=False,
        label="training, mean of the epoch",
    )
    loss.plot(ends, [row["loss"] for row in epochs], "o-", markersize=3, color="C1", clip_on=False, label="validation")
    loss.set(ylabel="loss", ylim=(0, None))
    marks = [row["epoch"] + 1 for row in measured], [scale_of(metric) * row[metric] for row in measured]
    validation.plot(*marks, "o-", markersize=3, color="C2")
    best, marked = max(measured, key=lambda row: direction(metric) * row[metric]), dict[int, list[str]]()
    for word, row in (("linear probe", measured[0]), ("best", best), ("last", measured[-1])):
        if word != "linear probe" or row["epoch"] == -1:
            marked.setdefault(row["epoch"], []).append(word)
    for (epoch, words), marker in zip(marked.items(), "sDo", strict=False):
        value = next(row[metric] for row in measured if row["epoch"] == epoch)
        label = f"{' and '.join(words)}: {write_value(metric, value, sign=' %')}{f', epoch {epoch + 1}' * (epoch >= 0)}"
        validation.plot(epoch + 1, scale_of(metric) * value, marker, color="C2", label=label, clip_on=False)
    validation.set(ylabel=f"validation {METRICS[metric]}{unit_of(metric)}")
    norm.plot(time, [row["grad_norm"] for row in steps], color="0.4", linewidth=0.8)
    norm.set(ylabel="gradient norm\nbefore clipping", yscale="log")
    shown = sampled_steps(0, len(steps))
    plot_lrs(lr, {name: [steps[step]["lr"][name] for step in shown] for name in steps[0]["lr"]}, shown, per_epoch)
    lr.set_xlim(0, ends[-1])
    legend_above(loss)
    legend_above(validation)
    tidy(loss, validation, norm, lr)
    result = f"{METRICS[metric]} {write_value(metric, epochs[-1][metric], sign=' %')} after epoch {ends[-1]}"
    title = run_title(run, result)
    figure.suptitle(title, fontsize="medium", **style(title))
    return figure
