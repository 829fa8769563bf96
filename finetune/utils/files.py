"""Files and folders that are written whole or not at all, and JSON files that may have been cut."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.utils.errors import RecipeError

SAMPLE = 16384  # bytes at each end of a file that tell it from others of its size
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # by CIFS and FUSE, which say so of folders above all


# What a disk or a folder, and no fault of a program, makes of reading and writing.
REFUSED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)


def data_folder() -> Path:
    """The folder for downloads."""
    return Path(os.environ.get("FINETUNE_DATA", Path.home() / ".cache" / "finetune"))


def cache_folder() -> Path:
    """The folder for what can be found out again: that of XDG_CACHE_HOME, by default ~/.cache/finetune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def check_folder(folder: Path) -> None:
    """Raise RecipeError unless files can be written into a folder, or it can be made."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise RecipeError(f"{folder}: {there} is a file, not a folder; name another")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RecipeError(f"{folder}: no right to write into {there}; name another folder")
        for name in folder.absolute().relative_to(there).parts:
            check_name(there / name)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise RecipeError(f"{folder}: {error.strerror}; name another folder") from error
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:  # a full disk, or /proc, which root has the right to write into
        raise RecipeError(f"{folder}: {there} can't hold files ({error.strerror}); name another folder") from error


def check_new(target: Path, ending: str) -> None:
    """Raise RecipeError unless a file of that ending can be written there without overwriting anything."""
    check_folder(target.parent)
    there = os.path.exists(target)  # which raises nothing, of a name that is too long
    if there or target.suffix.lower() != ending:
        raise RecipeError(f"{target} is {'there already' if there else f'no {ending} file'}: name another")
    try:
        check_name(target)
    except OSError as error:
        raise RecipeError(f"{target}: {error.strerror}; name another") from error
    if not target.parent.is_dir():
        raise RecipeError(f"no folder {target.parent}: make it first, or name another")


def check_name(path: Path) -> None:
    """Raise OSError for a name that can't be, such as one that is too long, also while it is written aside."""
    for name in (path, aside_of(path)):
        with suppress(FileNotFoundError):
            name.lstat()


def aside_of(path: Path) -> Path:
    """Where a file or folder is until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def write_file(file: Path, content: bytes | str) -> None:
    """Write a file aside, flush it to the disk and rename it: after a power cut, too, there is the old one or the new one."""
    aside = aside_of(file)
    try:
        aside.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        flush(aside)
        aside.replace(file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()  # half a file on a full disk only fills it
        error.filename = str(file)
        raise
    flush(file.parent)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder aside, flush it to the disk and rename it: a killed process never leaves half of one.

    A folder that is there already is moved away first, and for that moment there is none.
    """
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True)
        flush(folder.parent.parent)
    aside.mkdir()
    try:
        write(aside)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)  # half a folder on a full disk only fills it
        error.filename = error.filename or str(folder)
        raise
    for path in [*aside.iterdir(), aside]:
        flush(path)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():  # a rename can't replace a folder that holds files
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk, where the system and the file system know how to."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises RecipeError if it holds none, such as one that was cut as the power failed."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RecipeError(f"can't read {file}: {error}") from error


def file_digest(path: str | Path) -> str:
    """A digest of a file's size and of its two ends, which tell images apart; "" if it can't be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            ends = file.read(SAMPLE)
            file.seek(max(SAMPLE, size - SAMPLE))
            return hashlib.blake2b(ends + file.read(), key=str(size).encode(), digest_size=16).hexdigest()
    except OSError:
        return ""
