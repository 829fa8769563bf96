"""Files in a .zip, read in place."""

import os
import tempfile
import zipfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from finetune.utils.errors import RecipeError
from finetune.utils.files import data_folder
from finetune.utils.net import ask, version_in
from finetune.utils.text import note
from finetune.utils.urls import Unreachable, check_url


class Archive(NamedTuple):
    opened: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]  # by their paths in it


def open_archive(file: str) -> Archive:
    """A .zip, kept open by this process for as long as it stays the same; raises RecipeError if it can't be read."""
    try:
        known = os.stat(file)
        return open_once(file, (known.st_mtime_ns, known.st_size, os.getpid()))  # a forked process would share its place
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise RecipeError(f"can't read {file}: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(8)
def open_once(file: str, key: tuple[int, int, int]) -> Archive:
    opened = zipfile.ZipFile(file)
    return Archive(opened, {info.filename.strip("/"): info for info in opened.infolist() if not info.is_dir()})


def read_member(file: str, name: str, end: int | None = None) -> bytes:
    """The content of a file in a .zip, or its first bytes; raises Unreachable."""
    opened, members = open_archive(file)
    try:
        with opened.open(members[name]) as member:
            return member.read() if end is None else member.read(end)
    except KeyError:
        raise Unreachable("it is not in the archive") from None
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: it is encrypted
        raise Unreachable(str(error)) from None


def member_info(file: str, name: str) -> dict[str, Any]:
    """Size and checksum of a file in a .zip; raises Unreachable."""
    if (info := open_archive(file).members.get(name)) is None:
        raise Unreachable("it is not in the archive")
    return {"size": info.file_size, "CRC": info.CRC}


def members_below(file: str, folder: str) -> dict[str, dict[str, Any]]:
    """The same of all files below a folder of a .zip, by their paths there."""
    start = f"{folder}/" if folder else ""
    names = (name for name in open_archive(file).members if name.startswith(start))
    return {name[len(start) :]: member_info(file, name) for name in names}


def archive_here(archive: str) -> str:
    """The path of a .zip on this machine: one that lies elsewhere is first copied to the folder for downloads.

    Raises:
        Unreachable, RecipeError: if it can't be had, or there is no room for it.
    """
    if not check_url(archive):
        return archive
    if (file := copy_of(archive)).is_file():
        return str(file)
    note(f"{archive}: copied to {file} first")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # a copy that breaks off goes with it
            aside = os.path.join(folder, file.name)
            ask(archive, "get_file", aside, seconds=None)
            os.replace(aside, file)
    except Unreachable:
        raise
    except OSError as error:
        raise RecipeError(f"can't copy {archive} to {file}: {error.strerror}; FINETUNE_DATA names another folder") from error
    return str(file)


@cache
def copy_of(archive: str) -> Path:
    """Where the copy of a .zip lies, if there is one; by its version, which is asked for once."""
    version = version_in(ask(archive, "info"), archive)
    return data_folder() / "archives" / f"{version}.zip"
