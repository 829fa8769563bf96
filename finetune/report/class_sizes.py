"""How many images each class has."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.data.dataset import ImageData, labels_of
from finetune.report.drawing import legend_above, save_figure, shorten, shorten_apart, style
from finetune.utils.text import align_columns

NAMED = 40  # classes with a bar each; of more, names would be too small to read
LISTED = 10  # of the largest classes, and of the smallest


def plot_class_sizes(file: Path, title: str, data: ImageData) -> Path:
    """A bar for each class, the largest above; of more than 40 a curve, and the ten largest and smallest by name.

    Raises:
        RecipeError: for a data set that does not know its labels.
    """
    train, val = (count_classes(labels_of(images), len(data.classes)) for images in (data.train, data.val))
    order = np.argsort(-train, kind="stable")
    totals = f"{len(data.train):,} training and {len(data.val):,} validation images of {len(data.classes):,} classes"
    times = train.max() / max(1, train.min())
    ratio = f"the largest class has {times:,.{int(times < 10)}f} times the training images of the smallest"
    if train.max() == train.min():
        ratio = "all classes have as many training images"
    if len(data.classes) <= NAMED:
        figure = Figure(figsize=(8, 1.6 + 0.22 * len(data.classes)), layout="constrained")
        axes, names = figure.subplots(), shorten_apart(data.classes, 32)
        draw_bars(axes, [names[i] for i in order], train[order], val[order])
    else:
        figure = Figure(figsize=(8, 7.2), layout="constrained")
        axes, below = figure.subplots(2, 1, height_ratios=(5, 2.6))
        draw_curve(axes, train[order])
        below.set_axis_off()
        text = list_ends(data.classes, order, train, val)
        below.text(0.5, 1, text, ha="center", va="top", ma="left", fontsize=8, **style(text, "monospace"))
    whole = "\n".join([title, totals, ratio])
    figure.suptitle(whole, fontsize="medium", **style(whole))
    return save_figure(figure, [axes], file)


def count_classes(labels: np.ndarray, classes: int) -> np.ndarray:
    """How many images have each class: of labels [n], or of 0 and 1 [n, classes]."""
    return labels.astype(int).sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)


def draw_bars(axes: Axes, names: Sequence[str], train: np.ndarray, val: np.ndarray) -> None:
    """A bar for each class from the top, validation images after training images, both as numbers behind it."""
    places = range(len(names))
    axes.barh(places, train, label="training")
    axes.barh(places, val, left=train, label="validation", color="C0", alpha=0.35)
    for place, one, other in zip(places, train, val, strict=True):
        axes.annotate(f"{one:,} + {other:,}", (one + other, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize="small", **style("".join(names)))
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.15 * (train + val).max()), xlabel="images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    legend_above(axes)


def draw_curve(axes: Axes, train: np.ndarray) -> None:
    """Training images by class, from the largest to the smallest."""
    axes.fill_between(range(1, len(train) + 1), train, step="mid", alpha=0.35)
    axes.step(range(1, len(train) + 1), train, where="mid")
    axes.set(xlabel="classes, the largest first", ylabel="training images", xlim=(0.5, len(train) + 0.5), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if train.max() > 20 * max(1, train.min()):  # the small ones would lie on the axis
        axes.set(yscale="log", ylim=(0.8 * max(1, train.min()), None))


def list_ends(classes: Sequence[str], order: np.ndarray, train: np.ndarray, val: np.ndarray) -> str:
    """The largest classes beside the smallest, each with its training and validation images."""

    def cells(i: int) -> tuple[str, str]:
        return f"{shorten(classes[i], 26)} ({i})", f"{train[i]:,} + {val[i]:,}"

    largest, smallest = map(cells, order[:LISTED]), map(cells, order[: -LISTED - 1 : -1])
    rows = [
        ("largest", "images", "smallest", "images"),
        *((*one, *other) for one, other in zip(largest, smallest, strict=True)),
    ]
    return align_columns(rows)
