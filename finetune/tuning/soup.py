"""One network of several finished runs: their weights averaged (Wortsman et al. 2022, arXiv 2203.05482).

Towards the pretrained weights, as well: Wortsman et al. 2021, arXiv 2109.01903 (WiSE-FT).
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from finetune.data.dataset import file_rows, fingerprint, record_files
from finetune.metrics.compute import best_row, compute_metrics, subgroup_metrics
from finetune.metrics.measure import measure
from finetune.models.saving import save_model
from finetune.page.write import write_page
from finetune.recipe.metrics import METRICS, direction, write_value
from finetune.report.confusion import plot_confusion_matrix
from finetune.report.drawing import run_title
from finetune.report.numbers import plot_numbers
from finetune.results.paired import compare, in_points, interval_of
from finetune.results.summary import describe_verdicts, environment, fold, try_to
from finetune.training.run_dir import run_name, start_run_dir, weights_digest
from finetune.training.setup import make_accelerator, own_accelerator_state
from finetune.tuning.ingredients import Pot, Runs, fill_pot, read_runs, start_state
from finetune.utils.device import peak_memory
from finetune.utils.errors import RecipeError
from finetune.utils.files import write_file, write_folder
from finetune.utils.text import WIDTH, align_columns

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # of the start, to choose from
NAME = 26  # characters of a run's name in a table of 80 columns
VERDICTS = {"gain": "better than", "loss": "worse than", "chance": "within chance of"}
Rows = list[dict[str, Any]]


def make_soup(
    folders: Sequence[Path],
    output: Path,
    greedy: bool = False,
    toward: bool = False,
    share: float | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Average finished runs into a run folder `output`, and compare it with each; returns its result.json, with "soup".

    `greedy` adds the runs one by one, the best first, each if the average gets no worse. `toward` goes from the average to the
    runs' start, the pretrained weights under the linear probe's head: by `share`, 0 to 1, or the best of SHARES. What is chosen
    is chosen on images that are not measured on: see `fill_pot`. `data` is where the images lie now.

    Raises:
        RecipeError: if the runs can't be averaged, or their images are others than they were.
    """
    if len(folders) < 2 and not toward:
        raise RecipeError("a soup needs two runs or more; of one run: --toward pretrained")
    if share is not None and not (toward and 0 <= share <= 1):
        raise RecipeError("--share, 0 to 1, is the part that the pretrained weights get: with --toward pretrained")
    if greedy and len(folders) < 2:
        raise RecipeError("--greedy chooses among runs: name two or more")
    begun, runs = time.monotonic(), read_runs(folders, data)
    if toward and runs.recipe.linear_probe is None:
        raise RecipeError(
            f"--toward pretrained needs runs whose recipe has a linear_probe: else their start, as that of {folders[0]}, has a "
            "random head"
        )
    if toward and runs.weights not in ("", weights_digest(runs.recipe)):
        raise RecipeError(f"{runs.recipe.weights} is another file than the one that the runs started from: put that one there")
    with own_accelerator_state():
        pot = fill_pot(runs, make_accelerator(runs.recipe), choosing=greedy or (toward and share is None))
        number = len(folders)
        pot.states += [start_state(pot)] if toward else []
        members, tried = choose_members(pot, runs.names) if greedy else (list(range(number)), [])
        if toward and share is None:
            share, shares_tried = choose_share(pot, members)
            tried += shares_tried
        shares = shares_of(members, number, share or 0.0)
        made = {
            "kind": "greedy" if greedy else "uniform",
            "share_of_start": share,
            "measured_on": measured_on(runs, pot),
            "tried": tried,
            **compare_with_runs(pot, runs, shares),
        }
        result = result_of(pot, shares, run_name(folders[0]), begun) | {"soup": made}
        write_folder(output, lambda aside: write_run(aside, folders[0], pot, shares, result))
    return {"run": str(output)} | result


def shares_of(members: Sequence[int], number: int, start: float) -> list[float]:
    """The share of each of so many runs, the same for each member and 0 for the others, and last that of their start."""
    return [*((1 - start) / len(members) if i in members else 0.0 for i in range(number)), *([start] if start else [])]


def choose_members(pot: Pot, names: Sequence[str]) -> tuple[list[int], Rows]:
    """(the positions of the runs of the greedy soup, a row for each run in the order in which they were tried)."""
    number = len(names)
    alone = [pot.score(shares_of([i], number, 0), names[i]) for i in range(number)]
    members, best, tried, sign = list[int](), float("-inf"), Rows(), direction(pot.recipe.metric)
    for i in sorted(range(number), key=lambda i: -sign * alone[i]):
        value = pot.score(shares_of(sorted([*members, i]), number, 0), f"with {names[i]}")
        tried.append({"run": names[i], "alone": alone[i], "average": value, "added": sign * value >= best})
        if sign * value >= best:
            members, best = sorted([*members, i]), sign * value
    return members, tried


def choose_share(pot: Pot, members: Sequence[int]) -> tuple[float, Rows]:
    """(the share of the start with the best metric, of several the smallest, a row for each of SHARES)."""
    number = len(pot.states) - 1
    values = {share: pot.score(shares_of(members, number, share), f"share {share}") for share in SHARES}
    return max(SHARES, key=lambda share: direction(pot.recipe.metric) * values[share]), [
        {"share_of_start": share, "average": values[share]} for share in SHARES
    ]


def compare_with_runs(pot: Pot, runs: Runs, shares: Sequence[float]) -> dict[str, Any]:
    """The soup, each run, and the start where it has a part, with the metric's interval, and how much better the soup is.

    Of their mean and of the best run as well. That one is found on the very images: its metric is likely too high.
    """
    recipe, number = pot.recipe, len(runs.names)
    names, rows = [*runs.names, "start"][: len(pot.states)], Rows()
    ours, labels = pot.logits(pot.measure, shares, "soup")
    logits = [pot.logits(pot.measure, [float(i == j) for j in range(len(names))], name)[0] for i, name in enumerate(names)]
    values = [pot.value(one, labels) for one in logits]
    ours, *logits = (pot.judged(one) for one in (ours, *logits))
    for i, one in enumerate(logits):
        row: dict[str, Any] = {"run": names[i]} | ({"network": runs.used[i]} if i < number else {})
        row |= {"share": [*shares, 0.0][i], recipe.metric: values[i]}
        row["interval"], row["soup_minus_run"] = interval_of(recipe, one, labels), compare(recipe, ours, [one], labels)
        rows.append(row)
    best = best_row(rows[:number], recipe.metric)
    return {
        "interval": interval_of(recipe, ours, labels),
        "runs": rows,
        "mean_of_runs": sum(row[recipe.metric] for row in rows[:number]) / number,
        "soup_minus_mean": compare(recipe, ours, logits[:number], labels),
        "best_run": best["run"],
        "soup_minus_best": best["soup_minus_run"],
    }


def measured_on(runs: Runs, pot: Pot) -> str:
    """Which images the metrics are of, and which ones something was chosen on, in words."""
    size = len(pot.measure)
    if pot.choose is None:
        return f"{size} validation images; nothing was chosen"
    if runs.recipe.data.holdout:
        return f"{size} validation images; chosen on {len(pot.choose)} held-out training images"
    return f"{size} validation images; chosen on {len(pot.choose)} others, as the runs held out no training images"


def result_of(pot: Pot, shares: Sequence[float], name: str, begun: float) -> dict[str, Any]:
    """The soup in numbers, as a run's result has them."""
    recipe, (logits, labels) = pot.recipe, pot.logits(pot.measure, shares, "soup")
    metrics, last = compute_metrics(recipe, logits, labels, pot.units), recipe.epochs - 1
    groups = getattr(pot.measure.images, "groups", None)
    if subgroups := getattr(pot.measure.images, "subgroups", None):
        metrics["by_subgroup"] = subgroup_metrics(recipe, logits, labels, subgroups, groups, pot.units)
    seconds, images = time.monotonic() - begun, sum(len(one) for one, _ in pot.kept.values())
    return {
        "recipe": name,
        **metrics,
        **measure(recipe, logits, labels, groups, names=pot.whole.classes, units=pot.units),
        "epochs": recipe.epochs,
        "best_epoch": last,
        f"best_{recipe.metric}": metrics[recipe.metric],
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        "peak_memory_gib": round(peak_memory(pot.accelerator.device), 3),
        **environment(pot.accelerator),
        "use": "model",
        "use_reason": "a soup is one network",
    }


def write_run(folder: Path, first: Path, pot: Pot, shares: Sequence[float], result: dict[str, Any]) -> None:
    """Write a run's files; images that something was chosen on count as trained on.

    The recipe is that of the `first` run, without a holdout: the metrics are of its validation images.
    """
    recipe = replace(pot.recipe, data=replace(pot.recipe.data, holdout=0.0))
    train, measure, classes = pot.whole.train, pot.whole.val, pot.whole.classes
    rows = file_rows(train, measure, classes)
    if rows and pot.choose is not None:
        rows += [("train", *row[1:]) for row in file_rows(train, pot.choose.images, classes) if row[0] == "val"]
    record_files(folder / "images.csv", rows)
    images = {"training": fingerprint(train, classes), "validation": fingerprint(measure, classes)}
    file, groups = first / "recipe.py", first / "groups.txt"
    text = groups.read_text(encoding="utf-8").rstrip("\n") if groups.is_file() else ""
    name = run_name(first)
    start_run_dir(folder, file if file.is_file() else None, name, recipe, text, {"images": images, "classes": classes})
    logits, labels = pot.logits(pot.measure, shares, "soup")
    inputs, temperature = pot.measure.transform.preprocessing, result.get("calibration", {}).get("temperature", 1.0)
    save_model(folder / "model", pot.mean(shares).cpu(), inputs, classes, temperature, result.get("thresholds"), pot.units)
    write_file(folder / "predictions.safetensors", safetensors.torch.save({"logits": logits, "labels": labels}))
    row = {key: value for key, value in result.items() if key in ("loss", "val_images", *METRICS, "top5")}
    write_file(folder / "metrics.jsonl", json.dumps({"epoch": result["best_epoch"], "step": 0, **row}) + "\n")
    write_file(folder / "result.json", json.dumps(result, indent=1) + "\n")
    if pot.units:
        try_to(plot_numbers, folder, logits, labels, classes, run_title(folder), pot.units)
    elif recipe.loss != "multi_label":
        try_to(plot_confusion_matrix, folder, logits, labels, classes, run_title(folder))
    try_to(write_page, folder, pot.measure.images, describe_verdicts(recipe, None, result))


def soup_as_text(result: dict[str, Any]) -> str:
    """A table of the runs and of the soup, what was tried, and in words whether the soup is better."""
    made = result["soup"]
    metric, best = next(name for name in METRICS if name in made["runs"][0]), made["soup_minus_best"]
    table = [("run", f"{METRICS[metric]}, 95 % interval", "soup minus run", "")]
    table += [
        (shorter(row["run"]), value_of(row, metric), in_points(row["soup_minus_run"], metric), row["soup_minus_run"]["verdict"])
        for row in made["runs"]
    ]
    table.append(
        (
            "mean of the runs",
            write_value(metric, made["mean_of_runs"]),
            in_points(made["soup_minus_mean"], metric),
            made["soup_minus_mean"]["verdict"],
        )
    )
    table.append(("soup", value_of({metric: result[metric], **made}, metric), "", ""))
    lines = [align_columns(table, width=WIDTH), ""]
    if tried := [row for row in made["tried"] if "run" in row]:
        ends = [("added" if row["added"] else "left out", write_value(metric, row["average"])) for row in tried]
        words = [f"{shorter(row['run'])} {done} ({value})" for row, (done, value) in zip(tried, ends, strict=True)]
        lines.append(fold("greedy", ", ".join(words)))
    if made["share_of_start"] is not None:
        tried = [row for row in made["tried"] if "share_of_start" in row]
        words = [f"{row['share_of_start']:g} {write_value(metric, row['average'])}" for row in tried]
        lines.append(fold("start", f"has a share of {made['share_of_start']:g}{'; tried: ' * bool(words)}{', '.join(words)}"))
    if probes := [shorter(row["run"]) for row in made["runs"] if row.get("network") == "model-best"]:
        lines.append(fold("used", f"model-best of {', '.join(probes)}, as these runs say"))
    lines.append(fold("measured", f"on {made['measured_on']}"))
    lines.append(fold("verdict", f"{VERDICTS[best['verdict']]} {shorter(made['best_run'])}, the best run on these very images"))
    return "\n".join([*lines, "", f"finetune predict {shlex.quote(result['run'])} PHOTO"])


def shorter(name: str) -> str:
    """The end of a long name: of a run, the time that tells it from others."""
    return name if len(name) <= NAME else f"...{name[3 - NAME :]}"


def value_of(row: dict[str, Any], metric: str) -> str:
    """A metric and its interval."""
    ends = " to ".join(write_value(metric, end, 1, "") for end in row["interval"])
    return f"{write_value(metric, row[metric])} ({ends})"
