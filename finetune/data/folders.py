"""Folders of images: which files are images, and which folders are classes."""

import glob
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.data.dataset import SPLITS, ImageList
from finetune.images.arrays import ENDINGS as ARRAYS
from finetune.images.decode import ENDINGS
from finetune.images.read import read_image
from finetune.images.remote import RemoteFolder, as_item, find_file, list_folder, may_be_folder, scan
from finetune.utils.errors import RecipeError
from finetune.utils.text import as_seen, look_alikes, note, readable, spell_out
from finetune.utils.urls import as_path, is_archive, is_url, url_fault

Folder = Path | RemoteFolder
HIDDEN = {"__macosx", "@eadir", "$recycle.bin"}  # folders that macOS, Synology and Windows leave among images


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a program's own: .ipynb_checkpoints, __MACOSX, macOS's ._photo.jpg."""
    return name.startswith(".") or name.lower() in HIDDEN


class Finder:
    """Finds the image files below folders, and keeps what it leaves out: paths, by the reason.

    With `once`, a file to which several paths lead, by links, is found by the first; `found` has it by its device and number.
    """

    def __init__(self, once: bool = True, endings: frozenset[str] = ENDINGS):
        self.once, self.endings = once, endings
        self.found: dict[tuple[int, int], str] = {}
        self.linked: list[tuple[str, str]] = []  # the path by which a file was found first, and another
        self.left_out: dict[str, list[str]] = {}

    def find(self, root: str | Path) -> list[str]:
        """The files below a folder, in torchvision's order: by their folder, then by their name.

        Raises:
            RecipeError: for a folder that can't be listed.
        """
        found, folders_seen, folders = dict[str, list[str]](), set(), [root if isinstance(root, str) else str(root)]
        while folders:
            folder = folders.pop()
            known, entries = list_entries(folder)
            if (known.st_dev, known.st_ino) in folders_seen:  # a loop of links, or the same folder by another name
                self.leave_out("linked folders whose images are there already", folder)
                continue
            folders_seen.add((known.st_dev, known.st_ino))
            inner = list(filter(is_folder, entries))
            for entry in inner:
                if is_hidden(entry.name):
                    self.leave_out("hidden folders", entry.path)
            folders += [entry.path for entry in reversed(inner) if not is_hidden(entry.name)]
            numbered = ((entry, number_of(entry, known.st_dev)) for entry in entries if not is_folder(entry))
            found[folder] = [entry.path for entry, number in numbered if self.wants(entry.path, entry.name, number)]
        return [path for folder in sorted(found, key=lambda folder: str(as_path(folder))) for path in found[folder]]

    def wants(self, path: str, name: str, number: tuple[int, int] | None = None) -> bool:
        """Whether a file counts as an image, by its name; one that can't be read is to be named later, not left out here.

        `number` is the device and the number of a plain file, for which it need not be asked again.
        """
        stem, dot, ending = name.rpartition(".")
        ending = (dot + ending).lower() if stem.strip(".") else ""
        if is_hidden(name):
            if ending in self.endings:
                self.leave_out("hidden files", path)
            return False
        if ending not in self.endings:
            self.leave_out(f"files that end in {ending}" if ending else "files without an ending", path)
            return False
        if number is None:
            try:
                known = os.stat(path)
            except OSError:
                return True
            if not stat.S_ISREG(known.st_mode):
                self.leave_out("pipes or devices", path)
                return False
            number = known.st_dev, known.st_ino
        first = self.found.setdefault(number, path)
        if self.once and first != path:
            self.linked.append((first, path))
            self.leave_out("links to files that are there already", path)
            return False
        return True

    def leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)

    def describe(self) -> str:
        """What was left out, by reason, each with its number and an example; "" if nothing was."""
        return ", ".join(f"{why}: {len(paths)} ({as_path(paths[0]).name})" for why, paths in self.left_out.items())


def list_entries(folder: str) -> tuple[Any, list["os.DirEntry[str]"]]:
    """What is known of a folder, and its entries by name; raises RecipeError if it can't be listed."""
    try:
        known = SimpleNamespace(st_dev=-1, st_ino=id(folder)) if isinstance(folder, RemoteFolder) else os.stat(folder)
        return known, sorted(scan(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise RecipeError(f"data: can't list the folder {error.filename}: {error.strerror}") from error


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder, or a link to one; a link that goes round in a circle leads to none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def number_of(entry: "os.DirEntry[str]", device: int) -> tuple[int, int] | None:
    """The device, its folder's, and the number of a plain file, known from the listing alone; None for links and others."""
    return (device, entry.inode()) if entry.is_file(follow_symlinks=False) and os.name != "nt" else None


def list_folders(root: Folder) -> list[str]:
    """The names of a folder's folders but for hidden ones, sorted."""
    try:
        return sorted(entry.name for entry in scan(root) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise RecipeError(f"data: can't list the folder {root}: {error.strerror}") from error


def class_folders(root: Folder, endings: frozenset[str] = ENDINGS) -> tuple[ImageList, tuple[str, ...]]:
    """(images, classes) of a folder of class folders, in the order of torchvision's ImageFolder.

    Images are pictures; where there is none, files of arrays.

    Raises:
        RecipeError: for a class without images, for less than two classes, and for a file in two.
    """
    classes, finder = list_folders(root), Finder(endings=endings)
    if not classes:
        raise RecipeError(f"data: {root} has no class folders. {describe_kind(root)}")
    labels: dict[str, int] = {}
    empty, conflicts = [], []
    for label, name in enumerate(classes):
        links, found = len(finder.linked), finder.find(root / name)
        labels |= dict.fromkeys(found, label)
        conflicts += [pair for pair in finder.linked[links:] if labels[pair[0]] != label]
        if not found:
            empty.append(str(root / name))
    if conflicts:
        raise RecipeError(f"data: {len(conflicts)} files are in two classes, by links: {' is '.join(conflicts[0])}")
    if not labels and endings is ENDINGS and any(Finder(endings=ARRAYS).find(root / name) for name in classes):
        return class_folders(root, ARRAYS)
    left_out = f"; left out: {finder.describe()}" if finder.left_out else ""
    if empty:
        raise RecipeError(f"data: no images in class folder{'s' * (len(empty) > 1)} {', '.join(empty)}{left_out}")
    if len(classes) < 2:
        other = other_reading(root, classes[0])
        raise RecipeError(f"data: {root} has one class, '{classes[0]}'; there must be at least 2{other}")
    check_levels(root, classes)
    for entry in sorted(scan(root), key=lambda entry: entry.name):
        if entry.is_dir() and is_hidden(entry.name):
            finder.leave_out("hidden folders", entry.path)
        elif entry.is_file() and Path(entry.name).suffix.lower() in endings and not is_hidden(entry.name):
            finder.leave_out("images beside the class folders", entry.path)
    if finder.left_out:
        note(f"left out of {root}: {finder.describe()}")
    return ImageList(list(labels), list(labels.values()), read_image), tuple(map(readable, classes))


def other_reading(root: Folder, name: str) -> str:
    """What a folder of one class folder may be meant as, in words."""
    entries = sorted(scan(root), key=lambda entry: entry.name)
    if tables := [entry.path for entry in entries if entry.name.lower().endswith(".csv")]:
        return f". Is there a table of them? --data {tables[0]}"
    if list_folders(root / name):
        return f". Did you mean {root / name}?"
    hidden = [entry.name for entry in entries if entry.is_dir() and is_hidden(entry.name)]
    return f". Hidden folders are no classes: {', '.join(hidden[:3])}" if hidden else ""


def check_levels(root: Folder, classes: Sequence[str]) -> None:
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


def describe_kind(root: Folder) -> str:
    """What a folder without class folders may be instead, and what is wanted."""
    names = sorted(entry.name for entry in scan(root))
    if isinstance(root, RemoteFolder) and any(name.endswith((".tar", ".parquet", ".arrow")) for name in names):
        return "Shards and sets of the package datasets are read from a disk of this machine: copy them first"
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


def find_images(paths: Iterable[str | Path]) -> list[Path | str]:
    """Files as they are named, folders' images (by their endings) however deep, and globs; each path once.

    Of a folder without a picture the arrays.

    Raises:
        RecipeError: for a path that leads to no image.
    """
    found, finder = [], Finder(once=False)
    for path in map(str, paths):
        if not path:
            raise RecipeError("a path is empty: name images, folders or globs")
        images: list[Path | str]
        if is_url(path) and not may_be_folder(path, ENDINGS | ARRAYS):
            images = [find_file(path)]
        elif Path(path).is_dir() or is_url(path) or is_archive(path):
            folder = path if Path(path).is_dir() else list_folder(path)
            images = list(map(as_item, finder.find(folder)))
            if not images and (images := list(map(as_item, Finder(endings=ARRAYS).find(folder)))):
                finder.left_out.clear()
        elif Path(path).exists():
            images = [Path(path)]
        else:  # a bracket may be part of a name
            matches = glob.glob(path, recursive=True) or glob.glob(path.replace("[", "[[]"), recursive=True)
            inside = (
                finder.find(match) if os.path.isdir(match) else [match] * finder.wants(match, Path(match).name)
                for match in matches
            )
            images = [Path(file) for files in inside for file in files]
            if "**" in path:  # which goes round loops of links
                images.sort(key=lambda image: len(str(image)), reverse=True)  # the shortest path of each stays
                images = list({os.path.realpath(image): image for image in images}.values())
        if not images:
            left_out = f"; left out: {finder.describe()}" if finder.left_out else ""
            raise RecipeError(f"no images in {path}{left_out}")
        found += sorted(images, key=lambda image: image if isinstance(image, Path) else as_path(image))
    if finder.left_out:
        note(f"not looked at: {finder.describe()}")
    return list(dict.fromkeys(found))


def note_look_alikes(classes: Sequence[str], where: str) -> None:
    """Say which classes have names that differ only in what can't be seen."""
    if pairs := look_alikes(map(str, classes)):
        shown = ", ".join(" and ".join(spell_out(pair)) for pair in pairs[:5]) + ", ..." * (len(pairs) > 5)
        note(f"data: classes of {where} look alike: {shown}; they are told apart: give them one name if they are the same")


def path_faults(cells: Sequence[str], paths: Sequence[Path | str], rows: Sequence[int]) -> list[str]:
    """A sentence for each thing that is wrong with a table's paths; of URLs, by their text alone."""
    faults = []
    wrong = [(row, why) for row, path in zip(rows, paths, strict=True) if isinstance(path, str) and (why := url_fault(path))]
    if wrong:
        faults.append(f"{len(wrong)} rows have URLs that can't be used, first row {wrong[0][0]}: {wrong[0][1]}")
    local = ((path, cell) for path, cell in zip(paths, cells, strict=True) if isinstance(path, Path))
    if missing := [(path, cell) for path, cell in local if not path.is_file()]:
        shown = ", ".join(str(path) for path, _ in missing[:5]) + ", ..." * (len(missing) > 5)
        why = next(filter(None, (why_missing(*one) for one in missing[:5])), "")
        faults.append(f"{len(missing)} of {len(paths)} files are missing: {shown}{why and f'; {why}'}")
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
