"""Data sets of other libraries: torchvision, Hugging Face datasets, WebDataset's tar shards."""

import hashlib
import io
import re
import socket
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from PIL import Image

from finetune.data.builtin import require_package
from finetune.data.dataset import SPLITS, ImageData, ImageList
from finetune.data.split import list_shards, used_shards
from finetune.images.decode import ENDINGS
from finetune.images.read import read_image
from finetune.utils.errors import RecipeError
from finetune.utils.files import data_folder
from finetune.utils.net import reach
from finetune.utils.text import list_few, nearest, note

TORCHVISION = {  # argument that names the split, its values for training and validation, training images, classes, place
    "CIFAR10": ("train", (True, False), 50_000, 10, "cifar-10-batches-py"),
    "CIFAR100": ("train", (True, False), 50_000, 100, "cifar-100-python"),
    "DTD": ("split", ("train", "val"), 1880, 47, "dtd/dtd"),
    "EuroSAT": (None, (None,), 21_532, 10, "eurosat/2750"),  # has no split: by its files' names
    "FashionMNIST": ("train", (True, False), 60_000, 10, "FashionMNIST/raw"),
    "FGVCAircraft": ("split", ("train", "val"), 3334, 100, "fgvc-aircraft-2013b"),
    "Flowers102": ("split", ("train", "val"), 1020, 102, "flowers-102"),
    "Food101": ("split", ("train", "test"), 75_750, 101, "food-101"),
    "GTSRB": ("split", ("train", "test"), 26_640, 43, "gtsrb"),
    "Imagenette": ("split", ("train", "val"), 9469, 10, "imagenette2"),
    "MNIST": ("train", (True, False), 60_000, 10, "MNIST/raw"),
    "OxfordIIITPet": ("split", ("trainval", "test"), 3680, 37, "oxford-iiit-pet"),
    "STL10": ("split", ("train", "test"), 5000, 10, "stl10_binary"),
    "SVHN": ("split", ("train", "test"), 73_257, 10, "train_32x32.mat"),
}
CHANGED = "\n  with the package datasets: {}; save_to_disk(PATH), then Data('hf/PATH')"


def from_torchvision(name: str) -> tuple[list[ImageList], Sequence[str]]:
    """([training images, validation images], classes) of a torchvision set; downloaded if need be."""
    if name not in TORCHVISION:
        raise RecipeError(f"data: no 'torchvision/{name}'.{nearest(name, TORCHVISION)} There are: {', '.join(TORCHVISION)}")
    if name in ("Flowers102", "SVHN"):
        require_package("scipy", "scipy")
    argument, values, *_, place = TORCHVISION[name]
    sets = [open_torchvision(name, {argument: value} if argument else {}, data_folder() / place) for value in values]
    classes = getattr(sets[0], "classes", map(str, range(TORCHVISION[name][3])))  # GTSRB and SVHN have numbers
    return [torchvision_list(part) for part in sets], [text if isinstance(text, str) else text[0] for text in classes]


def open_torchvision(name: str, arguments: dict[str, Any], place: Path) -> Any:
    """torchvision's own object; CIFAR's, which are pickles, are read only if their md5 is right."""
    cls, before = getattr(torchvision.datasets, name), socket.getdefaulttimeout()
    with suppress(RuntimeError, OSError):  # not here yet
        return cls(data_folder(), **arguments)
    socket.setdefaulttimeout(20)  # torchvision sets none, and could wait for ever
    try:
        return cls(data_folder(), download=True, **arguments)
    except Exception as error:  # no network, a cut file, a full disk
        url = getattr(cls, "url", getattr(cls, "_URL", ""))  # not all sets have one
        raise RecipeError(
            f"can't download torchvision/{name}{url and f' from {url}'}: {error}\n  by hand: unpack it so that {place} is as "
            f"torchvision wants it (FINETUNE_DATA names another folder than {data_folder()})"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def torchvision_list(part: Any) -> ImageList:
    """Items, labels and reader of a torchvision set; each keeps them under names of its own."""
    if samples := getattr(part, "samples", getattr(part, "_samples", None)):
        return ImageList([path for path, _ in samples], [int(label) for _, label in samples], read_image)
    if files := getattr(part, "_image_files", getattr(part, "_images", None)):
        return ImageList(files, part._labels, read_image)
    pixels, labels = np.asarray(part.data), np.asarray(part.labels if hasattr(part, "labels") else part.targets)
    pixels = pixels.transpose(0, 2, 3, 1) if pixels.shape[1] == 3 else pixels  # STL10 and SVHN keep channels first
    return ImageList(pixels, labels, partial(read_image, load=Image.fromarray))


def from_hub(name: str) -> tuple[list[ImageList], Sequence[str]]:
    """The same of a data set that the package datasets reads: OWNER/NAME, OWNER/NAME:CONFIG or a folder."""
    require_package("datasets", "datasets", '"finetune-recipes[hf]"')
    import datasets

    found = load_hub(name)
    splits = found if isinstance(found, dict) else {"train": found}
    known = {SPLITS.get(split.lower(), split): split for split in splits}
    if "train" not in known:
        remedy = CHANGED.format(f"sets['train'] = sets.pop('{next(iter(splits))}')")
        raise RecipeError(f"data: hf/{name} has no split 'train', but {', '.join(splits)}{remedy}")
    used = [known["train"], *[known[part] for part in ("val", "test") if part in known][:1]]
    if others := [split for split in splits if split not in used]:
        note(f"data: of hf/{name} the splits {', '.join(used)} are used, not {', '.join(others)}")
    features = splits[used[0]].features
    images, labels = (
        [column for column, feature in features.items() if isinstance(feature, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if len(images) != 1 or len(labels) != 1:
        raise RecipeError(
            f"data: hf/{name} must have one Image and one ClassLabel column. Image: {', '.join(images) or 'none'}; ClassLabel: "
            f"{', '.join(labels) or 'none'}; all columns: {', '.join(features)}"
            + CHANGED.format("cast_column or remove_columns")
        )
    parts = []
    for split in used:
        rows = splits[split].with_format(None)
        numbers = [-1 if label is None else label for label in rows.select_columns(labels)[:][labels[0]]]
        if min(numbers, default=0) < 0:
            unlabelled = [row for row, number in enumerate(numbers) if number < 0]
            remedy = CHANGED.format(("" if split == used[0] else "remove that split, or ") + "filter() these rows out")
            text = f"{len(unlabelled)} images of '{split}' have no label, first row {unlabelled[0]}, from 0"
            raise RecipeError(f"data: hf/{name}: {text}{remedy}")
        load, where = partial(hub_image, rows.select_columns(images)), partial("hf/{}, {} {}".format, name, split)
        parts.append(ImageList(np.arange(len(rows)), np.array(numbers), partial(read_image, load=load, where=where)))
    classes = features[labels[0]].names
    if gone := [f"'{classes[i]}'" for i in sorted({*range(len(classes))} - {*parts[0].labels})]:
        without = f"filter() its rows out and align_labels_with_mapping({{CLASS: NUMBER, ...}}, '{labels[0]}') without it"
        remedy = CHANGED.format(f"add some, or {without}")
        raise RecipeError(f"data: hf/{name}: no image of '{used[0]}' has the class {list_few(gone, len(gone))}{remedy}")
    return parts, classes


def load_hub(name: str) -> Any:
    """What the package datasets makes of a folder, or of a name on the hub."""
    import datasets
    from huggingface_hub import constants

    path, _, config = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file():
            return datasets.load_from_disk(path)
        if not Path(path).is_dir() and not constants.HF_HUB_OFFLINE:  # asked first: the hub's client retries for 23 s
            reach(constants.ENDPOINT, "the Hugging Face hub")
        return datasets.load_dataset(path, config or None)
    except Exception as error:  # whatever the network, the hub or a file gives rise to
        reason = str(error).partition("\n  weights")[0].strip()
        raise RecipeError(
            f"can't load hf/{name}: {reason}\n  a configuration: hf/OWNER/NAME:CONFIG; without a network: hf/PATH"
            " of what save_to_disk(PATH) wrote, or what is in the cache with HF_HUB_OFFLINE=1"
        ) from None


def hub_image(rows: Any, index: int) -> Image.Image:
    return next(iter(rows[int(index)].values())) or Image.open(io.BytesIO())  # a row without one


def has_shards(root: Path) -> bool:
    """Whether a folder has WebDataset's training shards."""
    return "train" in list_shards(root)


def from_shards(root: Path) -> tuple[list[ImageList], Sequence[str]]:
    """The same of WebDataset's train-*.tar and val-*.tar (or test-*.tar), not unpacked; class names from classes.txt."""
    shards, parts = used_shards(root), []
    members = {split: np.concatenate([*map(tar_members, tars, count())]) for split, tars in shards.items()}
    classes = classes_of_shards(root, shards, members)
    for split, tars in shards.items():
        read = partial(read_image, load=partial(open_member, tars), where=partial(member_name, tars))
        parts.append(ImageList(members[split], members[split][:, 3], read))
    return parts, classes


def classes_of_shards(root: Path, shards: dict[str, list[Path]], members: dict[str, np.ndarray]) -> list[str]:
    """The names in classes.txt, else the labels themselves.

    Raises:
        RecipeError: for a part without images, for a label that no class has, and for a class without images in a part.
    """
    for split, tars in shards.items():
        if not len(members[split]):
            raise RecipeError(f"data: {root} has no images in {split}: {list_few(map(str, tars), len(tars))}")
    labels = np.concatenate([rows[:, 3] for rows in members.values()])
    low, high = int(labels.min()), int(labels.max())
    file = root / "classes.txt"
    names = read_class_names(file)
    number = len(names) or high + 1
    if low < 0 or high >= number:
        odd, named = low if low < 0 else high, f" in {file}" if names else ""
        raise RecipeError(
            f"data: {root} has labels from {low} to {high}, and {number} classes{named}, from 0: the label {odd} is that of "
            f"{name_label(shards, members, odd)}"
        )
    for split, rows in members.items():
        there = {*rows[:, 3].tolist()}
        if len(there) < number:
            gone = (f"{label} ('{names[label] if names else label}')" for label in range(number) if label not in there)
            why = f"{file} names {number}" if names else f"the highest, {high}, is that of {name_label(shards, members, high)}"
            few = list_few(gone, number - len(there))
            raise RecipeError(f"data: {root}: no image in {split} has the label {few}; labels count from 0, and {why}")
    return names or [str(label) for label in range(number)]


def name_label(shards: dict[str, list[Path]], members: dict[str, np.ndarray], label: int) -> str:
    """The first image that has a label, and how many others have it."""
    found = [(shards[split], row) for split, rows in members.items() for row in rows[rows[:, 3] == label]]
    return member_name(*found[0]) + (f" and of {len(found) - 1} others" if len(found) > 1 else "")


def read_class_names(file: Path) -> list[str]:
    """The lines of classes.txt, without blank ones at its end; none if there is no such file."""
    if not file.is_file():
        return []
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise RecipeError(f"data: can't read {file}: {error}") from None
    twice = sorted({name for name in names if names.count(name) > 1 or not name})
    if twice:
        raise RecipeError(f"data: {file} names a class twice, or none in a line: '{twice[0]}'")
    return names


def tar_members(tar: Path, number: int) -> np.ndarray:
    """(number, offset, bytes, label) [n, 4] of the images in a tar, where KEY.jpg (or .png, ...) has its label in KEY.cls."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    found = []
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                name = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name)  # KEY and ending as WebDataset divides them
                if member.isfile() and name:
                    if name[2].lower() in samples.setdefault(name[1], {}):
                        raise ValueError(f"{member.name} is there twice")
                    samples[name[1]][name[2].lower()] = member
            for key, members in samples.items():
                images = [members[ending] for ending in members if f".{ending}" in ENDINGS]
                if len(images) != 1 or "cls" not in members:
                    dotted = next((f" ({member.name} is its .{end})" for end, member in members.items() if "." in end), "")
                    why = f"{dotted}; WebDataset's keys end at a file name's first dot: write them without" if dotted else ""
                    raise ValueError(f"{key} has {len(images)} images and {'a' if 'cls' in members else 'no'} .cls{why}")
                label = file.extractfile(members["cls"])
                assert label is not None  # only files are among the members
                text = label.read().decode(errors="replace").strip()
                if not re.fullmatch(r"-?[0-9]{1,18}", text):  # what 64 bits hold
                    raise ValueError(f"{key}.cls is '{text[:20]}', not a number of a class")
                found.append((number, images[0].offset_data, images[0].size, int(text)))
            file.fileobj.seek(file.offset)  # after the last member
            if not file.fileobj.read(tarfile.BLOCKSIZE):
                raise ValueError("it breaks off: the empty block at a tar's end is missing")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise RecipeError(
            f"data: can't use {tar}: {error}. Wanted: a tar, not compressed, with KEY.jpg (or .png, ...) and "
            "KEY.cls, a number, for each image"
        ) from None
    return np.array(found, np.int64).reshape(-1, 4)


class Member(NamedTuple):
    """A file in a tar: its content's place there."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        with tarfile.open(self.tar, "r:") as file:
            return f"{next(each.name for each in file if each.offset_data == self.offset)} in {self.tar}"


def open_member(tars: Sequence[Path], row: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(Member(tars[row[0]], row[1], row[2]).read()))


def member_name(tars: Sequence[Path], row: np.ndarray) -> str:
    return str(Member(tars[row[0]], row[1], row[2]))


def same_members(root: Path, data: ImageData) -> tuple[list[Member], list[list[int]]]:
    """(training and validation images of shards, groups of them, by their positions, that have the same content)."""
    shards = list(used_shards(root).values())  # of one part alone, all are of its shards
    parts = ((tars, part) for tars, part in ((shards[0], data.train), (shards[-1], data.val)) if isinstance(part, ImageList))
    members = [Member(tars[row[0]], row[1], row[2]) for tars, part in parts for row in part.items]
    by_size, groups = defaultdict[int, list[int]](list), defaultdict[bytes, list[int]](list)
    for i, member in enumerate(members):
        by_size[member.size].append(i)
    for alike in by_size.values():
        for i in alike if len(alike) > 1 else ():
            groups[hashlib.blake2b(members[i].read(), digest_size=16).digest()].append(i)
    return members, [group for group in groups.values() if len(group) > 1]
