"""Which images train and which validate: by the names of folders and tars, or drawn.

What is drawn depends on the names of images, or of the groups that stay together: of one label an image, images that are added
move none.
"""

import hashlib
import os
import re
import unicodedata
from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.dataset import SPLITS, ImageData, ImageList, Images, Values, labels_of
from finetune.data.folders import Folder, class_difference, class_folders, is_hidden, list_folders
from finetune.recipe import Data
from finetune.utils.errors import RecipeError
from finetune.utils.files import data_folder
from finetune.utils.text import list_few, note
from finetune.utils.urls import is_url, relative_to


def from_folder(root: Folder) -> tuple[list[ImageList], Sequence[str]]:
    """([training images, validation images], or all in one list, classes) of a folder of class folders, or of splits."""
    train, val = split_folders(root)
    if train is None or val is None:
        images, classes = class_folders(root)
        return [images], classes
    (images, classes), (val_images, val_classes) = class_folders(train), class_folders(val)
    if classes != val_classes:
        difference = class_difference(classes, val_classes, ("in train", f"in {val.name}"))
        raise RecipeError(f"data: the classes of {train} and {val} differ: {difference}")
    return [images, val_images], classes


def split_folders(root: Folder) -> tuple[Folder | None, Folder | None]:
    """The folders of the training and the validation images, by their names in any case; (None, None) if all are classes.

    Raises:
        RecipeError: where the names leave it open.
    """
    names = list_folders(root)
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(SPLITS.get(name.lower(), "class"), []).append(name)
    if "train" not in parts:
        words = [{SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS} for name in names]
        if names and all(words):
            there = ", ".join(f"{name}/" for name in names)
            raise RecipeError(
                f"data: {root} has {there} and no class folders: call them train/ and val/ if that is what they are"
            )
        return None, None
    part = next((part for part in ("val", "test") if part in parts), None)
    if part is None:
        there = f"data: {root} has {parts['train'][0]}/ but neither val/ nor test/ beside it"
        raise RecipeError(f"{there}: add one, or rename it if it is a class")
    for found in (parts["train"], parts[part]):
        if len(found) > 1:
            raise RecipeError(f"data: {root} has {' and '.join(f'{name}/' for name in found)}: leave one of them")
    train, val = parts["train"][0], parts[part][0]
    if others := [name for name in names if name not in (train, val)]:
        note(f"data: of {root} only {train}/ and {val}/ are used, not {', '.join(f'{name}/' for name in others)}")
    return root / train, root / val


def evaluation_folder(root: Folder) -> Folder:
    """The folder of the validation images, else of the test images, else the folder itself."""
    parts = {SPLITS.get(name.lower()): root / name for name in reversed(list_folders(root))}
    return parts.get("val") or parts.get("test") or root


def list_shards(root: Path) -> dict[str, list[Path]]:
    """The tars called train-*.tar, val-*.tar, validation-*.tar, ..., in any case, by the part they belong to; others by ""."""
    parts: dict[str, list[Path]] = {}
    for tar in sorted(root.glob("*.[tT][aA][rR]")):
        if not is_hidden(tar.name):
            parts.setdefault(SPLITS.get(tar.name.partition("-")[0].lower(), ""), []).append(tar)
    return parts


def used_shards(root: Path) -> dict[str, list[Path]]:
    """The shards of the training and, if there are any, of the validation images, else of the test images.

    Raises:
        RecipeError: where the names of tars and folders leave it open.
    """
    shards, names = list_shards(root), dict[str, list[str]]()
    for part, tars in shards.items():
        names[part] = list(dict.fromkeys(f"{tar.name.partition('-')[0]}-*.tar" if part else tar.name for tar in tars))
    for name in list_folders(root):
        names.setdefault(SPLITS.get(name.lower(), ""), []).append(f"{name}/")
    used = ["train", *[part for part in ("val", "test") if part in names][:1]]
    for part in used:
        if len(names[part]) > 1:
            raise RecipeError(f"data: {root} has {' and '.join(names[part])}: leave one of them")
    there = [names[part][0] for part in used]
    if used[-1] not in shards:
        raise RecipeError(f"data: {root} has {' and '.join(there)}: wanted are shards or folders, not one of each")
    if others := [name for part in names if part not in used for name in names[part]]:
        note(f"data: of {root} only {' and '.join(there)} are used, not {list_few(others, len(others))}")
    return {part: shards[part] for part in used}


def from_lists(parts: list[ImageList], classes: Sequence[str], where: str | Path, data: Data) -> ImageData:
    """The lists of the training and the validation images; one list alone is split as `data` says.

    Raises:
        RecipeError: for a list or a class without images, and for fields of `data` that do not fit these images.
    """
    grouped = [with_groups(part, where, data) for part in parts]
    if drawn := len(grouped) == 1 and len(grouped[0]) > 0:
        shares = [1 / data.folds] * data.folds if data.folds else [data.val_share or 0.2, 1 - (data.val_share or 0.2)]
        grouped = divide(grouped[0], classes, where, shares, data.fold)
    else:
        refuse_split(data, where)
    sizes = [len(part) for part in grouped]
    if not all(sizes) or len(sizes) < 2 or len(classes) < 2 - are_numbers(grouped[0].labels, classes):
        raise RecipeError(
            f"data: {where} has {sizes[0]} training and {sum(sizes[1:])} validation images of {len(classes)} classes"
        )
    note_shared_groups(grouped[0], grouped[1], where)
    if not are_numbers(grouped[0].labels, classes):
        note_missing_classes({"training": grouped[0], "validation": grouped[1]}, classes, where)
    return ImageData(grouped[0], grouped[1], tuple(classes), drawn)


def are_numbers(labels: Values, classes: Sequence[str]) -> bool:
    """Whether labels are numbers, and not the 0 and 1 of classes, of which there are two or more."""
    return np.asarray(labels).dtype.kind == "f" and (len(classes) == 1 or not np.isin(labels, (0, 1)).all())


def refuse_split(data: Data, where: str | Path) -> None:
    """Raise RecipeError where `data` asks for a split, and the source has one."""
    if asked := next((name for name in ("val_share", "folds") if getattr(data, name)), None):
        raise RecipeError(f"data: {asked} has no effect on {where}, which has a split of its own; to choose options: holdout")


def refuse_groups(data: Data, where: str | Path) -> None:
    """Raise RecipeError where `data` asks for groups by file names, and there are no files."""
    if data.group_pattern:
        raise RecipeError(f"data: group_pattern needs files of class folders or of a CSV, which {where} are not")


def with_groups(images: ImageList, where: str | Path, data: Data) -> ImageList:
    """The images with their groups: the first ( ) of `group_pattern` in each path, or all that it matches."""
    if not data.group_pattern:
        return images
    if images.groups:
        raise RecipeError(f"data: {where} has a column group, and the recipe a group_pattern: leave one of them")
    if not has_files(images):
        refuse_groups(data, where)
    names = names_of(images, where)
    found = [re.search(data.group_pattern, name) for name in names]
    if other := [name for name, match in zip(names, found, strict=True) if not match or match[match.re.groups and 1] is None]:
        raise RecipeError(f"data: group_pattern finds nothing in {len(other)} of {len(names)} paths, such as {other[0]}")
    groups = [match[match.re.groups and 1] for match in found if match]
    return ImageList(images.items, images.labels, images.read, images.subgroups, groups)


def has_files(images: ImageList) -> bool:
    return len(images) > 0 and isinstance(images.items[0], str | Path)


def names_of(images: ImageList, where: str | Path) -> list[str]:
    """What tells an image from the others: its path in the folder or beside the table of its source, else its position."""
    if not has_files(images):
        return list(map(str, range(len(images))))
    source = Path(where)
    root = source if source.is_dir() else source.parent if source.is_file() else data_folder()
    return [relative_to(path, where) if is_url(path) else Path(os.path.relpath(path, root)).as_posix() for path in images.items]


def divide(
    images: ImageList, classes: Sequence[str], where: str | Path, shares: Sequence[float], chosen: int = 0, salt: str = ""
) -> list[ImageList]:
    """[training images, validation images]: the part `chosen` of these shares validates."""
    labels = np.asarray(images.labels)
    if are_numbers(labels, classes):  # are drawn by chance alone
        labels, classes = np.zeros(len(labels), int), ["number"]
    try:
        parts = deal(images.groups or names_of(images, where), labels, classes, shares, salt)
    except RecipeError as error:
        what = "groups" if images.groups else "images"
        raise RecipeError(
            f"data: {where} can't be split by its {what}: {error}; add some, or split them yourself, by train/ and val/ or a "
            "column split"
        ) from None
    return [images.part(np.flatnonzero(here).tolist()) for here in (parts != chosen, parts == chosen)]


def deal(
    groups: Sequence[str], labels: np.ndarray, classes: Sequence[str], shares: Sequence[float], salt: str = ""
) -> np.ndarray:
    """The part [n], 0, 1, ... of these shares, that each image is in, given its group and its labels, [n] or [n, classes].

    A group's part is drawn by its name, whatever others there are (as in TensorFlow's retrain.py), so each class has about its
    share of each part; of several labels an image, it is drawn by `stratify`. Only where a part would have none of a class, a
    group of it that can be spared is moved there.

    Raises:
        RecipeError: for a class with too few groups.
    """
    images, of_images = np.nonzero(labels) if labels.ndim == 2 else (np.arange(len(labels)), labels)
    classes_of, groups_of = defaultdict[str, set[int]](set), defaultdict[int, set[str]](set)
    for image, label in zip(images.tolist(), of_images.tolist(), strict=True):
        classes_of[groups[image]].add(label)
        groups_of[label].add(groups[image])
    ends, places = np.cumsum(shares)[:-1].tolist(), {name: place(name, salt) for name in dict.fromkeys(groups)}
    part_of = {name: bisect(ends, at) for name, at in places.items()}
    if labels.ndim == 2:
        part_of = stratify(groups, labels, shares, places)
    counts = np.zeros((len(classes), len(shares)), int)  # of groups
    for name, found in classes_of.items():
        counts[list(found), part_of[name]] += 1
    for label in sorted(groups_of, key=lambda label: (len(groups_of[label]), label)):
        for part in np.flatnonzero(counts[label] == 0).tolist():
            if counts[label, part]:  # by now
                continue
            spare = [name for name in groups_of[label] if all(counts[i, part_of[name]] > 1 for i in classes_of[name])]
            if not spare:
                few = len(groups_of[label]) < len(shares)
                why = f"and each of {len(shares)} parts needs one" if few else "none of which other classes can spare"
                raise RecipeError(f"class '{classes[label]}' has {len(groups_of[label])}, {why}")
            name = min(spare, key=lambda name: (-counts[label, part_of[name]], places[name]))
            counts[list(classes_of[name]), part_of[name]] -= 1
            counts[list(classes_of[name]), part] += 1
            part_of[name] = part
    return np.array([part_of[name] for name in groups])


def stratify(groups: Sequence[str], labels: np.ndarray, shares: Sequence[float], places: dict[str, float]) -> dict[str, int]:
    """The part of each group, given the labels [n, classes] of the images, so that each class has its share of each part.

    Iterative stratification (Sechidis et al. 2011): of the class with the fewest images left, each group goes where most images
    of that class are still wanted; of parts that are equal, where most of all its classes are. Large groups come first, then
    those with the lowest place.
    """
    number = {name: i for i, name in enumerate(places)}
    counts = np.zeros((len(number), labels.shape[1] + 1), int)  # images of each class, and all
    np.add.at(counts, [number[name] for name in groups], np.insert(labels != 0, labels.shape[1], True, axis=1))
    wanted, left = np.outer(shares, counts.sum(0)), counts.sum(0)
    order, parts = np.lexsort((np.array([*places.values()]), -counts[:, -1])), np.full(len(number), -1)
    while left.any():
        label = min(np.flatnonzero(left), key=lambda label: (label == labels.shape[1], left[label]))  # those without one last
        for group in order[(parts[order] < 0) & (counts[order, label] > 0)]:
            part = max(range(len(shares)), key=lambda part: (wanted[part, label], wanted[part] @ counts[group]))
            parts[group], wanted[part], left = part, wanted[part] - counts[group], left - counts[group]
    return dict(zip(places, parts.tolist(), strict=True))


def place(name: str, salt: str = "") -> float:
    """A number from 0 to 1, drawn by a name, in whichever form of Unicode a file system keeps it."""
    text = unicodedata.normalize("NFC", salt + name).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


def note_shared_groups(train: ImageList, val: ImageList, where: str | Path) -> None:
    """Say which groups a split that is given has on both sides."""
    if shared := sorted({*(train.groups or ())} & {*(val.groups or ())}):
        note(
            f"data: {len(shared)} groups of {where} are in training and in validation ({shared[0]}): the metrics will be "
            "better than on new groups"
        )


def note_missing_classes(parts: dict[str, ImageList], classes: Sequence[str], where: str | Path) -> None:
    """Say which classes one of the parts, by its name, has no image of."""
    for part, images in parts.items():
        labels = np.asarray(images.labels)
        there = {*labels.tolist()} if labels.ndim == 1 else {*np.flatnonzero(labels.any(0)).tolist()}
        if gone := [name for i, name in enumerate(classes) if i not in there]:
            more = f" and of {len(gone) - 1} other class{'es' * (len(gone) > 2)}" if len(gone) > 1 else ""
            note(f"data: {where} has no {part} image of class '{gone[0]}'{more}: no metric tells how well it is recognised")


def held_out(data: ImageData, options: Data, where: str | Path) -> ImageData:
    """The training images alone, of which about the share `holdout` of each class takes the place of the validation images.

    With a `holdout_fold` the training images fall into parts of that size, which are the same for each of them. For choosing
    options: a metric must not be reported on images that played a part in a choice.
    """
    images = data.train
    if not isinstance(images, ImageList):
        images = ImageList(range(len(images)), labels_of(images), partial(image_of, images))
    fold, parts = options.holdout_fold or 0, options.holdout_parts
    shares = [options.holdout, 1 - options.holdout] if options.holdout_fold is None else [1 / parts] * parts
    train, val = divide(images, data.classes, where, shares, fold, salt="holdout ")
    return ImageData(train, val, data.classes)


def image_of(images: Images, index: int) -> Image.Image:
    return images[index][0]
