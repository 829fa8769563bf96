"""The curves of a run as a page draws them: the points, ticks and names of small SVG charts."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

from finetune.recipe.metrics import METRICS, scale_of, unit_of
from finetune.utils.text import readable

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 30  # around the lines
POINTS = 300  # of a line: of more steps, each point is of several

Point = tuple[float, float]


class Line(NamedTuple):
    """A line of a chart, from its points (epochs, value)."""

    name: str
    kind: str  # a class of page.css, or a colour
    points: Sequence[Point]
    dots: bool = False


class Chart(NamedTuple):
    """What page.html draws, in units of its view box."""

    title: str
    lines: list[dict[str, Any]]  # "name", "kind", "path" and, of single values, "dots"
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def run_charts(run: Path, metric: str) -> list[Chart]:
    """Loss, metric, learning rates and gradient norm of a run's metrics.jsonl; those of which it has nothing are left out.

    Epochs count from 1, the linear probe's as 0.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, epochs = [row for row in rows if "grad_norm" in row], [row for row in rows if "train_loss" in row]
    measured = [(row["epoch"] + 1, scale_of(metric) * row[metric]) for row in rows if row.get(metric) is not None]
    if not epochs:
        return []
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1)

    def over_steps(value: Callable[[dict[str, Any]], float], pool: Callable[[Iterable[float]], float] = fmean) -> list[Point]:
        return binned([((row["step"] + 1) / per_epoch, value(row)) for row in steps], pool)

    ends = [row["epoch"] + 1 for row in epochs]
    loss = [
        Line("each step, as augmented", "faint", over_steps(lambda row: row["loss"])),
        Line("training, mean of the epoch", "first", [*zip(ends, (row["train_loss"] for row in epochs), strict=True)], True),
        Line("validation", "second", [*zip(ends, (row["loss"] for row in epochs), strict=True)], True),
    ]
    groups = list(steps[0]["lr"]) if steps else []
    lrs = [
        Line(readable(name), ramp(i / max(1, len(groups) - 1)), over_steps(partial(lr_of, name), max))
        for i, name in enumerate(groups)
    ]
    norm = Line("before clipping", "plain", over_steps(lambda row: row["grad_norm"], max))
    charts = [
        chart("Loss", loss),
        chart(f"Validation {METRICS[metric]}{unit_of(metric)}", [Line("", "first", measured, True)]),
        chart("Learning rates", lrs, log=True),
        chart("Gradient norm", [norm], log=True),
    ]
    return [one for one in charts if one.lines]


def lr_of(group: str, row: dict[str, Any]) -> float:
    """A group's learning rate in a step's row."""
    return float(row["lr"].get(group, 0))


def binned(points: Sequence[Point], pool: Callable[[Iterable[float]], float]) -> list[Point]:
    """At most POINTS points; of more, as many in a row become one at their middle, its value pooled."""
    points = [point for point in points if math.isfinite(point[1])]
    size = math.ceil(len(points) / POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), pool(y for _, y in part)) for part in parts]


def ramp(share: float) -> str:
    """A colour from violet to green, of one lightness, that shows on white and on black."""
    return f"hsl({280 - 140 * share:.0f} 55% 52%)"


def chart(title: str, lines: Sequence[Line], log: bool = False) -> Chart:
    """A chart of the lines that have a finite value; on a log axis, those above 0."""
    kept = [line._replace(points=[(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not log)]) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return Chart(title, [], [], [])
    xs, ys = zip(*(point for line in kept for point in line.points), strict=True)
    start = 0.0 if min(xs) < 1 else 1.0
    x_axis, x_ticks = scale(start, max(*xs, start + 1), MaxNLocator(6, integer=True), LEFT, WIDTH - RIGHT)
    low, high = (min(ys), max(ys)) if log else padded(min(ys), max(ys))
    locator = log_locator(low, high) if log else MaxNLocator(5)
    y_axis, y_ticks = scale(low, high, locator, HEIGHT - BOTTOM, TOP, log)
    drawn = []
    for line in kept:
        points = [(x_axis(x), y_axis(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = points if line.dots and len(points) <= 40 else points[:1] if len(points) == 1 else []
        drawn.append(
            {"name": line.name, "kind": line.kind, "path": path, "dots": [(round(x, 1), round(y, 1)) for x, y in dots]}
        )
    return Chart(title, drawn, x_ticks, y_ticks)


def padded(low: float, high: float) -> tuple[float, float]:
    """Ends a little beyond these, from 0 where that is near."""
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.35 * high else low - room), high + room


def log_locator(low: float, high: float) -> Any:
    """Powers of ten, and their double and fivefold where there are few of these."""
    return LogLocator(
        subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 4 else tuple(range(1, 10)), numticks=8
    )


def scale(
    low: float, high: float, locator: Any, start: float, end: float, log: bool = False
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """(what takes a value to its place between `start` and `end`, the ticks there with what they say)."""
    if log and low == high:
        low, high = low / 2, high * 2
    a, b = (math.log10(low), math.log10(high)) if log else (low, high)

    def place(value: float) -> float:
        return start + (end - start) * ((math.log10(value) if log else value) - a) / (b - a)

    ticks = [float(tick) for tick in locator.tick_values(low, high) if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return place, [(round(place(tick), 1), short(tick)) for tick in ticks]


def short(value: float) -> str:
    """A tick's number: 20, 0.05, 1e-4, 5e6."""
    return f"{value:g}".replace("e+0", "e") if value == 0 or abs(value) >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
