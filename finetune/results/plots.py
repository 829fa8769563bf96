"""Pictures of a plan and of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay as they are
from torch.nn.functional import cross_entropy

from finetune.data.loader import ImageDataset, is_unreadable
from finetune.optim.param_groups import ParamGroup, planned_lrs, sampled_steps
from finetune.recipe.recipe import METRICS
from finetune.training.evaluate import confusion_matrix


def plot_lrs(axes: Axes, lrs: Mapping[str, Sequence[float]], steps: Sequence[int], steps_per_epoch: float) -> None:
    """Every group's learning rate at `steps`, by epoch, on a log axis; a dotted line where a group starts to train."""
    time = [step / steps_per_epoch for step in steps]
    trained = {name: values for name, values in lrs.items() if any(values)}
    starts: dict[int, list[str]] = {}
    for i, (name, values) in enumerate(trained.items()):
        colour = colormaps["viridis"](0.92 * i / max(1, len(trained) - 1))
        axes.plot(time, [value or math.nan for value in values], color=colour, label=name)
        first = next(at for at, value in zip(time, values, strict=True) if value)
        starts.setdefault(round(first), []).append(name)
    for at, names in starts.items():
        if at > 0:
            axes.axvline(at, color="0.6", linestyle=":", linewidth=1)
            axes.annotate(
                names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
                (at, 0.02),
                rotation=90,
                ha="right",
                va="bottom",
                xycoords=("data", "axes fraction"),
                fontsize="x-small",
                color="0.3",
            )
    lowest = min(max(values) for values in trained.values())  # a cosine's last dive to 0 hides all else
    axes.set(ylabel="learning rate", xlabel="epoch", yscale="log", ylim=(lowest / 100, None))
    axes.legend(ncols=min(6, len(trained)), fontsize="small")


def new_figure() -> tuple[Figure, Axes]:
    """An empty picture of one diagram."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Figure, axes: Sequence[Axes], file: Path) -> Path:
    """Write the picture, with grid lines and no box."""
    tidy(*axes)
    figure.savefig(file, dpi=110)
    return file


def tidy(*axes: Axes) -> None:
    """Grid lines, no box."""
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)


def plot_plan(file: Path, groups: Sequence[ParamGroup], steps_per_epoch: int, epochs: int) -> Path:
    """The learning rates of a run that is still to come."""
    steps = sampled_steps(0, epochs * steps_per_epoch)
    figure, axes = new_figure()
    plot_lrs(axes, planned_lrs(groups, steps, steps_per_epoch, epochs), steps, steps_per_epoch)
    axes.set_xlim(0, epochs)
    return save_figure(figure, [axes], file)


def plot_curves(run: Path, metric: str) -> Path:
    """Draw a run's metrics.jsonl as curves.png."""
    figure = draw_curves(run, metric)
    figure.savefig(run / "curves.png", dpi=110)
    return run / "curves.png"


def draw_curves(run: Path, metric: str) -> Figure:
    """A run's loss, metric, gradient norm and every group's learning rate by epoch."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    epochs = [row for row in rows if "train_loss" in row]
    measured = [row for row in rows if metric in row]  # the first may be of the linear probe
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1)
    time = [(row["step"] + 1) / per_epoch for row in steps]  # in epochs, so that all four share an axis
    ends = [row["epoch"] + 1 for row in epochs]

    figure = Figure(figsize=(8, 9.5), layout="constrained")
    loss, validation, norm, lr = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 2, 4))
    each = "training, each step (as augmented and smoothed)"
    loss.plot(time, [row["loss"] for row in steps], color="0.75", linewidth=0.8, label=each)
    loss.plot(ends, [row["train_loss"] for row in epochs], "o-", markersize=3, color="C0", label="training, epoch mean")
    loss.plot(ends, [row["loss"] for row in epochs], "o-", markersize=3, color="C1", label="validation")
    loss.set(ylabel="loss", ylim=(0, None))
    loss.legend()
    validation.plot(
        [row["epoch"] + 1 for row in measured], [100 * row[metric] for row in measured], "o-", markersize=3, color="C2"
    )
    last = (ends[-1], 100 * epochs[-1][metric])
    validation.annotate(f"{epochs[-1][metric]:.2%}", last, xytext=(-4, -14), textcoords="offset points", ha="right")
    validation.set(ylabel=f"validation {METRICS[metric]}, %")
    norm.plot(time, [row["grad_norm"] for row in steps], color="0.4", linewidth=0.8)
    norm.set(ylabel="gradient norm\nbefore clipping", yscale="log")
    shown = sampled_steps(0, len(steps))
    plot_lrs(lr, {name: [steps[step]["lr"][name] for step in shown] for name in steps[0]["lr"]}, shown, per_epoch)
    lr.set_xlim(0, ends[-1])
    tidy(loss, validation, norm, lr)
    return figure


def plot_confusion_matrix(run: Path, logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> Path:
    """confusion.png: of the images of each class (rows), the share that was predicted as each class (columns)."""
    seen = ~is_unreadable(labels)
    counts = confusion_matrix(logits[seen], labels[seen])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    few = len(classes) <= 20
    side = max(4.5, 0.45 * len(classes) + 2) if few else 9
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="labelled")
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row in range(len(classes)):
            for column in range(len(classes)):
                if counts[row, column]:
                    axes.text(
                        column,
                        row,
                        f"{counts[row, column]}",
                        ha="center",
                        va="center",
                        fontsize="small",
                        color="white" if shares[row, column] > 0.5 else "black",
                    )
    figure.savefig(run / "confusion.png", dpi=110)
    return run / "confusion.png"


def plot_mistakes(run: Path, logits: torch.Tensor, labels: torch.Tensor, images: ImageDataset, number: int = 24) -> Path | None:
    """mistakes.png: the wrongly classified images of the highest loss, worst first, as the data set has them; None if none."""
    losses = cross_entropy(logits.double(), labels, reduction="none")
    wrong = (logits.argmax(1) != labels) & ~is_unreadable(labels)
    worst = [i for i in losses.argsort(descending=True).tolist() if wrong[i]][:number]
    if not worst:
        return None
    probs = logits.softmax(1)
    columns = min(6, len(worst))
    rows = math.ceil(len(worst) / columns)
    figure = Figure(figsize=(2 * columns, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, worst, strict=False):
        label, guess = int(labels[i]), int(logits[i].argmax())
        axes.imshow(images.images[i][0].convert("RGB"))
        axes.set_title(f"{images.classes[label]}\nas {images.classes[guess]}, {probs[i, guess]:.0%}", fontsize="small")
    figure.suptitle(f"the {len(worst)} worst of {int(wrong.sum())} mistakes in {len(labels)} images", fontsize="medium")
    figure.savefig(run / "mistakes.png", dpi=110)
    return run / "mistakes.png"
