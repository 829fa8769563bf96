"""The images of a recipe's source: a named data set, a folder, a table or a function of the recipe."""

import csv
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.data.builtin import digits, elpv, from_function, from_names, generated, graded, numbered
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
from finetune.data.folders import class_difference, note_look_alikes, path_faults
from finetune.data.split import from_folder, from_lists, held_out, refuse_groups, refuse_split
from finetune.images.read import read_image
from finetune.images.remote import find_file, list_folder, open_text
from finetune.recipe import Data, Recipe
from finetune.recipe.load import describe_file
from finetune.recipe.metrics import NUMBER_LOSSES
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import as_number, nearest, note, readable
from finetune.utils.urls import beside, is_table, is_url, tidy


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
        return graded(from_function(source, recipe.loss, recipe.data), recipe)
    data = read_source(source, recipe)
    if recipe.of_numbers and source == "generated":
        data = numbered(data)
    assert isinstance(data.train, ImageList) and isinstance(data.val, ImageList)  # as of every source but a function
    train, val = (part.read_as(recipe.data) for part in (data.train, data.val))
    if recipe.data.on_bad_image == "skip":
        check_classes(train, data.classes, f"the training images of {source}")
        if data.drawn:
            val = drop_unreadable(val, data.classes, source)
        else:
            check_classes(val, data.classes, f"the validation images of {source}")
    return graded(ImageData(train, val, data.classes), recipe)


def read_source(source: str, recipe: Recipe) -> ImageData:
    """The images that a source names."""
    if source in NAMED:
        return NAMED[source]()
    remote = is_url(tidy(source)) and not is_table(source)
    if recipe.of_numbers and Path(source).is_dir() and has_shards(Path(source)):
        raise RecipeError(
            f"data: loss='{recipe.loss}' needs numbers: a CSV with a column label; the shards of {source} have classes"
        )
    if source.startswith("torchvision/"):
        return from_lists(*from_torchvision(source.removeprefix("torchvision/")), source, recipe.data)
    if source.startswith("hf/"):
        return from_lists(*from_hub(source.removeprefix("hf/")), source, recipe.data)
    if is_table(source):
        parts, classes = from_csv(source, recipe.loss)
    elif Path(source).is_dir() and has_shards(Path(source)):
        data = from_lists(*from_shards(Path(source)), source, recipe.data)
        note_same_files(data, source, partial(same_members, Path(source)))
        return data
    elif remote or Path(source).is_dir():
        parts, classes = from_folder(list_folder(source) if remote else Path(source))
        if recipe.of_numbers:
            parts, classes = from_names(parts, classes, source)
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
    return is_url(source) or source in DOWNLOADED or str(source).startswith("hf/") and not Path(str(source)[3:]).is_dir()


COLUMNS = {  # of a table, by any of these names; all but the first two are optional
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "target"),
    "split": ("split",),
    "subgroup": ("subgroup",),
    "group": ("group",),
}
NUMBERED = re.compile("(?:label|target)_(.+)", re.I)  # a column of numbers with a name of its own: label_age


class Labels(NamedTuple):
    """What the rows of a table say of their images."""

    values: list[tuple[Any, ...]]  # the names of classes, sorted, or the numbers
    said: list[str]  # in the table's words
    names: list[str]  # of the numbers; of classes none, as rows that are not used have no say
    faults: list[str]


def from_csv(file: str | Path, loss: str) -> tuple[list[ImageList], Sequence[str]]:
    """([training images, validation images], or all in one list, classes) of a table; paths are relative to the file.

    Where the `loss` is one of numbers, labels are floats [n, numbers], and in place of classes come the numbers' names.

    Raises:
        RecipeError: with all that is not in order, in one go.
    """
    of_numbers = loss in NUMBER_LOSSES
    whole, all_rows = read_columns(file, ("path", "numbers" if of_numbers else "label"))
    columns, rows = leave_out_idle(whole, all_rows)
    paths = [beside(file, cell) for cell in columns["path"]]
    found = read_numbers(columns, rows) if of_numbers else read_classes(columns, rows, loss == "multi_label")
    cells = [cell.strip().lower() for cell in columns["split"]]
    faults = [f"split '{cell}' is none of {', '.join(SPLITS)}" for cell in sorted(set(cells) - set(SPLITS))]
    splits = [SPLITS.get(cell, "") for cell in cells]
    faults += path_faults(columns["path"], paths, rows) + found.faults
    if alone := [row for row, cell in zip(rows, columns["group"], strict=False) if not cell.strip()]:
        faults.append(f"{len(alone)} rows have no group, first row {alone[0]}")
    first: dict[str, int] = {}  # row of each file, whatever links lead to it
    files = [str(path) if is_url(path) else os.path.realpath(path) for path in paths]
    earlier = [(at, i) for i, at in enumerate(map(first.setdefault, files, range(len(files)))) if at != i]
    if other := [pair for pair in earlier if found.values[pair[0]] != found.values[pair[1]]]:
        said = " and ".join(f"'{found.said[i]}' in row {rows[i]}" for i in other[0])
        cell, remedy = columns["path"][other[0][0]], "" if of_numbers else "; several belong in one cell"
        faults.append(f"{len(other)} rows give a file another label, such as {cell}: {said}{remedy}")
    parts = ["train", "val" if "val" in splits else "test"] if splits else []
    once = {(name, splits[i] if splits else ""): i for i, name in reversed([*enumerate(files)])}
    used = sorted(i for (_, split), i in once.items() if not parts or split in parts)
    seen = [{name for i in used if splits[i] == part for name in found.values[i]} for part in parts]
    few = loss == "multi_label" and parts and seen[1] < seen[0]  # then a note says so
    if parts and not of_numbers and seen[0] != seen[1] and not few:
        faults.append(f"the classes differ: {class_difference(seen[0], seen[1], ('in train', f'in {parts[1]}'))}")
    if faults:
        raise RecipeError("\n  ".join([f"data: {file} is not in order:", *faults]))

    if repeated := len(files) - len(once):
        note(f"left out of {file}: {repeated} rows that repeat a file and its label")
    if unused := len(all_rows) - len(rows) + len(once) - len(used):
        note(f"left out of {file}: {unused} rows of the split test, as there is one for validation")
    classes = found.names or sorted({name for i in used for name in found.values[i]})
    labels: Values
    if of_numbers:
        labels = np.array(found.values)
    elif loss == "multi_label":
        labels = np.array([[name in names for name in classes] for names in found.values], np.uint8)
    else:
        number = {name: i for i, name in enumerate(classes)}
        labels = [number.get(names[0], -1) for names in found.values]  # -1: in rows that are not used
    subgroups = [readable(cell.strip()) or "none" for cell in columns["subgroup"]]
    groups = [cell.strip() for cell in columns["group"]]
    images = ImageList(list(map(find_file, paths)), labels, read_image, subgroups or None, groups or None)
    if not parts:
        return [images.part(used)], classes
    return [images.part([i for i in used if splits[i] == part]) for part in parts], classes


def read_classes(columns: dict[str, list[str]], rows: Sequence[int], multi_label: bool) -> Labels:
    """The classes that each row names."""
    cells, names, faults = columns["label"], list(map(names_in, columns["label"])), []
    if not multi_label and (none := [row for row, found in zip(rows, names, strict=True) if not found]):
        faults.append(f"{len(none)} rows have no label, first row {none[0]}")
    if not multi_label and (several := [i for i, found in enumerate(names) if len(found) > 1]):
        first = f"first row {rows[several[0]]} ({cells[several[0]]!r}), as ; and | divide labels"
        remedy = "set loss='multi_label', or write another character in the name"
        faults.append(f"{len(several)} rows have several labels, {first}: {remedy}")
    return Labels([tuple(sorted(found)) for found in names], cells, [], faults)


def read_numbers(columns: dict[str, list[str]], rows: Sequence[int]) -> Labels:
    """The numbers that each row has: in the column label, or in one for each of several, label_NAME."""
    named = {kind.removeprefix("label_"): cells for kind, cells in columns.items() if kind.startswith("label_")}
    faults = []
    if named and columns["label"]:
        faults.append(
            f"there are numbers in the column label, and in {', '.join(f'label_{name}' for name in named)}: leave one"
        )
    named = named or {"label": columns["label"]}
    table = {name: [as_number(cell) for cell in cells] for name, cells in named.items()}
    for name, numbers in table.items():
        if wrong := [i for i, number in enumerate(numbers) if number is None]:
            column, cell = "label" if columns["label"] else f"label_{name}", named[name][wrong[0]].strip()
            remedy = "; several numbers an image: a column label_NAME for each" if re.search("[;|]", cell) else ""
            faults.append(f"{len(wrong)} rows have no number in {column}, first row {rows[wrong[0]]} ({cell!r}){remedy}")
    return Labels([*zip(*table.values(), strict=True)], said_in(columns), [*table], faults)


def said_in(columns: dict[str, list[str]]) -> list[str]:
    """What each row says of its label, in its own words."""
    several = [cells for kind, cells in columns.items() if kind.startswith("label_")]
    return columns["label"] or [" ".join(cells).strip() for cells in zip(*several, strict=True)]


def names_in(cell: str) -> list[str]:
    """The names of classes in a cell."""
    return [readable(name.strip()) for name in re.split("[;|]", cell) if name.strip()]


def leave_out_idle(columns: dict[str, list[str]], rows: list[int]) -> tuple[dict[str, list[str]], list[int]]:
    """A table as `read_columns` has it without the rows of the split test that have no label, where others validate."""
    splits = [SPLITS.get(cell.strip().lower()) for cell in columns["split"]]
    kept = [i for i, cell in enumerate(said_in(columns)) if "val" not in splits or splits[i] != "test" or names_in(cell)]
    return {kind: [cells[i] for i in kept if cells] for kind, cells in columns.items()}, [rows[i] for i in kept]


def read_columns(file: str | Path, needed: Sequence[str] = ("path", "label")) -> tuple[dict[str, list[str]], list[int]]:
    """(the cells of each of COLUMNS, an empty list for one that is not there, the number of each row).

    Columns called label_NAME or target_NAME come as "label_NAME"; where "numbers" are needed, one of these or a label.
    """
    try:
        with open_text(file) as lines:
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
    named = {f"label_{match[1]}": at for at, cell in enumerate(header) if (match := NUMBERED.fullmatch(readable(cell.strip())))}
    header = [cell.strip().lower() for cell in header]
    for kind, accepted in COLUMNS.items():
        at = next((header.index(name) for name in accepted if name in header), None)
        columns[kind] = [] if at is None else [row[at] if at < len(row) else "" for _, row in found]
        if at is None and kind in needed:
            faults.append(f"no column {' or '.join(accepted)}; its columns: {', '.join(header) or 'none'}")
    columns |= {name: [row[at] if at < len(row) else "" for _, row in found] for name, at in named.items()}
    if "numbers" in needed and not columns["label"] and not named:
        faults.append(f"no column label or target, nor any label_NAME; its columns: {', '.join(header) or 'none'}")
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
