"""The images that a command names: files, folders, globs, lists and tables of paths."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from finetune.data.folders import find_images
from finetune.images.remote import find_file, open_text
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder
from finetune.utils.urls import Unreachable, as_path, beside, check_url, is_table, is_url

LISTS = (".csv", ".txt")


def find_inputs(paths: Sequence[str | Path]) -> list[Path | str]:
    """The images of these paths in their order, each once.

    A .csv has a column of paths, a .txt a path a line, both relative to the file's folder; "-" is a list on stdin. All of them
    may be URLs. What a list names need not be there: it is an image that can't be read, not an error.

    Raises:
        RecipeError: for a URL that can't be read, a list without a path, and what `find_images` refuses.
    """
    found: list[Path | str] = []
    for path in map(str, paths):
        if path == "-":
            found += named_in(sys.stdin, "stdin", "list")
        elif as_path(path).suffix.lower() in LISTS and (check_url(path) or Path(path).is_file()):
            found += read_list(path)
        else:
            found += find_images([path])
    return list(dict.fromkeys(found))


def read_list(file: str) -> list[Path | str]:
    """The paths in a .csv or a .txt."""
    if is_table(file):
        from finetune.data.sources import read_columns  # which takes a second, as torchvision comes with it

        columns, _ = read_columns(file, needed=("path",))
        return named_in(columns["path"], file, file)
    try:
        with open_text(file) as lines:
            return named_in(lines, file, file)
    except (Unreachable, ValueError) as error:
        raise RecipeError(f"can't read {file}: {error}; wanted: a path a line, in UTF-8") from None


def named_in(lines: Iterable[str], where: str, file: str) -> list[Path | str]:
    """The path in each line that is not empty; they are relative to the folder of `file`."""
    names = [line.strip() for line in lines]
    if not any(names):
        raise RecipeError(f"no paths in {where}")
    return [find_file(beside(file, name)) for name in names if name]


def part_of(target: Path, number: int = 0, processes: int = 1) -> Path:
    """Where the rows of one of so many processes are until all are done."""
    return target.with_name(f"{target.name}.part" if processes == 1 else f"{target.name}.{number + 1}-of-{processes}.part")


def parts_of(target: Path) -> set[Path]:
    """The rows that are there of predictions that were begun."""
    return set(target.parent.glob(f"{glob.escape(target.name)}*.part"))


def name_pictures(files: Sequence[Path | str], folder: Path, going_on: bool = False) -> list[Path]:
    """A file in the folder for a picture of each image: NAME.png; FOLDER-NAME.png where several images have that name, and
    numbers where that is not enough.

    Raises:
        RecipeError: if the folder can't be written into, or has one of them, unless `going_on`.
    """
    check_folder(folder)
    places = [as_path(file) if is_url(file) else Path(file).absolute() for file in files]
    often = Counter(file.stem.casefold() for file in places)  # not every disk tells upper case from lower
    taken, named = set[str](), list[Path]()
    for file in places:
        name = file.stem if often[file.stem.casefold()] == 1 else f"{file.parent.name}-{file.stem}"
        name = os.fsdecode(os.fsencode(name)[:200])  # with its ending, and while it is written, no longer than names may be
        if name.casefold() in taken:
            name = next(one for one in (f"{name}-{i}" for i in count(2)) if one.casefold() not in taken)
        taken.add(name.casefold())
        named.append(folder / f"{name}.png")
    there = [] if going_on else [file for file in named if os.path.lexists(file)]
    if there:
        raise RecipeError(f"{folder} has {len(there)} of these pictures already, such as {there[0].name}: name another folder")
    return named
