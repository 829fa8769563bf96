"""The images of a recipe's source: a named data set, a folder, a table or a function of the recipe."""

import csv
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.builtin import digits, elpv, generated
from finetune.data.dataset import (
    SPLITS,
    ImageData,
    ImageList,
    Values,
    check_classes,
    check_files,
    drop_unreadable,
    note_same_files,
)
from finetune.data.external import TORCHVISION, from_hub, from_shards, from_torchvision, has_shards, same_members
from finetune.data.folders import class_difference
from finetune.data.split import from_folder, from_lists, held_out, refuse_groups, refuse_split
from finetune.images.read import read_image
from finetune.recipe import Data, Recipe
from finetune.recipe.load import describe_file
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import as_seen, look_alikes, nearest, note, readable, spell_out


def load_data(recipe: Recipe) -> ImageData:
    """The recipe's images, downloaded if need be; with a holdout, training images alone."""
    data, source = whole_data(recipe), recipe.data.source
    note_look_alikes(data.classes, str(to_dict(source)))
    return held_out(data, recipe.data, str(to_dict(source))) if recipe.data.holdout else data


def whole_data(recipe: Recipe) -> ImageData:
    """The training and validation images of the recipe's source."""
    source = recipe.data.source
    if callable(source) or source in NAMED:
        for refuse in (refuse_split, refuse_groups):
            refuse(recipe.data, str(to_dict(source)))
    if callable(source):
        return from_function(source, recipe.loss == "multi_label", recipe.data)
    data = read_source(source, recipe)
    assert isinstance(data.train, ImageList) and isinstance(data.val, ImageList)  # as of every source but a function
    train, val = (part.read_as(recipe.data) for part in (data.train, data.val))
    if recipe.data.on_bad_image == "skip":
        check_classes(train, data.classes, f"the training images of {source}")
        if data.drawn:
            val = drop_unreadable(val, data.classes, source)
        else:
            check_classes(val, data.classes, f"the validation images of {source}")
    return ImageData(train, val, data.classes)


def note_look_alikes(classes: Sequence[str], where: str) -> None:
    """Say which classes have names that differ only in what can't be seen."""
    if pairs := look_alikes(map(str, classes)):
        shown = ", ".join(" and ".join(spell_out(pair)) for pair in pairs[:5]) + ", ..." * (len(pairs) > 5)
        note(f"data: classes of {where} look alike: {shown}; they are told apart: give them one name if they are the same")


def read_source(source: str, recipe: Recipe) -> ImageData:
    """The images that a source names."""
    if source in NAMED:
        return NAMED[source]()
    if source.startswith("torchvision/"):
        return from_lists(*from_torchvision(source.removeprefix("torchvision/")), source, recipe.data)
    if source.startswith("hf/"):
        return from_lists(*from_hub(source.removeprefix("hf/")), source, recipe.data)
    if source.lower().endswith(".csv"):
        parts, classes = from_csv(Path(source), recipe.loss == "multi_label")
    elif Path(source).is_dir() and has_shards(Path(source)):
        data = from_lists(*from_shards(Path(source)), source, recipe.data)
        note_same_files(data, source, partial(same_members, Path(source)))
        return data
    elif Path(source).is_dir():
        parts, classes = from_folder(Path(source))
    elif Path(source).exists():
        raise RecipeError(f"data: {describe_file(source)}")
    else:
        raise RecipeError(
            f"data: no data set or folder '{source}'.{nearest(source, [*NAMED, *DOWNLOADED])} Yours: --data DIR. Named sets: "
            f"{', '.join(NAMED)}, torchvision/NAME, hf/NAME"
        )
    check_files(parts, recipe.data.on_bad_image, recipe.data.channels)
    data = from_lists(parts, classes, source, recipe.data)
    note_same_files(data, source)
    return data


def cifar(name: str) -> ImageData:
    """CIFAR by its short name, as torchvision reads it."""
    return from_lists(*from_torchvision(name), f"torchvision/{name}", Data(name, image_size=32, batch_size=1))


def known_size(recipe: Recipe) -> tuple[int, int] | None:
    """Training images and classes of a named set, as far as they are known without having it."""
    known = {"digits": (1438, 10), "elpv": (1969, 2), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}
    known |= {f"torchvision/{name}": row[2:4] for name, row in TORCHVISION.items()}
    return None if callable(recipe.data.source) else known.get(recipe.data.source)


def data_and_size(recipe: Recipe) -> tuple[ImageData | None, tuple[int, int]]:
    """(images, (training images, classes)); images are None for a named set, whose size is known without having it."""
    drawn = recipe.data.holdout or recipe.data.val_share or recipe.data.folds
    if (known := known_size(recipe)) and not drawn:
        return None, known
    data = load_data(recipe)
    return data, (len(data.train), len(data.classes))


NAMED: dict[str, Callable[[], ImageData]] = {
    "digits": digits,
    "elpv": elpv,
    "cifar10": partial(cifar, "CIFAR10"),
    "cifar100": partial(cifar, "CIFAR100"),
    "generated": generated,
}
DOWNLOADED = ("cifar10", "cifar100", *(f"torchvision/{name}" for name in TORCHVISION))  # the others come with packages


def is_downloaded(source: str | Callable[[], Any]) -> bool:
    """Whether images may come over a network."""
    return source in DOWNLOADED or (isinstance(source, str) and source.startswith("hf/") and not Path(source[3:]).is_dir())


def from_function(source: Callable[[], Any], multi_label: bool, data: Data) -> ImageData:
    """The images that a function of the recipe file returns, checked."""
    try:
        train, val = source()
        classes, sizes = tuple(map(str, train.classes)), (len(train), len(val))
        image, label = train[0]
        read_image(image, lambda image: image, lambda _: "0", data.background, channels=data.channels)
        np.asarray(label, dtype=float)
        if np.shape(label) not in (((), (len(classes),)) if multi_label else ((),)):
            raise ValueError(
                f"a label has the shape {np.shape(label)}"
                + (f", not that of {len(classes)} classes" if multi_label else "; several labels an image: loss='multi_label'")
            )
    except (TypeError, ValueError, AttributeError, IndexError, RecipeError) as error:
        raise RecipeError(
            f"data: {to_dict(source)} must return (train, validation), two data sets of (PIL "
            f"image, label) with a length, the first with a list `classes`: {error}"
        ) from error
    if not all(sizes) or len(classes) < 2:
        raise RecipeError(
            f"data: {to_dict(source)} gave {sizes[0]} training and {sizes[1]} validation images "
            f"of {len(classes)} classes; there must be some of each, and 2 classes"
        )
    return ImageData(train, val, classes)


COLUMNS = {  # of a table, by any of these names; all but the first two are optional
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "target"),
    "split": ("split",),
    "subgroup": ("subgroup",),
    "group": ("group",),
}


def from_csv(file: Path, multi_label: bool) -> tuple[list[ImageList], Sequence[str]]:
    """([training images, validation images], or all in one list, classes) of a table; paths are relative to the file.

    Raises:
        RecipeError: with all that is not in order, in one go.
    """
    whole, all_rows = read_columns(file)
    columns, rows = leave_out_idle(whole, all_rows)
    paths = [file.parent / cell.strip() for cell in columns["path"]]
    names = list(map(names_in, columns["label"]))
    cells = [cell.strip().lower() for cell in columns["split"]]
    faults = [f"split '{cell}' is none of {', '.join(SPLITS)}" for cell in sorted(set(cells) - set(SPLITS))]
    splits = [SPLITS.get(cell, "") for cell in cells]
    faults += find_faults(columns, paths, names, rows, multi_label)
    if alone := [row for row, cell in zip(rows, columns["group"], strict=False) if not cell.strip()]:
        faults.append(f"{len(alone)} rows have no group, first row {alone[0]}")
    first: dict[str, int] = {}  # row of each file, whatever links lead to it
    files = [os.path.realpath(path) for path in paths]
    earlier = [(at, i) for i, at in enumerate(map(first.setdefault, files, range(len(files)))) if at != i]
    if other := [pair for pair in earlier if sorted(names[pair[0]]) != sorted(names[pair[1]])]:
        said = " and ".join(f"'{columns['label'][i]}' in row {rows[i]}" for i in other[0])
        cell = columns["path"][other[0][0]]
        faults.append(f"{len(other)} rows give a file another label, such as {cell}: {said}; several belong in one cell")
    parts = ["train", "val" if "val" in splits else "test"] if splits else []
    once = {(name, splits[i] if splits else ""): i for i, name in reversed([*enumerate(files)])}
    used = sorted(i for (_, split), i in once.items() if not parts or split in parts)
    seen = [{name for i in used if splits[i] == part for name in names[i]} for part in parts]
    if parts and seen[0] != seen[1] and not (multi_label and seen[1] < seen[0]):  # then a note says so
        faults.append(f"the classes differ: {class_difference(seen[0], seen[1], ('in train', f'in {parts[1]}'))}")
    if faults:
        raise RecipeError("\n  ".join([f"data: {file} is not in order:", *faults]))

    if repeated := len(files) - len(once):
        note(f"left out of {file}: {repeated} rows that repeat a file and its label")
    if unused := len(all_rows) - len(rows) + len(once) - len(used):
        note(f"left out of {file}: {unused} rows of the split test, as there is one for validation")
    classes = sorted({name for i in used for name in names[i]})
    labels: Values
    if multi_label:
        labels = np.array([[name in found for name in classes] for found in names], np.uint8)
    else:
        number = {name: i for i, name in enumerate(classes)}
        labels = [number.get(found[0], -1) for found in names]  # -1: in rows that are not used
    subgroups = [readable(cell.strip()) or "none" for cell in columns["subgroup"]]
    groups = [cell.strip() for cell in columns["group"]]
    images = ImageList(paths, labels, read_image, subgroups or None, groups or None)
    if not parts:
        return [images.part(used)], classes
    return [images.part([i for i in used if splits[i] == part]) for part in parts], classes


def names_in(cell: str) -> list[str]:
    """The names of classes in a cell."""
    return [readable(name.strip()) for name in re.split("[;|]", cell) if name.strip()]


def leave_out_idle(columns: dict[str, list[str]], rows: list[int]) -> tuple[dict[str, list[str]], list[int]]:
    """A table as `read_columns` has it without the rows of the split test that have no label, where others validate."""
    splits = [SPLITS.get(cell.strip().lower()) for cell in columns["split"]]
    kept = [i for i, cell in enumerate(columns["label"]) if "val" not in splits or splits[i] != "test" or names_in(cell)]
    return {kind: [cells[i] for i in kept if cells] for kind, cells in columns.items()}, [rows[i] for i in kept]


def find_faults(
    columns: dict[str, list[str]], paths: Sequence[Path], names: Sequence[Sequence[str]], rows: Sequence[int], multi_label: bool
) -> list[str]:
    """A sentence for each thing that is wrong with a table's paths or labels."""
    faults, cells = [], columns["path"]
    if urls := [row for row, cell in zip(rows, cells, strict=True) if re.match(r"\s*[a-z0-9]+://", cell, re.I)]:
        faults.append(f"{len(urls)} rows have URLs, first row {urls[0]}: nothing is fetched, download the images first")
    elif missing := [(path, cell) for path, cell in zip(paths, cells, strict=True) if not path.is_file()]:
        shown = ", ".join(str(path) for path, _ in missing[:5]) + ", ..." * (len(missing) > 5)
        why = next(filter(None, (why_missing(*one) for one in missing[:5])), "")
        faults.append(f"{len(missing)} of {len(paths)} files are missing: {shown}{why and f'; {why}'}")
    if not multi_label and (none := [row for row, found in zip(rows, names, strict=True) if not found]):
        faults.append(f"{len(none)} rows have no label, first row {none[0]}")
    if not multi_label and (several := [i for i, found in enumerate(names) if len(found) > 1]):
        first = f"first row {rows[several[0]]} ({columns['label'][several[0]]!r}), as ; and | divide labels"
        remedy = "set loss='multi_label', or write another character in the name"
        faults.append(f"{len(several)} rows have several labels, {first}: {remedy}")
    return faults


def why_missing(path: Path, cell: str) -> str:
    """Why a file is probably not there, where its name in the table, or what lies in its folder, tells."""
    if "\\" in cell and os.sep == "/":
        return "write / for \\"
    if cell.strip().startswith("~"):
        return "write the home folder in place of ~"
    if path.is_dir():
        return f"{path} is a folder"
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    with suppress(OSError, ValueError):  # a folder that can't be listed, a drive that is not there
        name = path.relative_to(folder).parts[0]
        for other in sorted(os.listdir(folder)):
            if name != other and as_seen(name).casefold() == as_seen(other).casefold():
                what = "what can't be seen" if as_seen(name) == as_seen(other) else "upper and lower case"
                return "{} has {}, not {}: they differ in {}".format(folder, *spell_out((other, name)), what)
    return ""


def read_columns(file: Path, needed: Sequence[str] = ("path", "label")) -> tuple[dict[str, list[str]], list[int]]:
    """(the cells of each of COLUMNS, an empty list for one that is not there, the number of each row)."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            told = re.fullmatch('"?sep=(.)"?[\r\n]*', lines.readline(), re.I)  # as Excel writes it
            lines.seek(0)
            table = csv.reader(lines, delimiter=told[1] if told else ",", skipinitialspace=True)
            filled = [(number, row) for number, row in enumerate(table, 1) if any(cell.strip() for cell in row)]
        if any("\0" in cell for _, row in filled for cell in row):
            raise ValueError("there are NUL bytes in it")
    except (OSError, ValueError, csv.Error) as error:
        raise RecipeError(f"data: can't read {file}: {error}; wanted: a table in UTF-8, its cells divided by commas") from None
    (_, header), *found = filled[1 if told else 0 :] or [(1, [])]
    columns: dict[str, list[str]] = {}
    faults = []
    header = [cell.strip().lower() for cell in header]
    for kind, accepted in COLUMNS.items():
        at = next((header.index(name) for name in accepted if name in header), None)
        columns[kind] = [] if at is None else [row[at] if at < len(row) else "" for _, row in found]
        if at is None and kind in needed:
            faults.append(f"no column {' or '.join(accepted)}; its columns: {', '.join(header) or 'none'}")
    if header and not found:
        faults.append("there are no rows below its header")
    if longer := [(number, row) for number, row in found if any(cell.strip() for cell in row[len(header) :])]:
        first = f"first row {longer[0][0]} ({', '.join(longer[0][1])})"
        faults.append(f"{len(longer)} rows have more cells than the header, {first}: put a cell with a comma in quotes")
    if divider := next((mark for mark in (";", "\t") if len(header) == 1 and mark in header[0]), None):
        faults = [f"its cells are divided by {'tabs' if divider == chr(9) else divider}, not by commas: {header[0]}"]
    if faults:
        raise RecipeError("\n  ".join([f"data: {file} is not in order:", *faults]))
    return columns, [number for number, _ in found]
