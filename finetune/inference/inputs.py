"""The images that a command names: files, folders, globs, lists and tables of paths."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.data.folders import find_images
from finetune.utils.errors import RecipeError

LISTS = (".csv", ".txt")


def find_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """The images of these paths in their order, each once.

    A .csv has a column of paths, a .txt a path a line, both relative to the file's folder; "-" is a list on stdin. What a list
    names need not be there: it is an image that can't be read, not an error.

    Raises:
        RecipeError: for an address, a list without a path, and what `find_images` refuses.
    """
    found: list[Path] = []
    for path in map(str, paths):
        if "://" in path:
            raise RecipeError(f"{path} is an address: download it first, and name the file")
        if path == "-":
            found += named_in(sys.stdin, "stdin", Path())
        elif path.lower().endswith(LISTS) and Path(path).is_file():
            found += read_list(Path(path))
        else:
            found += find_images([path])
    return list(dict.fromkeys(found))


def read_list(file: Path) -> list[Path]:
    """The paths in a .csv or a .txt."""
    if file.suffix.lower() == ".csv":
        from finetune.data.sources import read_columns  # which takes a second, as torchvision comes with it

        columns, _ = read_columns(file, needed=("path",))
        return named_in(columns["path"], str(file), file.parent)
    try:
        with open(file, encoding="utf-8-sig") as lines:
            return named_in(lines, str(file), file.parent)
    except ValueError as error:
        raise RecipeError(f"can't read {file}: {error}; wanted: a path a line, in UTF-8") from None


def named_in(lines: Iterable[str], where: str, folder: Path) -> list[Path]:
    """The path in each line that is not empty."""
    names = [line.strip() for line in lines]
    if address := next((name for name in names if "://" in name), None):
        raise RecipeError(f"{where} has an address, {address}: download it first, and name the file")
    if not any(names):
        raise RecipeError(f"no paths in {where}")
    return [folder / name for name in names if name]
