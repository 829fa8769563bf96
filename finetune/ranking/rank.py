"""Which backbone for these images: linear probes on frozen features, judged on training images left out of the fit."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.dataset import ImageData, ImageList
from finetune.data.sources import load_data
from finetune.data.split import names_of
from finetune.ranking.candidates import Candidate, Wanted, find_candidates, name_networks
from finetune.ranking.features import digest_array, digest_images, place_of, recall
from finetune.ranking.probes import Task, dataset_of, feature_file, score, speed_of, validate
from finetune.recipe.metrics import METRICS, NUMBER_LOSSES, scale_of, unit_of, write_value
from finetune.report.drawing import legend_above, new_figure, save_figure, shorten
from finetune.tools.defaults import Choice
from finetune.tools.image_stats import recipe_for, sample_stats
from finetune.tools.label_errors import deal_folds
from finetune.training.setup import own_accelerator_state
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.files import cache_folder, check_folder, read_json, write_file
from finetune.utils.seed import keep_random_state
from finetune.utils.text import WIDTH, align_columns, duration, fill_lines

FEWEST = 10  # training images


def report(
    source: str, wanted: Wanted, folder: Path, cache: Path | None = None, wide: bool = False
) -> tuple[dict[str, Any], str]:
    """What `finetune rank` shows, (in JSON's types, as text); it writes rank.json and draws rank.png in `folder`.

    Raises:
        RecipeError: for names and files that are not there, for images that a run would refuse, and if nothing can be ranked.
    """
    start, named, cache = time.monotonic(), name_networks(wanted), cache or cache_folder() / "features"
    check_folder(cache)
    source = str(Path(source).resolve()) if Path(source).exists() else source
    base = recipe_for(source, wanted.loss)
    data = load_data(base)
    assert isinstance(data.train, ImageList) and isinstance(data.val, ImageList)  # as of every source but a function
    if len(data.train) < FEWEST:
        raise RecipeError(f"rank needs {FEWEST} training images or more, not {len(data.train)}")
    stats = sample_stats(data, source, base.loss)
    candidates, left_out = find_candidates(named, stats, base, wanted.image_size)
    if not candidates:
        raise RecipeError("\n  ".join(["none of these networks can be had:", *(": ".join(pair) for pair in left_out.items())]))
    folds = deal_folds(np.asarray(data.train.labels), data.train.groups or names_of(data.train, source))
    task = Task(data, source, base, stats.largest / stats.smallest, digest_images(data.train), folds, cache)
    with own_accelerator_state(), keep_random_state():
        rows = rank(task, candidates, left_out, wanted.minutes and start + 60 * wanted.minutes)
        validation = validate(task, next(one for one in candidates if one.label == rows[0]["name"]))
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "data": source,
        "images": digest_of(data, task.content),
        "train": len(data.train),
        "classes": len(data.classes),
        "loss": base.loss,
        "metric": base.metric,
        "rows": rows,
        "left_out": left_out,
        "validation": validation,
    }
    write_file(folder / "rank.json", json.dumps(result, indent=1) + "\n")
    picture = draw(result, folder / "rank.png")
    return result | {"picture": str(picture)}, describe(result, folder, wide)


def digest_of(data: ImageData, content: str) -> str:
    """What tells these training images, labels and classes from others."""
    assert isinstance(data.train, ImageList)
    return place_of(Path(), {"images": content, "labels": digest_array(data.train.labels), "classes": data.classes}).stem


def rank(task: Task, candidates: Sequence[Candidate], left_out: dict[str, str], end: float | None) -> list[dict[str, Any]]:
    """A row for each candidate, the best first; the cheapest is looked at first, and what would last beyond `end` is left out.

    Whatever is left out is added to `left_out` with its reason.

    Raises:
        RecipeError: if none is left.
    """
    speeds = {}
    for one in candidates:
        try:
            speeds[one.label] = speed_of(task, one)
        except RecipeError as error:
            left_out[one.label] = first_line(error).partition(". ")[0]
    rows, slower, images = list[dict[str, Any]](), 1.0, len(task.data.train)
    dataset = dataset_of(task, candidates[0], task.data.train)
    for one in sorted((one for one in candidates if one.label in speeds), key=lambda one: images / speeds[one.label]):
        expected = images / speeds[one.label] * (0 if recall(feature_file(task, one, task.content)) else 1)
        if end and (left := end - time.monotonic()) < expected * slower:
            left_out[one.label] = f"it takes about {duration(expected * slower)}, and {duration(max(0, left))} were left"
            continue
        began = time.monotonic()
        rows.append(score(task, one, dataset, speeds[one.label]))
        if expected:
            slower = max(1.0, (time.monotonic() - began) / expected)  # images are read, a head is fitted
    if not rows:
        why = "; ".join(f"{label}: {reason}" for label, reason in left_out.items())
        raise RecipeError(f"nothing could be ranked: {why}")
    return sorted(rows, key=lambda row: -row[task.base.metric])


def near_best(result: dict[str, Any]) -> list[str]:
    """The names of rows whose score is within the interval of the best row's."""
    best, *others = result["rows"]
    return [row["name"] for row in others if row[result["metric"]] >= best["interval"][0]]


def describe(result: dict[str, Any], folder: Path, wide: bool) -> str:
    """The table, what it can't tell, what is left out, and how to go on."""
    name, rows, validation = result["metric"], result["rows"], result["validation"]
    metric, both = METRICS[name], [other for other in ("macro_f1", "spearman") if other in rows[0] and other != name]
    table = [("backbone", metric, "95 %", *(METRICS[other] for other in both), "images/s", "params", "px", "licence")]
    for row in rows:
        beside = (write_value(other, row[other], 1) for other in both)
        values = [write_value(name, row[name], 1), between(name, row["interval"]), *beside]
        cost = (f"{row['images_per_second']:.3g}", f"{row['parameters'] / 1e6:.1f} M", str(row["image_size"]))
        table.append((row["name"], *values, *cost, row["licence"]))
    if not wide:
        table = [line[:-1] for line in table]
    kind = "classes" if result.get("loss") not in NUMBER_LOSSES else "numbers" if result["classes"] > 1 else "number"
    head = (
        f"{Path(result['data']).name}: {result['train']:,} training images of {result['classes']} {kind}; "
        f"{metric} of a linear probe on frozen features, of images out of its folds"
    )
    lines = [fill_lines(head), "", align_columns(table, numbers=True, width=float("inf") if wide else WIDTH), ""]
    if near := near_best(result):
        lines.append(fill_lines(f"within the interval of the best, so that chance may order them: {', '.join(near)}"))
    lines += [fill_lines(f"left out: {label}: {why}") for label, why in result["left_out"].items()]
    licences = defaultdict[str, list[str]](list)
    for row in rows if not wide else ():
        licences[row["licence"]].append(row["name"])
    if licences:
        lines.append(fill_lines("licences of the weights: " + "; ".join(f"{k} ({', '.join(v)})" for k, v in licences.items())))
    lines += [
        fill_lines(
            f"{validation['name']} on the {validation['images']:,} validation images, which had no say: {metric} "
            f"{write_value(name, validation[name], 1)} ({between(name, validation['interval'])})"
        ),
        f"picture  {folder / 'rank.png'}",
        "to go on with the first:",
        f"finetune suggest --data DIR --from {folder / 'rank.json'} --output mine.py",
    ]
    return "\n".join(lines)


def between(metric: str, interval: Sequence[float]) -> str:
    """The ends of an interval, of shares in percent."""
    return " to ".join(write_value(metric, end, 1, "") for end in interval)


def draw(result: dict[str, Any], file: Path) -> Path:
    """The score of each network, with its interval, by images a second."""
    figure, axes = new_figure()
    metric, scale = result["metric"], scale_of(result["metric"])
    for i, row in enumerate(result["rows"]):
        value, (low, high) = row[metric], row["interval"]
        errors = [[scale * (value - low)], [scale * (high - value)]]
        axes.errorbar(
            row["images_per_second"], scale * value, errors, fmt="osD^v"[i // 10 % 5], color=f"C{i % 10}", capsize=3,
            label=shorten(row["name"], 44),
        )  # fmt: skip
    axes.set(xscale="log", xlabel="images a second, forward pass on this machine", ylabel=f"{METRICS[metric]}{unit_of(metric)}")
    speeds = [row["images_per_second"] for row in result["rows"]]
    axes.set_xlim(min(speeds) / 1.5, max(speeds) * 1.5)
    ticks = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if min(speeds) / 1.5 <= tick <= max(speeds) * 1.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    legend_above(axes, columns=2)
    title = f"{shorten(Path(result['data']).name, 40)}: linear probes on {result['train']:,} training images, 95 % intervals"
    figure.suptitle(title, fontsize="medium")
    return save_figure(figure, [axes], file)


def choose(file: Path, source: str, backbone: str | None = None, weights: str | None = None) -> Choice:
    """The first row of a rank.json, or that of the named backbone.

    Raises:
        RecipeError: for a file that holds no ranking, or one of other images; for a backbone that is not in it; for weights.
    """
    if weights:
        raise RecipeError(f"the weights are those of {file}: leave out --weights, or --from")
    result = read_json(file) if file.is_file() else {}
    if not result.keys() >= {"rows", "images", "metric"}:
        raise RecipeError(f"{file} is no rank.json: make one with finetune rank --data {source}")
    data = load_data(recipe_for(source, result.get("loss")))
    assert isinstance(data.train, ImageList)
    if digest_of(data, digest_images(data.train)) != result["images"]:
        raise RecipeError(f"{file} is of other images ({result['data']}) than {source}: finetune rank --data {source}")
    rows, metric = result["rows"], result["metric"]
    found = [i for i, row in enumerate(rows) if backbone in (None, row["name"], row["backbone"])]
    if not found:
        raise RecipeError(f"{file} has no {backbone}; it ranks {', '.join(row['name'] for row in rows)}")
    row, place = rows[found[0]], "first" if found[0] == 0 else f"number {found[0] + 1}"
    why = f"{place} of {len(rows)} in finetune rank: {METRICS[metric]} {write_value(metric, row[metric], 1)}"
    why += f" ({between(metric, row['interval'])})"
    return Choice(row["backbone"], row["weights"], row["image_size"], f"{why} of a linear probe")
