"""Pictures of a plan and of a run."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay as they are
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator

from finetune.data.loader import is_unreadable
from finetune.optim.param_groups import ParamGroup, planned_lrs, sampled_steps
from finetune.recipe.recipe import METRICS
from finetune.training.evaluate import count_pairs
from finetune.training.run_dir import run_name
from finetune.utils.files import write_file
from finetune.utils.text import align_columns, readable

NAMED_CLASSES = 20  # in a confusion matrix; of more, names and numbers would be too small to read
LISTED = 10  # confusions
CELLS = 250  # along a side: of more classes, several share one


class Picture(Figure):
    """A figure that a notebook shows, whatever its matplotlib is set to."""

    def _repr_png_(self) -> bytes:
        self.savefig(file := io.BytesIO(), dpi=100)
        return file.getvalue()


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


def legend_above(axes: Axes, columns: int = 3) -> None:
    """A legend above a diagram, where it hides no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize="small", frameon=False, borderaxespad=0.2)


def new_figure() -> tuple[Figure, Axes]:
    """An empty picture of one diagram."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Figure, axes: Sequence[Axes], file: Path) -> Path:
    """Write the picture, with grid lines and no box."""
    tidy(*axes)
    figure.savefig(picture := io.BytesIO(), dpi=200)
    write_file(file, picture.getvalue())
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
    marks = [row["epoch"] + 1 for row in measured], [100 * row[metric] for row in measured]
    validation.plot(*marks, "o-", markersize=3, color="C2")
    best, marked = max(measured, key=lambda row: row[metric]), dict[int, list[str]]()
    for word, row in (("linear probe", measured[0]), ("best", best), ("last", measured[-1])):
        if word != "linear probe" or row["epoch"] == -1:
            marked.setdefault(row["epoch"], []).append(word)
    for (epoch, words), marker in zip(marked.items(), "sDo", strict=False):
        value = next(100 * row[metric] for row in measured if row["epoch"] == epoch)
        label = f"{' and '.join(words)}: {value:.2f} %{f', epoch {epoch + 1}' * (epoch >= 0)}"
        validation.plot(epoch + 1, value, marker, color="C2", label=label, clip_on=False)
    validation.set(ylabel=f"validation {METRICS[metric]}, %")
    norm.plot(time, [row["grad_norm"] for row in steps], color="0.4", linewidth=0.8)
    norm.set(ylabel="gradient norm\nbefore clipping", yscale="log")
    shown = sampled_steps(0, len(steps))
    plot_lrs(lr, {name: [steps[step]["lr"][name] for step in shown] for name in steps[0]["lr"]}, shown, per_epoch)
    lr.set_xlim(0, ends[-1])
    legend_above(loss)
    legend_above(validation)
    tidy(loss, validation, norm, lr)
    result = f"{METRICS[metric]} {100 * epochs[-1][metric]:.2f} % after epoch {ends[-1]}"
    title = run_title(run, result)
    figure.suptitle(title, fontsize="medium", **style(title))
    return figure


def run_title(run: Path, result: str = "") -> str:
    """A picture's title: the recipe, its images, and in a line below what was reached."""
    file = run / "recipe.json"
    source = json.loads(file.read_text())["data"]["source"] if file.is_file() else ""
    name, images = run_name(run), Path(str(source)).name
    on = f" on {images}" if images not in ("", name) else ""  # a suggested recipe is called as its images
    return "\n".join(filter(None, [shorten(readable(f"{name}{on}"), 80), result]))


def shorten(text: str, length: int) -> str:
    """The text, as it can be drawn, with its middle left out where it is longer."""
    text = drawable(text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def drawable(text: str) -> str:
    """The text with an escape such as \\u732b for each character that is no print, or that no font here has."""
    missing = missing_characters(text)
    fonts = find_fonts(missing)
    kept = (one if one.isprintable() and (one not in missing or one in fonts) else ascii(one)[1:-1] for one in text)
    return "".join(kept)


def style(text: str, family: str = "sans-serif") -> dict[str, Any]:
    """Arguments with which matplotlib draws the text as it is: no formulas, and fonts that have its characters."""
    return {"parse_math": False, "fontfamily": [family, *sorted(set(find_fonts(missing_characters(text)).values()))]}


def missing_characters(text: str) -> frozenset[str]:
    """The characters of a text that matplotlib's own font does not have."""
    return frozenset(one for one in text if not one.isascii() and ord(one) not in usual_characters())


@cache
def usual_characters() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont(FontProperties(family=["sans-serif"]))).get_charmap())


@cache
def find_fonts(characters: frozenset[str]) -> dict[str, str]:
    """A font of this machine for each of the characters that one has."""
    found: dict[str, str] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name) if characters else ():
        if characters == found.keys():
            break
        with suppress(Exception):  # a font that matplotlib can't use
            font = FT2Font(entry.fname)
            there = font.get_charmap() if font.scalable and not entry.name.startswith("Last Resort") else {}  # boxes
            found |= {one: entry.name for one in characters - found.keys() if ord(one) in there}
    return found


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
        names = [shorten(name, 24) for name in classes]
        names = [name if names.count(name) == 1 else f"{i}: {shorten(classes[i], 20)}" for i, name in enumerate(names)]
        write_cells(axes, zip(rows.tolist(), columns.tolist(), counts.tolist(), shares.tolist(), strict=True), names)
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
