"""Data sets of other libraries: torchvision, Hugging Face datasets, WebDataset's tar shards."""

import io
import re
import socket
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

from finetune.data.builtin import data_folder, require_package
from finetune.data.dataset import SPLITS, ImageList
from finetune.data.decode import ENDINGS, read_image
from finetune.utils.errors import RecipeError
from finetune.utils.net import reach
from finetune.utils.text import nearest, note

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
        raise RecipeError(f"data: hf/{name} has no split 'train', but {', '.join(splits)}")
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
            f"{', '.join(labels) or 'none'}; all columns: {', '.join(features)}\n  with the package datasets: cast_column or "
            "remove_columns, save_to_disk(PATH), then Data('hf/PATH')"
        )
    parts = []
    for split in used:
        rows = splits[split].with_format(None)
        numbers = [-1 if label is None else label for label in rows.select_columns(labels)[:][labels[0]]]
        if min(numbers, default=0) < 0:
            unlabelled = sum(number < 0 for number in numbers)
            raise RecipeError(
                f"data: hf/{name}: {unlabelled} images of '{split}' have no label\n  with the package datasets: remove that "
                "split, or filter() these rows out; save_to_disk(PATH), then Data('hf/PATH')"
            )
        load, where = partial(hub_image, rows.select_columns(images)), partial("hf/{}, {} {}".format, name, split)
        parts.append(ImageList(np.arange(len(rows)), np.array(numbers), partial(read_image, load=load, where=where)))
    return parts, features[labels[0]].names


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


def list_shards(root: Path) -> dict[str, list[Path]]:
    """The tars called train-*.tar, val-*.tar, validation-*.tar, ... by the part they belong to."""
    parts: dict[str, list[Path]] = {}
    for tar in sorted(root.glob("*-*.tar")):
        if part := SPLITS.get(tar.name.partition("-")[0].lower()):
            parts.setdefault(part, []).append(tar)
    return parts


def from_shards(root: Path) -> tuple[list[ImageList], Sequence[str]]:
    """The same of WebDataset's train-*.tar and val-*.tar (or test-*.tar), not unpacked; class names from classes.txt."""
    shards = list_shards(root)
    val = [split for split in ("val", "test") if split in shards][:1]
    parts = []
    for split in ["train", *val]:
        tars = shards[split]
        members = np.concatenate([np.array(tar_members(tar, i), np.int64).reshape(-1, 4) for i, tar in enumerate(tars)])
        read = partial(read_image, load=partial(open_member, tars), where=partial(member_name, tars))
        parts.append(ImageList(members, members[:, 3], read))
    labels = np.concatenate([part.labels for part in parts])
    classes = read_class_names(root / "classes.txt") or [str(i) for i in range(labels.max(initial=-1) + 1)]
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise RecipeError(f"data: {root} has labels from {labels.min()} to {labels.max()}, and {len(classes)} classes, from 0")
    for split, part in zip(["train", *val], parts, strict=True):
        if gone := sorted({*range(len(classes))} - {*map(int, part.labels)}):
            few = ", ".join(f"{label} ('{classes[label]}')" for label in gone[:10])
            raise RecipeError(f"data: {root}: no image in {split} has the label {few}; labels count from 0")
    return parts, classes


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


def tar_members(tar: Path, number: int) -> list[tuple[int, int, int, int]]:
    """(number, offset, bytes, label) of every image in a tar file, where KEY.jpg (or .png, ...) has its label in KEY.cls."""
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
                    raise ValueError(f"{key} has {len(images)} images and {'a' if 'cls' in members else 'no'} .cls")
                label = file.extractfile(members["cls"])
                assert label is not None  # only files are among the members
                text = label.read().decode(errors="replace").strip()
                if not re.fullmatch(r"-?[0-9]+", text):
                    raise ValueError(f"{key}.cls is '{text[:20]}', not a number")
                found.append((number, images[0].offset_data, images[0].size, int(text)))
            file.fileobj.seek(file.offset)  # after the last member
            if not file.fileobj.read(tarfile.BLOCKSIZE):
                raise ValueError("it breaks off: the empty block at a tar's end is missing")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise RecipeError(
            f"data: can't use {tar}: {error}. Wanted: a tar, not compressed, with KEY.jpg (or .png, ...) and "
            "KEY.cls, a number, for each image"
        ) from None
    return found


def open_member(tars: Sequence[Path], member: np.ndarray) -> Image.Image:
    with open(tars[member[0]], "rb") as file:
        file.seek(member[1])
        return Image.open(io.BytesIO(file.read(member[2])))


def member_name(tars: Sequence[Path], member: np.ndarray) -> str:
    with tarfile.open(tars[member[0]], "r:") as file:
        return f"{next(each.name for each in file if each.offset_data == member[1])} in {tars[member[0]]}"
