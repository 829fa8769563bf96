"""Lists of images and labels, the check of their files, and the record of them."""

import csv
import hashlib
import io
import itertools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from finetune.images.decode import WHITE
from finetune.images.read import CHECKING, header_fault, is_image, look_into
from finetune.images.remote import first_bytes, image_digests, look_up
from finetune.recipe import Data
from finetune.utils.errors import RecipeError
from finetune.utils.files import write_file
from finetune.utils.text import note, progress
from finetune.utils.urls import as_path, is_url

Values = Sequence[Any] | np.ndarray  # one for each image: its item, or its label, a number or 0 and 1 for each class
Reader = Callable[..., Any]  # reads an item as an RGB image or an array: read_image with what its first argument is
FIX = "finetune check --data DIR --fix good.csv"
LEAVE_OUT = f"--set data.on_bad_image=skip; or, for a table without: {FIX}"
SPLITS = {  # what folders, tables, shards and sets call their parts, in any case
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


class Images(Protocol):
    """A map-style set of (PIL image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Any]: ...


@dataclass(frozen=True)
class ImageData:
    """Training and validation images with labels from 0, in the order of `classes`."""

    train: Images
    val: Images
    classes: tuple[str, ...]
    drawn: bool = False  # the split was drawn here, and is not the source's own


class ImageList:
    """A map-style set of items that `read` makes RGB images of, when they are asked for.

    `subgroups` names the subgroup of each image; a run's result then has the metrics of each subgroup, too. `groups` names the
    group of each, which no split divides. `digests` are those of the files, as far as they were looked into.
    """

    def __init__(
        self,
        items: Values,
        labels: Values,
        read: Reader,
        subgroups: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        digests: Sequence[str] | None = None,
    ):
        self.items, self.labels, self.read, self.subgroups, self.groups = items, labels, read, subgroups, groups
        self.digests = digests

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        label = self.labels[index]
        return self.read(self.items[index]), label if np.ndim(label) else int(label)

    def part(self, indices: list[int]) -> "ImageList":
        """The images at `indices`."""

        def part_of(values: Any) -> Any:
            return values[indices] if isinstance(values, np.ndarray) else [values[i] for i in indices]

        known = (values and part_of(values) for values in (self.subgroups, self.groups, self.digests))
        return ImageList(part_of(self.items), part_of(self.labels), self.read, *known)

    def read_as(self, data: Data) -> "ImageList":
        """The same images, read with a recipe's background and channels."""
        asked = {"background": data.background, "channels": data.channels}
        options = {name: value for name, value in asked.items() if value not in (None, WHITE)}
        return self.read_with(**options) if options else self

    def read_with(self, **options: Any) -> "ImageList":
        """The same images, read with these options of `read_image`."""
        return ImageList(self.items, self.labels, partial(self.read, **options), self.subgroups, self.groups, self.digests)


def labels_of(images: Images) -> np.ndarray:
    """The label of every image, without reading one: from the data set's own list of them."""
    for name in ("labels", "targets"):  # ours, torchvision's
        if len(labels := getattr(images, name, ())) == len(images):
            return np.asarray(labels)
    raise RecipeError(
        "balanced sampling, balanced weights, numbers and a holdout need to know every label: give the data set that the "
        "recipe's function returns a list `targets`"
    )


def fingerprint(images: Images, classes: Sequence[str]) -> str:
    """The number of images, and a digest of their files' names, their labels and their classes, in this order.

    The folders they lie in may be others. Pixels are looked at only where they lie in memory.
    """
    digest = hashlib.blake2b(repr(tuple(classes)).encode(errors="surrogateescape"), digest_size=8)
    if isinstance(images, ImageList) and isinstance(images.items, np.ndarray):
        digest.update(np.ascontiguousarray(images.items).ravel().data)
    elif isinstance(images, ImageList):
        names = (file_name(item) if isinstance(item, str | Path) else str(item) for item in images.items)
        digest.update("\n".join(names).encode(errors="surrogateescape"))  # names of any bytes
    with suppress(RecipeError):  # a function's data set need not know its labels
        labels = labels_of(images)
        with np.errstate(invalid="ignore"):
            whole = labels.astype(np.int64)
        digest.update((whole if np.array_equal(whole, labels) else labels.astype(np.float64)).ravel().data)
    return f"{len(images)} {digest.hexdigest()}"


def file_name(item: str | Path) -> str:
    """The name of a file, here or elsewhere."""
    return as_path(item).name if is_url(item) else os.path.basename(item)


def digests_of(images: ImageList) -> Sequence[str]:
    """The digest of each file; "" of one that can't be had."""
    return images.digests or image_digests(images.items)


def check_files(parts: Sequence[ImageList], on_bad_image: str, channels: int | None = None) -> None:
    """Read the header of every file, once on each machine; of URLs on the first alone. The lists then know their digests.

    Raises:
        RecipeError: for files that are no images, the first ten by name, unless on_bad_image="skip".
    """
    if on_bad_image == "skip" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    main = os.environ.get("RANK", "0") == "0"
    paths = [path for part in parts for path in part.items if main or not is_url(path)]
    faults = {path: str(why) for path, why in look_up(paths, main).items()}
    files, urls = ([path for path in paths if is_url(path) == far and path not in faults] for far in (False, True))
    found, digests = look_into(files, channels, main)
    fetched = zip(urls, progress(first_bytes(urls), len(urls), CHECKING, main and bool(urls)), strict=False)
    faults |= found | {url: fault for url, start in fetched if (fault := header_fault(start, channels))}
    if faults:
        raise RecipeError(name_faults(faults, len(paths)))
    in_order = iter(digests)
    for part in parts if len(files) == len(paths) else ():
        part.digests = list(itertools.islice(in_order, len(part)))


def name_faults(faults: dict[str, str], total: int) -> str:
    """Which of so many images can't be read, the first ten with the reason, and how to go on without them."""
    listed = [f"{path}: {why}" for path, why in faults.items()][:10]
    if len(faults) == 1:
        return f"can't read the image {listed[0]}\n  to leave it out: {LEAVE_OUT}"
    more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "\n  ".join([f"can't read {len(faults)} of {total} images:", *listed, *more, f"to leave them out: {LEAVE_OUT}"])


def unreadable_classes(part: ImageList) -> dict[int, RecipeError]:
    """The labels of which no image can be read, with the last fault; of most classes the first can, and no other is tried."""
    labels, found = np.asarray(part.labels), dict[int, RecipeError]()
    for label in np.unique(labels).tolist() if labels.ndim == 1 else ():
        for i in np.flatnonzero(labels == label).tolist():
            try:
                part[i]
                found.pop(label, None)
                break
            except RecipeError as error:
                found[label] = error
    return found


def check_classes(part: ImageList, classes: Sequence[str], where: str) -> None:
    """Raise RecipeError if no image of a class can be read."""
    for label, fault in unreadable_classes(part).items():
        text = f"data: no image of class '{classes[label]}' in {where} can be read, such as: {fault}"
        raise RecipeError(f"{text}\n  for a table without what can't be read: {FIX}")


def drop_unreadable(drawn: ImageList, classes: Sequence[str], where: str) -> ImageList:
    """The images that were drawn to validate, without classes of which none can be read; it says which.

    Raises:
        RecipeError: if none is left.
    """
    gone = unreadable_classes(drawn)
    if not gone:
        return drawn
    kept = [i for i, label in enumerate(drawn.labels) if label not in gone]
    if not kept:
        raise RecipeError(f"data: no image of {where} that was drawn to validate can be read; for a table without these: {FIX}")
    for name in (classes[label] for label in gone):
        note(f"data: no image of class '{name}' that was drawn to validate can be read: no metric tells how it is recognised")
    return drawn.part(kept)


def note_same_files(
    data: ImageData, source: str, find: Callable[[ImageData], tuple[list[Any], list[list[int]]]] | None = None
) -> None:
    """Say, on the first process, which files have the same content: in both parts of the split, or under two labels.

    `find` is for images that are no files of their own: it gives something that names each, and the groups of `same_files`.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    parts = [part for part in (data.train, data.val) if isinstance(part, ImageList)]
    paths, labels = ([value for part in parts for value in getattr(part, name)] for name in ("items", "labels"))
    first_val, found = len(data.train), list[str]()
    digests = [digest for part in parts for digest in part.digests or ()]
    paths, groups = find(data) if find else (paths, same_files(paths, digests))
    if shared := [i for group in groups if group[0] < first_val for i in group if i >= first_val]:
        found.append(
            f"{len(shared)} of {len(data.val)} validation images are training images as well ({paths[shared[0]]}): the metrics "
            "will be better than on new images"
        )
    differ = [(group, i) for group in groups for i in group if not np.array_equal(labels[i], labels[group[0]])]
    if differ:
        number = sum(map(len, {group[0]: group for group, _ in differ}.values()))
        named = f"{paths[differ[0][1]]} is {paths[differ[0][0][0]]}"
        found.append(f"{number} files have the same content as another with another label ({named})")
    if found:
        note(f"data: {'; '.join(found)}; all that is there twice: finetune check --data {shlex.quote(source)}")


def same_files(paths: Sequence[Any], digests: Sequence[str] = ()) -> list[list[int]]:
    """Groups of paths, by their positions, whose files have the same content; without `digests` it looks into them."""
    digests = digests if len(digests) == len(paths) else image_digests(paths)
    groups = {digest: list[int]() for digest, number in Counter(digests).items() if digest and number > 1}
    for i, digest in enumerate(digests if groups else ()):
        if digest in groups:
            groups[digest].append(i)
    return [group for group in groups.values() if is_image(paths[group[0]])]


FileRow = tuple[str, str, str, str, str]  # (split, classes, digest, path, group) of a file


def file_rows(train: Images, val: Images, classes: Sequence[str]) -> list[FileRow]:
    """The files that a run trains and validates on; none for sets that are no files of their own."""
    rows = list[FileRow]()
    for split, images in (("train", train), ("val", val)):
        if not isinstance(images, ImageList) or not isinstance(images.items[0], str | Path):
            return []
        labels, groups = np.asarray(images.labels), images.groups or [""] * len(images)
        if labels.dtype.kind == "f":
            named = [";".join(map(str, label)) for label in labels.tolist()]
        elif labels.ndim > 1:
            named = [";".join(classes[i] for i in np.flatnonzero(label).tolist()) for label in labels]
        else:
            named = [classes[label] for label in labels.tolist()]
        rows += [(split, *row) for row in zip(named, digests_of(images), map(str, images.items), groups, strict=True)]
    return rows


def record_files(file: Path, rows: Sequence[FileRow]) -> None:
    """Write a table of a run's files; nothing where there are none."""
    if rows:
        table = csv.writer(lines := io.StringIO(newline=""))
        table.writerows([("split", "label", "digest", "file", "group"), *rows])
        write_file(file, lines.getvalue())


def changed_files(file: Path, rows: Sequence[FileRow]) -> list[str]:
    """The paths of files whose content is another than in a run's table; the files are the same by their names, in order."""
    before = recorded_digests(file, "train") + recorded_digests(file, "val")
    return [row[3] for digest, row in zip(before, rows, strict=False) if digest != row[2]]


def recorded_digests(file: Path, split: str) -> list[str]:
    """Their digests alone."""
    return [row["digest"] for row in recorded_rows(file, split)]


def recorded_rows(file: Path, split: str) -> list[dict[str, str]]:
    """The rows of a run's table of files that are of a split; [] where none was written."""
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        return [row for row in csv.DictReader(lines) if row["split"] == split]
