"""Images that lie elsewhere: listed, looked up and fetched, several at once."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from finetune.images.archive import archive_here, copy_of, member_info, members_below, read_member
from finetune.utils.cores import on_all_cores
from finetune.utils.errors import RecipeError
from finetune.utils.files import file_digest
from finetune.utils.net import ask, file_system, version_in
from finetune.utils.text import progress
from finetune.utils.urls import WEB, Unreachable, as_path, check_url, is_archive, is_url, join_url, split_url, tidy

AT_ONCE = 32  # files that are asked for at the same time
HEADER = 2**16  # bytes in which the headers of nearly all images end
SOME = 256  # whose answers wait in memory
AHEAD: dict[str, "bytes | Unreachable"] = {}  # the files of `ahead`, or why they can't be had
Values = Sequence[Any] | np.ndarray
HOPELESS = 10  # files that could not be had at three tries each, after which no other is asked for


class RemoteFile(str):
    """The URL of a file, and what changes with its content: `version`, None until that is known; an entry of a folder."""

    version: str | None = None  # "" where it can't be had
    archive = ""  # where the .zip that it is in lies on this machine

    @property
    def name(self) -> str:
        return as_path(self).name

    @property
    def path(self) -> "RemoteFile":
        return self

    def is_dir(self) -> bool:
        return False

    def is_file(self, follow_symlinks: bool = True) -> bool:
        return True

    def inode(self) -> int:
        return id(self)


class RemoteFolder(str):
    """The URL of a folder, with its `entries` by their names, which have what os.DirEntry has."""

    entries: dict[str, Any]

    @property
    def name(self) -> str:
        return as_path(self).name

    @property
    def path(self) -> "RemoteFolder":
        return self

    def is_dir(self) -> bool:
        return True

    def is_file(self, follow_symlinks: bool = True) -> bool:
        return False

    def __truediv__(self, name: str) -> "RemoteFolder":
        return self.entries[name]


class Fetched(io.BytesIO):
    """The content of a file that lies elsewhere; of a `part` the first bytes."""

    def __init__(self, url: str, content: bytes, part: bool = False):
        super().__init__(content)
        self.url, self.suffix, self.part = url, as_path(url).suffix, part

    def __str__(self) -> str:
        return self.url


def as_item(path: str) -> Path | str:
    """What is found in a folder: a path, or a URL as it is."""
    return path if is_url(path) else Path(path)


def may_be_folder(url: str, endings: frozenset[str]) -> bool:
    """Whether a URL that a person names is not that of a file with one of these endings; on the web only a .zip is a folder."""
    return is_archive(url) or split_url(url)[0] not in WEB and as_path(url).suffix.lower() not in endings


def here(item: Any) -> Any:
    """A path, or what was fetched, as it is; the content of what lies elsewhere."""
    return Fetched(item, fetch(item)) if is_url(item) else item


def scan(folder: Any) -> Any:
    """The entries of a folder, here or elsewhere, as os.scandir gives them."""
    return folder.entries.values() if isinstance(folder, RemoteFolder) else os.scandir(folder)


def fetch(url: str, end: int | None = None) -> bytes:
    """The content of a file, or its first bytes; raises Unreachable."""
    if isinstance(found := AHEAD.get(url, b""), Unreachable):
        raise found
    if found:
        return found
    protocol, path, archive = split_url(url)
    if protocol == "zip":
        return read_member(getattr(url, "archive", "") or archive_here(archive), path, end)
    return ask(url, "cat_file") if end is None else ask(url, "cat_file", start=0, end=end)


def open_text(file: str | Path) -> TextIO:
    """A text file in UTF-8, here or elsewhere."""
    if not is_url(file):
        return open(file, newline="", encoding="utf-8-sig")
    check_url(file)
    return io.TextIOWrapper(Fetched(file, fetch(file)), newline="", encoding="utf-8-sig")


def ahead(items: Values, indices: Sequence[int]) -> Iterator[int]:
    """The indices, each while its item, if it lies elsewhere, is there already: so many are fetched at the same time."""
    for start in range(0, len(indices), AT_ONCE):
        some = indices[start : start + AT_ONCE]
        urls = [items[i] for i in some if len(items) and is_url(items[i]) and not getattr(items[i], "archive", "")]
        if len(urls) > 1:
            AHEAD.update(zip(urls, at_once(fetch, urls), strict=False))
        try:
            yield from some
        finally:
            AHEAD.clear()


def at_once(function: Any, files: Sequence[str], text: str = "", shown: bool = False) -> Iterator[Any]:
    """What a function says of each file, or the Unreachable that it raises, in their order; many are asked at once.

    Where servers fail again and again, it ends early.
    """

    def tried(file: str) -> Any:
        try:
            return function(file)
        except Unreachable as error:
            return error

    failed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool, progress(None, len(files), text, shown) as bar:
        for start in range(0, len(files), SOME):
            for found in pool.map(tried, files[start : start + SOME]):
                yield found
                bar.update(1)
                failed += isinstance(found, Unreachable) and not found.lasting
            if failed >= HOPELESS:
                return


def first_bytes(urls: Sequence[str]) -> Iterator[Fetched | Unreachable]:
    """The start of each file, with its header, or why it can't be had; where servers fail again and again, it ends early."""
    for url, start in zip(urls, at_once(lambda url: fetch(url, HEADER), urls), strict=False):
        yield start if isinstance(start, Unreachable) else Fetched(url, start, part=len(start) == HEADER)


def version_of(url: str) -> str:
    """What changes with a file's content: of its size and checksum, or else of its URL, its size and when it was written."""
    if (known := getattr(url, "version", None)) is not None:
        return str(known)
    protocol, path, archive = split_url(url)
    if protocol == "zip":
        return version_in(member_info(archive_here(archive), path), url)
    return version_in(ask(url, "info"), url)


def look_up(files: Iterable[Any], shown: bool = False) -> dict[str, Unreachable]:
    """Learn the version of those that lie elsewhere, where it is not known; returns why for those that can't be had."""
    unknown = [file for file in files if isinstance(file, RemoteFile) and file.version is None]
    faults, answers = dict[str, Unreachable](), at_once(version_of, unknown, "asking for the images", shown)
    for file in unknown:
        found = next(answers, "")
        if isinstance(found, Unreachable):
            faults[file] = found
        file.version = "" if isinstance(found, Unreachable) else found
    return faults


def image_digest(item: Any) -> str:
    """What tells an image's file from others, and changes with its content; "" if it can't be had."""
    if not is_url(item):
        return file_digest(item)
    with suppress(Unreachable):
        return version_of(item)
    return ""


def image_digests(items: Values) -> list[str]:
    """The same of many."""
    look_up(items)
    files = on_all_cores(file_digest, [item for item in items if not is_url(item)])
    return [image_digest(item) if is_url(item) else next(files) for item in items]


def find_file(item: str | Path) -> Path | RemoteFile:
    """A file by its URL, which is checked; nobody is asked for it, but for the archive that it is in. A path as it is."""
    if not check_url(item):
        return Path(item)
    protocol, path, archive = split_url(str(item))
    file = RemoteFile(join_url(protocol, path, archive))
    if protocol == "zip":
        file.archive = archive_here(archive)
    return file


def list_folder(source: str) -> RemoteFolder:
    """A folder, or a .zip, with all that is below it.

    Raises:
        RecipeError: if there is nothing, it can't be had, or is on the web, where folders have no lists.
    """
    url = tidy(source)
    check_url(url)
    protocol, path, archive = split_url(url)
    if protocol in WEB:
        raise RecipeError(f"{source} would be a folder, and web servers list none: name a .csv of URLs, or a .zip")
    try:
        if protocol == "zip":
            copy_of.cache_clear()  # it may have changed since
            file = archive_here(archive)
            found = members_below(file, path)
        else:
            file, system = "", file_system(protocol)
            system.invalidate_cache()
            place = system._strip_protocol(join_url(protocol, path))
            listed = ask(url, "find", detail=True, seconds=None)
            found = {name[len(place) :].lstrip("/"): about for name, about in listed.items() if name != place}
    except Unreachable as error:
        raise RecipeError(f"can't list {source}: {error}") from None
    root = new_folder(url)
    for name, about in sorted(found.items()):
        if about.get("type", "file") == "file" and not name.endswith("/"):
            add_file(root, name, version_in(about, join_url(protocol, f"{path}/{name}".lstrip("/"), archive)), file)
    if not root.entries:
        raise RecipeError(f"{source} is empty, or not there")
    return root


def new_folder(url: str) -> RemoteFolder:
    folder = RemoteFolder(url)
    folder.entries = {}
    return folder


def add_file(root: RemoteFolder, name: str, version: str, archive: str) -> None:
    """Put a file into its folder below the root, which is made if need be."""
    protocol, path, outer = split_url(root)
    *folders, last = name.split("/")
    folder, places = root, [path]
    for part in folders:
        places.append(part)
        if not isinstance(folder.entries.get(part), RemoteFolder):
            folder.entries[part] = new_folder(join_url(protocol, "/".join(filter(None, places)), outer))
        folder = folder.entries[part]
    file = RemoteFile(join_url(protocol, "/".join(filter(None, [*places, last])), outer))
    file.version, file.archive = version, archive
    folder.entries[last] = file
