"""Which classes are taken for which."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.data.loader import is_unreadable
from finetune.metrics.counts import count_pairs
from finetune.report.drawing import save_figure, shorten, shorten_apart, style
from finetune.utils.text import align_columns

NAMED_CLASSES = 20  # in a confusion matrix; of more, names and numbers would be too small to read
LISTED = 10  # confusions
CELLS = 250  # along a side: of more classes, several share one


def plot_confusion_matrix(
    run: Path, logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], title: str = ""
) -> Path:
    """confusion.png: of the images of each class (rows), the share that was predicted as each class (columns).

    Up to 20 classes have names and numbers; of more, the largest confusions are circled, and listed by name.
    """
    seen = ~is_unreadable(labels)
    rows, columns, counts = count_pairs(logits[seen], labels[seen])
    labelled = torch.bincount(labels[seen], minlength=len(classes))
    shares, few = counts / labelled[rows], len(classes) <= NAMED_CLASSES
    figure = Figure(figsize=(8, 8 if few else 10), layout="constrained")
    axes, *below = [figure.subplots()] if few else figure.subplots(2, 1, height_ratios=(7.2, 2))
    right, size = int(counts[rows == columns].sum()), math.ceil(len(classes) / CELLS)
    side = math.ceil(len(classes) / size)
    cells = torch.zeros(side * side).scatter_reduce(0, rows // size * side + columns // size, shares, "amax")
    cells = cells.reshape(side, side).sqrt()  # the root: one image of fifty is seen, too
    axes.imshow(cells.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(-0.5, (n := side * size) - 0.5, n - 0.5, -0.5))
    result = f"{right} of {int(counts.sum())} images predicted as they are labelled"
    title = "\n".join(filter(None, [title, result]))
    figure.suptitle(title, fontsize="medium", **style(title))
    axes.set(xlabel="predicted", ylabel="labelled")
    if few:
        write_cells(
            axes,
            zip(rows.tolist(), columns.tolist(), counts.tolist(), shares.tolist(), strict=True),
            shorten_apart(classes, 24),
        )
    else:
        axes.set_xlabel(f"predicted: the number of the class, from 0{f'; of {size} x {size} the largest share' * (size > 1)}")
        wrong = rows != columns
        order = counts[wrong].argsort(descending=True, stable=True)[:LISTED]
        confusions = torch.stack([part[wrong][order] for part in (rows, columns, counts)], dim=1).tolist()
        for label, guess, _ in confusions:
            axes.plot(guess, label, "o", markersize=8, fillstyle="none", color="C3", markeredgewidth=0.8, clip_on=False)
        below[0].set_axis_off()
        text = describe_confusions(confusions, labelled.tolist(), classes)
        below[0].text(0.5, 1, text, ha="center", va="top", ma="left", fontsize=8, **style(text, "monospace"))
    return save_figure(figure, [], run / "confusion.png")


def write_cells(axes: Axes, cells: Iterable[tuple[int, int, int, float]], names: Sequence[str]) -> None:
    """The names of the classes along both sides, and in each cell (row, column, images, share of the row) the images."""
    cells = list(cells)
    drawn = style("".join(names))
    axes.set_xticks(range(len(names)), names, rotation=90, **drawn)
    axes.set_yticks(range(len(names)), names, **drawn)
    digits = len(str(max(count for _, _, count, _ in cells)))
    size = min(14.0, 600 / len(names) / digits)  # a cell is about 400 points / classes wide
    for row, column, count, share in cells:
        colour = "white" if share > 0.3 else "black"
        axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)


def describe_confusions(confusions: Sequence[tuple[int, int, int]], labelled: Sequence[int], classes: Sequence[str]) -> str:
    """A table of (label, predicted class, images), each class with its number; `labelled` has the images of each class."""
    if not confusions:
        return "no image was predicted as another class"
    rows: list[tuple[str, ...]] = [("labelled", "predicted", "images")]
    for label, guess, number in confusions:
        names = [f"{shorten(classes[i], 32)} ({i})" for i in (label, guess)]
        rows.append((*names, f"{number} of {labelled[label]}, {number / labelled[label]:.0%}"))
    return f"The largest confusions, circled above:\n\n{align_columns(rows)}"
