"""report.html: what a run reached and what it got wrong, on one page that needs no network."""

import base64
import hashlib
import os
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import safetensors.torch
import torch

from finetune.data.dataset import Images
from finetune.metrics.intervals import wilson
from finetune.page import gallery
from finetune.page.charts import run_charts
from finetune.page.gallery import Group, Pictures
from finetune.page.numbers import describe_numbers
from finetune.page.tables import describe_classes, percent, value_text
from finetune.recipe import Recipe
from finetune.recipe.metrics import METRICS, REPORTED_METRICS
from finetune.recipe.serialize import from_dict, to_dict
from finetune.training.run_dir import run_name, started
from finetune.utils.files import read_json, write_file
from finetune.utils.text import duration, readable

PAGE = "report.html"
FILES = (  # of a run's folder, to link to
    *("recipe.py", "recipe.json", "result.json", "metrics.jsonl", "groups.txt", "images.csv", "predictions.safetensors"),
    *("curves.png", "confusion.png", "mistakes.png", "predictions.png", "augmented.png", "numbers.png"),
)
LABELS = {"baseline": "Recorded runs", "probe": "Linear probe", "soup": "Soup", "measured": "Measured", "use": "Network to use"}
Said = Sequence[tuple[str, str]]  # what is said of a result, as (label, sentence)


class Figure(NamedTuple):
    """An image in a gallery, and what is written below it."""

    picture: str
    heat: str
    name: str
    labelled: str
    predicted: str
    right: bool


def write_page(run: Path, images: Images | None, said: Said, output: Path | None = None, lost: str = "") -> Path:
    """Write a finished run's report.html, or `output`, from the files in its folder.

    `images` are its validation images, in the order of its predictions, or None, and then `lost` says why. `said` is what the
    terminal says of the result. The page has small copies of some of the images, about 3 MB of them at the most.
    """
    recipe, result = from_dict(read_json(run / "recipe.json")), read_json(run / "result.json")
    kept = safetensors.torch.load_file(run / "predictions.safetensors")
    temperature = result.get("calibration", {}).get("temperature", 1.0)  # with which `predict` gives its probabilities
    logits, labels = kept["logits"] / temperature, kept["labels"]
    if recipe.loss == "multi_label":
        labels = labels.where(labels >= 0, torch.nan)  # an earlier version had -100 for what can't be read
    names = started(run).get("classes") or read_json(run / "model" / "config.json")["label_names"]
    classes, pictures = [readable(str(name)) for name in names], Pictures(images, recipe.data.background)
    page = output or run / PAGE
    if recipe.of_numbers:
        found = describe_numbers(run, result, logits, labels, classes, pictures)
    else:
        found = describe_predictions(run, recipe, result, (logits, labels), classes, pictures)
    content = render(
        **describe_run(run, page, recipe, result),
        **found,
        charts=run_charts(run, recipe.metric),
        said=[(LABELS.get(label, label), readable(text)) for label, text in [*said, *describe_calibration(result)] if text],
        lost=lost_images(images, pictures, lost),
        copies=pictures.made,
    )
    write_file(page, content)
    return page


def describe_predictions(
    run: Path,
    recipe: Recipe,
    result: dict[str, Any],
    predictions: tuple[torch.Tensor, torch.Tensor],
    classes: Sequence[str],
    pictures: Pictures,
) -> dict[str, Any]:
    """What the page shows of classes: mistakes, confusions, tables; `predictions` are logits and labels."""
    logits, labels = predictions
    judged = gallery.judge(recipe, logits, labels)
    worst, unsure = gallery.worst_mistakes(judged), gallery.most_unsure(judged)
    figures = {i: as_figure(recipe, i, logits, labels, pictures, classes) for i in dict.fromkeys([*worst, *unsure])}
    heats = gallery.heat_pictures(run, worst, judged.guesses, pictures) if labels.ndim == 1 else {}
    groups = gallery.find_groups(judged, logits, labels)
    data = group_data(groups, pictures, classes)
    return {
        "worst": [figures[i]._replace(heat=heats.get(i, "")) for i in worst],
        "unsure": [figures[i] for i in unsure],
        **describe_classes(recipe, result, logits, labels, groups, classes, getattr(pictures.images, "groups", None)),
        "data": data,
        "wrong": int((judged.seen & ~judged.right).sum()),
        "unreadable": int((~judged.seen).sum()),
        "numbers": None,
    }


def render(**context: Any) -> str:
    """page.html with its style and its script inside, and a policy by which a browser runs no other and loads nothing."""
    parts = {name: own_file(f"page.{end}") for name, end in (("style", "css"), ("script", "js"))}
    hashes = {f"{name}_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in parts.items()}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"percent": percent, "count": count}
    return environment.from_string(own_file("page.html")).render(**context, **parts, **hashes)


@cache
def own_file(name: str) -> str:
    """A file that lies beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def count(number: int) -> str:
    return f"{number:,}"


def as_figure(
    recipe: Recipe, index: int, logits: torch.Tensor, labels: torch.Tensor, pictures: Pictures, classes: Sequence[str]
) -> Figure:
    """An image of a gallery, with what it is labelled and predicted as."""
    several = labels.ndim == 2
    probs = gallery.probabilities(recipe, logits[index].double())
    right = ((logits[index] > 0) == labels[index].bool()).all() if several else logits[index].argmax() == labels[index]
    return Figure(
        pictures.picture(index, gallery.LARGE),
        "",
        pictures.name(index),
        gallery.name_classes(labels[index], classes),
        gallery.name_predicted(probs, several, classes, lambda share: percent(share, 1)),
        bool(right),
    )


def group_data(groups: Sequence[Group], pictures: Pictures, classes: Sequence[str]) -> dict[str, Any]:
    """What page.js reads: the classes, the groups and, once each, their images with a picture where there is room for it."""
    order = gallery.thumbnail_order(groups)
    slots = {index: slot for slot, index in enumerate(order)}
    return {
        "classes": classes,
        "groups": [
            [group.label, group.guess, group.number, [[slots[i], round(prob, 4)] for i, prob in group.images]]
            for group in groups
        ],
        "images": [[pictures.name(i), pictures.picture(i, gallery.SMALL)] for i in order],
    }


def lost_images(images: Images | None, pictures: Pictures, lost: str) -> str:
    """A sentence about images that the page lacks."""
    if lost or images is None:
        return f"Without images: {lost or 'they are not known'}."
    if pictures.unreadable and not pictures.made:
        return "Without images: none of them can be read. Where they lie now: finetune report RUN --data DIR."
    unreadable = len(pictures.unreadable)
    return f"Images that can't be read, and have no picture: {count(unreadable)}." if unreadable else ""


def describe_run(run: Path, page: Path, recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    """What the page says above its galleries, and how the run was made."""
    begun, intervals, metric = started(run), dict(result.get("intervals", {})), recipe.metric
    if metric == "top1":
        intervals.setdefault(metric, wilson(result[metric], result["val_images"]))
    words = {metric: METRICS[metric], **REPORTED_METRICS, **METRICS}
    known = {name: word for name, word in words.items() if name in result}
    shown = [(word, *value_text(name, result[name], intervals.get(name))) for name, word in known.items()]
    source, name = str(to_dict(recipe.data.source)), run_name(run)
    place = Path(source).name or source
    epochs = f"{result['epochs']} of {recipe.epochs} epochs, stopped early" if result["epochs"] < recipe.epochs else ""
    about = [str(to_dict(recipe.backbone)), epochs or f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"]
    about += [f"images of {recipe.data.sizes}", str(begun.get("started", ""))]
    (_, value, interval), *rest = shown
    others = [*rest, ("loss", f"{result['loss']:.4f}", "")]
    recipe_file = run / "recipe.py"
    return {
        "title": readable(name if place in ("", name) else f"{name} on {place}"),
        "about": readable(", ".join(filter(None, about))),
        "smoke": bool(result.get("smoke")),
        "headline": {"value": value, "word": METRICS[metric], "interval": interval},
        "val_images": result["val_images"],
        "others": others,
        "has_probe": f"linear_probe_{metric}" in result,
        "command": command_text(begun.get("command", [])),
        "environment": describe_environment(result),
        "files": [(name, address(run / name, page)) for name in FILES if (run / name).is_file()],
        "recipe_text": recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else "",
    }


def describe_calibration(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How far probabilities are from how often they are right, where a result has it."""
    if not (found := result.get("calibration")):
        return []
    before, after = (percent(share, 1) for share in found["ece"])
    scaled = f"by {after} with logits divided by {found['temperature']:.2f}, as they are here"
    if why_not := found.get("note"):
        scaled = f"no temperature mends that: {why_not}"
    return [("Calibration", f"probabilities are off by {before} on average; {scaled}")]


def command_text(words: Sequence[str]) -> str:
    """The command of a run as a person typed it, but for what launched it."""
    known = {"__main__.py": ["python", "-m", "finetune"], "run.py": ["accelerate", "launch", "finetune/run.py"]}
    return readable(shlex.join([*known.get(words[0], words[:1]), *words[1:]])) if words else ""


def describe_environment(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Hardware, versions and seed of a result."""
    rows, hardware = [], result.get("hardware", {})
    if hardware:
        rows.append(("Hardware", f"{hardware.get('processes', 1)} x {hardware.get('name') or hardware.get('device')}"))
    rows.append(("Cost", f"{duration(result['seconds'])}, peak memory {result['peak_memory_gib']:.1f} GiB"))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())))
    rows.append(("Seed", str(result.get("seed", ""))))
    return [(label, readable(text)) for label, text in rows if text]


def address(file: Path, page: Path) -> str:
    """A link from the page to a file."""
    return quote(Path(os.path.relpath(file, page.parent)).as_posix())
