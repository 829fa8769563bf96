"""What was found out about files before, so that a later start need not open each of them again."""

import hashlib
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from finetune.utils.files import cache_folder, write_file

FEW = 10_000  # files, which are opened within a second
SETTLED = 2_000_000_000  # ns after a change, before which a second change might go unseen
STAMP = [("path", np.uint32), ("inode", np.uint64), ("size", np.int64), ("changed", np.int64)]
ROW = np.dtype([*STAMP, ("digest", "V16")])


class KnownFiles:
    """The digests of files that were in order when they were last looked into, and have not changed since.

    A file is the same if its path, its number on the disk, its size and its time of change are: no program sets the last. Of
    few files, and where the system does not know that time, nothing is kept.
    """

    def __init__(self, files: Sequence[str | Path], question: str):
        """`question` says what was looked for: the answers to another are others."""
        self.number, self.now = len(files), time.time_ns()
        self.digests = [""] * self.number
        self.stamps = np.zeros(0, ROW)
        try:
            kept = cache_folder() / "files"
        except RuntimeError:  # no home folder is known
            return
        if self.number < FEW or os.name != "posix":
            return
        self.stamps = np.fromiter(map(stamp_of, files), ROW, self.number)
        folder = os.path.commonpath([os.path.abspath(files[0]), os.path.abspath(files[-1])])
        name = hashlib.blake2b(f"{folder}\n{question}".encode(errors="surrogateescape"), digest_size=8).hexdigest()
        self.file = kept / f"{name}.npy"
        with suppress(OSError, ValueError, EOFError):  # not there, or damaged
            self.recall(np.load(self.file))

    def recall(self, kept: np.ndarray) -> None:
        """Take the digests of those that are kept as they are now."""
        if kept.dtype != ROW or not len(kept):
            return
        places = np.searchsorted(kept["inode"], self.stamps["inode"]).clip(max=len(kept) - 1)
        same = np.logical_and.reduce([kept[name][places] == self.stamps[name] for name, _ in STAMP])
        text = kept["digest"][places].tobytes().hex()
        self.digests = [text[32 * i : 32 * i + 32] if known else "" for i, known in enumerate(same.tolist())]

    def keep(self, digests: Sequence[str]) -> None:
        """Keep the digests of all, "" of one that is not in order, if there are new ones."""
        if not len(self.stamps) or digests == self.digests:
            return
        self.stamps["digest"] = np.frombuffer(bytes.fromhex("".join(digest or "0" * 32 for digest in digests)), "V16")
        usable = np.array([bool(digest) for digest in digests]) & (self.stamps["changed"] < self.now - SETTLED)
        np.save(content := BytesIO(), np.sort(self.stamps[usable], order="inode"))
        with suppress(OSError):  # a full disk, or no right to write there: it is looked for again
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, content.getvalue())


def stamp_of(file: str | Path) -> tuple[int, int, int, int, bytes]:
    """What changes with a file, and no digest; zeros for one that is not there."""
    try:
        known = os.stat(file)
    except OSError:
        return 0, 0, 0, 0, b""
    path = zlib.crc32(os.fsencode(file))
    return path, known.st_ino, known.st_size, known.st_ctime_ns, b""
