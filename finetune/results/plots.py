"""Pictures of the plan and of the run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.loader import ImageDataset, is_unreadable
from finetune.optim.param_groups import planned_lrs, shown_steps
from finetune.recipe import Recipe
from finetune.recipe.recipe import METRICS
from finetune.train.evaluate import confusion_matrix

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def plot_lrs(axes: Axes, rates: Mapping[str, Sequence[float]], steps: Sequence[int], steps_per_epoch: float) -> None:
    """Every group's rate at the updates `steps`, by epoch, on a log axis; a dotted line where a group starts to train."""
    time = [step / steps_per_epoch for step in steps]
    trained = {name: values for name, values in rates.items() if any(values)}
    colours = plt.get_cmap("viridis")
    starts: dict[int, list[str]] = {}
    for i, (name, values) in enumerate(trained.items()):
        axes.plot(time, [value or math.nan for value in values], color=colours(0.92 * i / max(1, len(trained) - 1)), label=name)
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
    return plt.subplots(figsize=(8, 4.5), layout="constrained")


def save_figure(figure: Figure, axes: Sequence[Axes], file: Path) -> Path:
    """Grid lines, no box, and the picture on the disk."""
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def planned(file: Path, recipe: Recipe, net: nn.Module, num_images: int) -> Path:
    """The rates of a run that is still to come."""
    updates = recipe.data.updates(num_images)
    steps = shown_steps(0, recipe.epochs * updates)
    figure, axes = new_figure()
    plot_lrs(axes, planned_lrs(recipe, net, steps, updates), steps, updates)
    axes.set_xlim(0, recipe.epochs)
    return save_figure(figure, [axes], file)


def curves(run: Path, score: str) -> Path:
    """Draw a run's metrics.jsonl as curves.png: loss, score, gradient norm and every group's rate over the epochs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "grad_norm" in row]
    epochs = [row for row in rows if "train_loss" in row]
    scores = [row for row in rows if score in row]  # the first perhaps of the head alone, before the first epoch
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1)
    time = [(row["step"] + 1) / per_epoch for row in updates]  # in epochs, so that all four share an axis
    ends = [row["epoch"] + 1 for row in epochs]

    figure, (loss, scored, norm, rate) = plt.subplots(
        4, 1, figsize=(8, 9.5), sharex=True, layout="constrained", height_ratios=(3, 3, 2, 4)
    )
    loss.plot(
        time,
        [row["loss"] for row in updates],
        color="0.75",
        linewidth=0.8,
        label="training, each update (as augmented and smoothed)",
    )
    loss.plot(ends, [row["train_loss"] for row in epochs], "o-", markersize=3, color="C0", label="training, epoch mean")
    loss.plot(ends, [row["loss"] for row in epochs], "o-", markersize=3, color="C1", label="validation")
    loss.set(ylabel="loss", ylim=(0, None))
    loss.legend()
    scored.plot([row["epoch"] + 1 for row in scores], [100 * row[score] for row in scores], "o-", markersize=3, color="C2")
    scored.annotate(
        f"{epochs[-1][score]:.2%}",
        (ends[-1], 100 * epochs[-1][score]),
        xytext=(-4, -14),
        textcoords="offset points",
        ha="right",
    )
    scored.set(ylabel=f"validation {METRICS[score]}, %")
    norm.plot(time, [row["grad_norm"] for row in updates], color="0.4", linewidth=0.8)
    norm.set(ylabel="gradient norm\nbefore clipping", yscale="log")
    steps = shown_steps(0, len(updates))
    plot_lrs(rate, {name: [updates[step]["lr"][name] for step in steps] for name in updates[0]["lr"]}, steps, per_epoch)
    rate.set_xlim(0, ends[-1])
    return save_figure(figure, (loss, scored, norm, rate), run / "curves.png")


def confusion(run: Path, logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> Path:
    """confusion.png: of the images of each class (rows), the share that was predicted as each class (columns)."""
    seen = ~is_unreadable(labels)
    counts = confusion_matrix(logits[seen], labels[seen])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    few = len(classes) <= 20
    side = max(4.5, 0.45 * len(classes) + 2) if few else 9
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
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
    plt.close(figure)
    return run / "confusion.png"


def mistakes(run: Path, logits: torch.Tensor, labels: torch.Tensor, images: ImageDataset, number: int = 24) -> Path | None:
    """mistakes.png: the wrongly classified images of the highest loss, worst first, as the data set has them; None if none."""
    losses = cross_entropy(logits.double(), labels, reduction="none")
    wrong = (logits.argmax(1) != labels) & ~is_unreadable(labels)
    worst = [i for i in losses.argsort(descending=True).tolist() if wrong[i]][:number]
    if not worst:
        return None
    chances = logits.softmax(1)
    columns = min(6, len(worst))
    rows = math.ceil(len(worst) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, worst, strict=False):
        label, guess = int(labels[i]), int(logits[i].argmax())
        axes.imshow(images.images[i][0].convert("RGB"))
        axes.set_title(f"{images.classes[label]}\nas {images.classes[guess]}, {chances[i, guess]:.0%}", fontsize="small")
    figure.suptitle(f"the {len(worst)} worst of {int(wrong.sum())} mistakes in {len(labels)} images", fontsize="medium")
    figure.savefig(run / "mistakes.png", dpi=110)
    plt.close(figure)
    return run / "mistakes.png"
