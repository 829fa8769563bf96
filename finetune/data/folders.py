"""Folders of images: which files are images, which folders are classes, which folders and tars are splits."""

import glob
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.data.dataset import SPLITS, ImageList
from finetune.data.decode import ENDINGS, read_image
from finetune.utils.errors import RecipeError
from finetune.utils.text import as_seen, list_few, note, readable

LINKED = "links to files that are there already"
HIDDEN = {"__macosx", "@eadir", "$recycle.bin"}  # folders that macOS, Synology and Windows leave among images


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a program's own: .ipynb_checkpoints, __MACOSX, macOS's ._photo.jpg."""
    return name.startswith(".") or name.lower() in HIDDEN


class Finder:
    """Finds the image files below folders, and keeps what it leaves out: paths, by the reason.

    With `once`, a file to which several paths lead, by links, is found by the first; `found` has it by its device and number.
    """

    def __init__(self, once: bool = True):
        self.once = once
        self.found: dict[tuple[int, int], str] = {}
        self.left_out: dict[str, list[str]] = {}

    def find(self, root: str | Path) -> list[str]:
        """The files below a folder, in torchvision's order: by their folder, then by their name.

        Raises:
            RecipeError: for a folder that can't be listed.
        """
        files, folders_seen = [], set()
        for folder, folders, names in os.walk(root, followlinks=True, onerror=can_not_list):
            known = os.stat(folder)
            if (known.st_dev, known.st_ino) in folders_seen:  # a loop of links, or the same folder by another name
                self.leave_out("linked folders whose images are there already", folder)
                folders.clear()
                continue
            folders_seen.add((known.st_dev, known.st_ino))
            for name in filter(is_hidden, folders):
                self.leave_out("hidden folders", os.path.join(folder, name))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            files += [(folder, name) for name in sorted(names) if self.wants(os.path.join(folder, name))]
        return [os.path.join(folder, name) for folder, name in sorted(files)]

    def wants(self, path: str) -> bool:
        """Whether a file counts as an image, by its name; one that can't be read is to be named later, not left out here."""
        name = os.path.basename(path)
        ending = os.path.splitext(name)[1].lower()
        if is_hidden(name):
            if ending in ENDINGS:
                self.leave_out("hidden files", path)
            return False
        if ending not in ENDINGS:
            self.leave_out(f"files that end in {ending}" if ending else "files without an ending", path)
            return False
        try:
            known = os.stat(path)
        except OSError:
            return True
        if not stat.S_ISREG(known.st_mode):
            self.leave_out("pipes or devices", path)
            return False
        first = self.found.setdefault((known.st_dev, known.st_ino), path)
        if self.once and first != path:
            self.leave_out(LINKED, path)
            return False
        return True

    def first(self, path: str) -> str:
        """The path by which a file was found first."""
        known = os.stat(path)
        return self.found[known.st_dev, known.st_ino]

    def leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)

    def describe(self) -> str:
        """What was left out, by reason, each with its number and an example; "" if nothing was."""
        return ", ".join(f"{why}: {len(paths)} ({os.path.basename(paths[0])})" for why, paths in self.left_out.items())


def can_not_list(error: OSError) -> None:
    raise RecipeError(f"data: can't list the folder {error.filename}: {error.strerror}") from error


def list_folders(root: Path) -> list[str]:
    """The names of a folder's folders but for hidden ones, sorted."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise RecipeError(f"data: can't list the folder {root}: {error.strerror}") from error


def from_folder(root: Path) -> tuple[list[ImageList], Sequence[str]]:
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


def split_folders(root: Path) -> tuple[Path | None, Path | None]:
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


def evaluation_folder(root: Path) -> Path:
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


def class_folders(root: Path) -> tuple[ImageList, tuple[str, ...]]:
    """(images, classes) of a folder of class folders, in the order of torchvision's ImageFolder.

    Raises:
        RecipeError: for a class without images, for less than two classes, and for a file in two.
    """
    classes, finder = list_folders(root), Finder()
    if not classes:
        raise RecipeError(f"data: {root} has no class folders. {describe_kind(root)}")
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = finder.find(root / name)
        paths += found
        labels += [label] * len(found)
        if not found:
            empty.append(str(root / name))
    twice = [(finder.first(path), path) for path in finder.left_out.get(LINKED, [])]
    if conflicts := [pair for pair in twice if len({Path(path).relative_to(root).parts[0] for path in pair}) > 1]:
        raise RecipeError(f"data: {len(conflicts)} files are in two classes, by links: {' is '.join(conflicts[0])}")
    left_out = f"; left out: {finder.describe()}" if finder.left_out else ""
    if empty:
        raise RecipeError(f"data: no images in class folder{'s' * (len(empty) > 1)} {', '.join(empty)}{left_out}")
    if len(classes) < 2:
        other = other_reading(root, classes[0])
        raise RecipeError(f"data: {root} has one class, '{classes[0]}'; there must be at least 2{other}")
    check_levels(root, classes)
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir() and is_hidden(entry.name):
            finder.leave_out("hidden folders", entry.path)
        elif entry.is_file() and Path(entry.name).suffix.lower() in ENDINGS and not is_hidden(entry.name):
            finder.leave_out("images beside the class folders", entry.path)
    if finder.left_out:
        note(f"left out of {root}: {finder.describe()}")
    return ImageList(paths, labels, read_image), tuple(map(readable, classes))


def other_reading(root: Path, name: str) -> str:
    """What a folder of one class folder may be meant as, in words."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    if tables := [entry.path for entry in entries if entry.name.lower().endswith(".csv")]:
        return f". Is there a table of them? --data {tables[0]}"
    if list_folders(root / name):
        return f". Did you mean {root / name}?"
    hidden = [entry.name for entry in entries if entry.is_dir() and is_hidden(entry.name)]
    return f". Hidden folders are no classes: {', '.join(hidden[:3])}" if hidden else ""


def check_levels(root: Path, classes: Sequence[str]) -> None:
    """Refuse splits within class folders, and say where all class folders have the same folders, which may be the classes."""
    inner = list_folders(root / classes[0])
    if not inner or any(list_folders(root / name) != inner for name in classes[1:]):
        return
    text = f"data: each class folder of {root} has {', '.join(f'{name}/' for name in inner[:5])} within"
    if all(name.lower() in SPLITS for name in inner):
        wanted = f"{inner[0]}/{classes[0]}/*, not {classes[0]}/{inner[0]}/*"
        raise RecipeError(f"{text}. Wanted: {wanted}, or a CSV with a column split")
    if len(inner) > 1:
        note(f"{text}; if these are the classes, put them on the upper level")


def describe_kind(root: Path) -> str:
    """What a folder without class folders may be instead, and what is wanted."""
    names = sorted(path.name for path in root.iterdir())
    if tars := [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]:
        return f"Of WebDataset's shards, those called train-*.tar and val-*.tar are read, not compressed; there is {tars[0]}"
    if "dataset_dict.json" in names or any(name.endswith((".parquet", ".arrow")) for name in names):
        return f"A set of the package datasets is named hf/{root}"
    return "Wanted: train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"


def class_difference(one: Iterable[str], other: Iterable[str], places: tuple[str, str]) -> str:
    """Which classes are in one of two places alone, in words; names that only look alike are spelt out."""
    alone = [sorted({*a} - {*b}) for a, b in ((one, other), (other, one))]
    plain = [[as_seen(name) for name in names] for names in alone]
    alike = {*plain[0]} & {*plain[1]}
    shown = [
        [ascii(name) if same in alike else name for name, same in zip(*both, strict=True)]
        for both in zip(alone, plain, strict=True)
    ]
    return "; ".join(f"only {place}: {', '.join(names) or 'none'}" for place, names in zip(places, shown, strict=True))


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, folders' images (by their endings) however deep, and globs; each path once.

    Raises:
        RecipeError: for a path that leads to no image.
    """
    found, finder = [], Finder(once=False)
    for path in map(str, paths):
        if not path:
            raise RecipeError("a path is empty: name images, folders or globs")
        if Path(path).is_dir():
            images = list(map(Path, finder.find(path)))
        elif Path(path).exists():
            images = [Path(path)]
        else:  # a bracket may be part of a name
            matches = glob.glob(path, recursive=True) or glob.glob(path.replace("[", "[[]"), recursive=True)
            inside = (finder.find(match) if os.path.isdir(match) else [match] * finder.wants(match) for match in matches)
            images = [Path(file) for files in inside for file in files]
            if "**" in path:  # which goes round loops of links
                images.sort(key=lambda image: len(str(image)), reverse=True)  # the shortest path of each stays
                images = list({os.path.realpath(image): image for image in images}.values())
        if not images:
            left_out = f"; left out: {finder.describe()}" if finder.left_out else ""
            raise RecipeError(f"no images in {path}{left_out}")
        found += sorted(images)
    if finder.left_out:
        note(f"not looked at: {finder.describe()}")
    return list(dict.fromkeys(found))
