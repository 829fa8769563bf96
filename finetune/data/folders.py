"""Folders of images and CSV tables."""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from finetune.data.dataset import ImageData, ImageList, from_lists
from finetune.utils.errors import RecipeError

COLUMNS = {"path": ("path", "file", "filename", "image"), "label": ("label", "class", "target"), "split": ("split",)}


SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def from_csv(file: Path, multi_label: bool) -> tuple[list[ImageList], Sequence[str]]:
    """A table with the columns path (relative to the file), label and, if it likes, split; see COLUMNS and SPLITS."""
    columns, faults = read_columns(file)
    paths = [file.parent / cell for cell in columns["path"]]
    if absent := [str(path) for path in paths if not path.is_file()]:
        faults.append(f"{len(absent)} of {len(paths)} files are missing: {', '.join(absent[:5])}{', ...' * (len(absent) > 5)}")
    names = [[name.strip() for name in re.split("[;|]", cell) if name.strip()] for cell in columns["label"]]
    wrong = [row for row, found in enumerate(names, 2) if len(found) != 1 and not multi_label]
    if wrong:
        faults.append(f"{len(wrong)} rows have no label or several, first row {wrong[0]}: that needs loss='multi_label'")
    texts = [cell.strip().lower() for cell in columns["split"]]
    faults += [f"split '{text}' is none of {', '.join(SPLITS)}" for text in sorted(set(texts) - set(SPLITS))]
    splits = [SPLITS.get(text) for text in texts]
    wanted = ["train", "val" if "val" in splits else "test"] if splits else []
    seen = [{name for at, found in zip(splits, names, strict=False) if at == split for name in found} for split in wanted]
    if seen and seen[0] != seen[1]:
        only = [", ".join(sorted(a - b)) or "none" for a, b in (seen, seen[::-1])]
        faults.append(f"the classes differ: only in {wanted[0]}: {only[0]}; only in {wanted[1]}: {only[1]}")
    if faults:
        raise RecipeError("\n  ".join([f"data: {file} is not in order:", *faults]))
    classes = sorted({name for found in names for name in found})
    places = {name: place for place, name in enumerate(classes)}
    labels = (
        [places[found[0]] for found in names]
        if not multi_label
        else np.array([[name in found for name in classes] for found in names], np.uint8)
    )
    chosen = [[i for i, at in enumerate(splits) if at == split] for split in wanted] or [list(range(len(paths)))]
    images = ImageList(paths, labels, read_image)
    return [images.part(indices) for indices in chosen], classes


def read_columns(file: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The cells of each of COLUMNS, none of one that is not there, and what is wrong with that."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"data: can't read {file}: {error}") from None
    header, columns, faults = [cell.strip().lower() for cell in header], {}, []
    for kind, accepted in COLUMNS.items():
        there = [header.index(name) for name in accepted if name in header]
        columns[kind] = [row[there[0]] if there[0] < len(row) else "" for row in rows] if there else []
        if not there and kind != "split":
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
    """train/ and val/ (or test/) with a folder for each class, or the class folders themselves: a fifth then validates.

    Raises:
        RecipeError: for a class without images, classes that differ between the splits, or a file that is no image.
    """
    if (root / "train").is_dir():
        val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        if val is None:
            raise RecipeError(f"data: {root} has train/ but neither val/ nor test/ beside it")
        (train, classes), (scored, theirs) = class_folders(root / "train", check), class_folders(val, check)
        if classes != theirs:
            only = [sorted(set(a) - set(b)) for a, b in ((classes, theirs), (theirs, classes))]
            raise RecipeError(
                f"data: the classes of {root / 'train'} and {val} differ: only in train: "
                f"{', '.join(only[0]) or 'none'}; only in {val.name}: {', '.join(only[1]) or 'none'}"
            )
        return ImageData(train, scored, classes)
    images, classes = class_folders(root, check)
    return from_lists([images], classes, root, seed)


def class_folders(root: Path, check: bool) -> tuple[ImageList, tuple[str, ...]]:
    """(images, classes) as torchvision reads a folder of class folders, its faults found before training.

    `check` opens every image, too.
    """
    try:
        folder = ImageFolder(root, allow_empty=True)
    except FileNotFoundError:
        raise RecipeError(
            f"data: {root} has no class folders. Wanted: train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"
        ) from None
    empty = [name for label, name in enumerate(folder.classes) if label not in set(folder.targets)]
    if empty:
        raise RecipeError(
            f"data: no images in class folder{'s' * (len(empty) > 1)} "
            f"{', '.join(str(root / name) for name in empty)} (looked for {', '.join(IMG_EXTENSIONS)})"
        )
    if len(folder.classes) < 2:
        raise RecipeError(f"data: {root} has one class, '{folder.classes[0]}'; there must be at least 2")
    for path, _ in folder.samples if check else ():
        try:
            Image.open(path).close()  # reads the header only
        except OSError as error:
            raise RecipeError(f"can't read the image {path}: {str(error).partition(' <')[0]}") from error
    return ImageList([path for path, _ in folder.samples], folder.targets, read_image), tuple(folder.classes)
