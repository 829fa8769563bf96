"""Predicted numbers against labelled ones: a diagram, and sheets of images."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.functional import one_hot

from finetune.data.loader import ImageDataset, is_unreadable
from finetune.metrics.numbers import to_grades
from finetune.models.linear_probe import Units
from finetune.report.confusion import plot_confusion_matrix
from finetune.report.drawing import run_title, save_figure, shorten, style
from finetune.report.sheets import NUMBER, WIDTH, Tile, draw_sheet, evenly_spaced, name_labels, name_of_image, picture
from finetune.utils.text import readable

COLUMNS = 3  # diagrams side by side


def plot_numbers(
    folder: Path,
    outputs: torch.Tensor,
    labels: torch.Tensor,
    names: Sequence[str],
    title: str,
    units: Units | None = None,
) -> Path:
    """numbers.png: of each number a diagram, a dot an image, the prediction over the label; on the line both are the same.

    Where there is one, and `units` say that it is a grade, confusion.png has the grades labelled and predicted.
    """
    if len(names) == 1 and (grades := to_grades(outputs, units)) is not None:
        plot_grades(folder, grades[:, 0], labels[:, 0], title)
    seen = ~is_unreadable(labels)
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    side = 6 if columns == 1 else 4
    figure = Figure(figsize=(side * columns, side * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name, output, label in zip(grid, names, outputs[seen].T, labels[seen].T, strict=False):
        draw_number(axes, output, label)
        if len(names) > 1:
            axes.set_title(shorten(readable(name), 30), fontsize="medium", **style(name))
    for axes in grid:
        axes.set_axis_off()
    shown = [axes for axes in figure.axes if axes.axison]
    figure.suptitle(title, fontsize="medium", **style(title))
    return save_figure(figure, shown, folder / "numbers.png")


def plot_grades(folder: Path, grades: torch.Tensor, labels: torch.Tensor, title: str) -> Path:
    """confusion.png of predicted and labelled grades [n], every one from the lowest to the highest."""
    seen = ~is_unreadable(labels[:, None])
    said, true = grades[seen].long(), labels[seen].long()
    lowest = int(torch.cat([said, true]).min())
    classes = [str(grade) for grade in range(lowest, int(torch.cat([said, true]).max()) + 1)]
    return plot_confusion_matrix(folder, one_hot(said - lowest, len(classes)), true - lowest, classes, title)


def draw_number(axes: Axes, output: torch.Tensor, label: torch.Tensor) -> None:
    """One number's diagram: both axes have the same ends."""
    both = torch.cat([output, label]).double()
    low, high = both.min().item(), both.max().item()
    room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    ends = (low - room, high + room)
    size = 14 if len(label) < 1000 else 5
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    axes.scatter(label.tolist(), output.tolist(), s=size, alpha=0.5 if len(label) < 5000 else 0.2, linewidths=0, zorder=2)
    axes.set(xlim=ends, ylim=ends, xlabel="labelled", ylabel="predicted", aspect="equal")


def plot_number_predictions(run: Path, outputs: torch.Tensor, labels: torch.Tensor, images: ImageDataset) -> Path | None:
    """predictions.png: validation images drawn evenly, with what is labelled and predicted; None if none could be read."""
    seen = (~is_unreadable(labels)).nonzero()[:, 0].tolist()
    chosen = [seen[place] for place in evenly_spaced(len(seen), NUMBER)]
    title = run_title(run, f"{len(chosen)} of {len(seen)} validation images")
    return draw(chosen, title, run / "predictions.png", outputs, labels, images)


def plot_largest_errors(
    run: Path, outputs: torch.Tensor, labels: torch.Tensor, images: ImageDataset, deviation: Sequence[float]
) -> Path | None:
    """mistakes.png: the images of the largest errors, in deviations of the training images' numbers, the largest first."""
    errors = number_errors(outputs, labels, deviation)
    worst = errors.argsort(descending=True, stable=True)[: min(NUMBER, int((errors >= 0).sum()))].tolist()
    title = run_title(run, f"the {len(worst)} largest errors in {len(labels)} images")
    return draw(worst, title, run / "mistakes.png", outputs, labels, images)


def number_errors(outputs: torch.Tensor, labels: torch.Tensor, deviation: Sequence[float]) -> torch.Tensor:
    """Each image's mean error over its numbers, in their deviations [n]; -1 of one that could not be read."""
    errors = (outputs - labels).abs() / torch.tensor(deviation, dtype=outputs.dtype)
    return errors.mean(1).nan_to_num(-1)


def draw(
    chosen: Sequence[int], title: str, file: Path, outputs: torch.Tensor, labels: torch.Tensor, images: ImageDataset
) -> Path | None:
    """A sheet of these images; None of none."""
    columns = max(2, min(4, len(chosen)))
    tiles = []
    for i in chosen:
        said = [name_of_image(images, i), f"labelled {name_labels(images, labels[i].numpy())}"]
        said.append(f"predicted {name_labels(images, outputs[i].numpy())}")
        tiles.append(Tile(picture(images, i), "\n".join(shorten(line, WIDTH // columns) for line in said)))
    return draw_sheet(tiles, title, file, columns) if tiles else None
