"""Folders of images and CSV tables."""

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from finetune.data.dataset import ImageData, ImageList, Values, from_lists
from finetune.utils.errors import RecipeError
from finetune.utils.text import progress, readable

COLUMNS = {  # of a table, by any of these names; the last two are optional
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "target"),
    "split": ("split",),
    "subgroup": ("subgroup",),
}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def from_csv(file: Path, multi_label: bool) -> tuple[list[ImageList], Sequence[str]]:
    """([training images, validation images], or all in one list, classes) of a table; paths are relative to the file."""
    columns, faults = read_columns(file)
    paths = [file.parent / cell for cell in columns["path"]]
    if missing := [str(path) for path in paths if not path.is_file()]:
        more = ", ..." if len(missing) > 5 else ""
        faults.append(f"{len(missing)} of {len(paths)} files are missing: {', '.join(missing[:5])}{more}")
    names = [[name.strip() for name in re.split("[;|]", cell) if name.strip()] for cell in columns["label"]]
    if not multi_label and (wrong := [row for row, found in enumerate(names, 2) if len(found) != 1]):
        faults.append(f"{len(wrong)} rows have no label or several, first row {wrong[0]}: that needs loss='multi_label'")
    cells = [cell.strip().lower() for cell in columns["split"]]
    faults += [f"split '{cell}' is none of {', '.join(SPLITS)}" for cell in sorted(set(cells) - set(SPLITS))]
    splits = [SPLITS.get(cell) for cell in cells]
    parts = ["train", "val" if "val" in splits else "test"] if splits else []
    seen = [{name for split, found in zip(splits, names, strict=False) if split == part for name in found} for part in parts]
    if parts and seen[0] != seen[1]:
        faults.append(f"the classes differ: {class_difference(seen[0], seen[1], parts[1])}")
    if faults:
        raise RecipeError("\n  ".join([f"data: {file} is not in order:", *faults]))

    classes = sorted({name for found in names for name in found})
    labels: Values
    if multi_label:
        labels = np.array([[name in found for name in classes] for found in names], np.uint8)
    else:
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[found[0]] for found in names]
    subgroups = [cell.strip() or "none" for cell in columns["subgroup"]]
    images = ImageList(paths, labels, read_image, subgroups or None)
    if not parts:
        return [images], classes
    return [images.part([i for i, split in enumerate(splits) if split == part]) for part in parts], classes


def read_columns(file: Path) -> tuple[dict[str, list[str]], list[str]]:
    """(the cells of each of COLUMNS, an empty list for one that is not there, a sentence for each that is missing)."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"data: can't read {file}: {error}") from None
    header, columns, faults = [cell.strip().lower() for cell in header], {}, []
    for kind, accepted in COLUMNS.items():
        at = next((header.index(name) for name in accepted if name in header), None)
        columns[kind] = [] if at is None else [row[at] if at < len(row) else "" for row in rows]
        if at is None and kind in ("path", "label"):
            faults.append(f"no column {' or '.join(accepted)}; its columns: {', '.join(header) or 'none'}")
    return columns, faults


def read_image(item: Any, load: Callable[[Any], Image.Image] = Image.open, where: Callable[[Any], str] = str) -> Image.Image:
    """An image file, or what `load` makes of an item, as RGB; raises RecipeError with its path if it can't be read."""
    try:
        with load(item) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError for a broken PNG
        text = f"can't read the image {where(item)}: {str(error).partition(' <')[0]}"
        raise RecipeError(text, one_process=True) from error


def from_folder(root: Path, seed: int, check: bool = True) -> ImageData:
    """train/ and val/ (or test/) with a folder for each class; of class folders alone, a fifth is for validation."""
    if not (root / "train").is_dir():
        images, classes = class_folders(root, check)
        return from_lists([images], classes, root, seed)
    val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if val is None:
        raise RecipeError(f"data: {root} has train/ but neither val/ nor test/ beside it")
    (train, classes), (val_images, val_classes) = class_folders(root / "train", check), class_folders(val, check)
    if classes != val_classes:
        difference = class_difference(classes, val_classes, val.name)
        raise RecipeError(f"data: the classes of {root / 'train'} and {val} differ: {difference}")
    return ImageData(train, val_images, classes)


def class_difference(train: Iterable[str], val: Iterable[str], val_name: str) -> str:
    """Which classes are in one of the two parts alone, in words."""
    only_train, only_val = (", ".join(sorted({*a} - {*b})) or "none" for a, b in ((train, val), (val, train)))
    return f"only in train: {only_train}; only in {val_name}: {only_val}"


def class_folders(root: Path, check: bool) -> tuple[ImageList, tuple[str, ...]]:
    """(images, classes) of a folder of class folders, as torchvision reads it; `check` opens every image."""
    try:
        folder = ImageFolder(root, allow_empty=True)
    except FileNotFoundError:
        raise RecipeError(
            f"data: {root} has no class folders. Wanted: train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"
        ) from None
    empty = [str(root / name) for label, name in enumerate(folder.classes) if label not in set(folder.targets)]
    if empty:
        found = f"class folder{'s' * (len(empty) > 1)} {', '.join(empty)}"
        raise RecipeError(f"data: no images in {found} (looked for {', '.join(IMG_EXTENSIONS)})")
    if len(folder.classes) < 2:
        raise RecipeError(f"data: {root} has one class, '{folder.classes[0]}'; there must be at least 2")
    checked = folder.samples if check else []
    for path, _ in progress(checked, len(checked), f"checking the images of {root.name}", os.environ.get("RANK", "0") == "0"):
        try:
            Image.open(path).close()  # reads the header only
        except OSError as error:
            raise RecipeError(f"can't read the image {path}: {str(error).partition(' <')[0]}") from error
    return ImageList([path for path, _ in folder.samples], folder.targets, read_image), tuple(map(readable, folder.classes))
