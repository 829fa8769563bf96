"""Decoded images kept in memory, or on a disk, for all processes of a machine."""

import mmap
import multiprocessing
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if sys.platform != "win32":
    import fcntl

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux's, another each time that the machine starts
CHUNK = 2**26  # bytes of a disk that are taken at a time
HEADER, USED, ROOM, FLUSHED, BOOT = 4, 0, 1, 2, 3  # numbers before the places of a cache, and which is which
CACHE_LIMIT = 2**30  # bytes of each set on one machine; what has no room is decoded again each time


class PixelKind(NamedTuple):
    """What all images of a set have in common."""

    channels: int = 3
    dtype: str = "uint8"  # of their numbers


PHOTOGRAPHS = PixelKind()


class ImageCache:
    """Pixels [H, W, channels] of up to `num_images` images, in memory shared with the loader processes forked from this one.

    No memory is used before an image is kept.
    """

    def __init__(self, num_images: int, limit: int | None = None, kind: PixelKind = PHOTOGRAPHS):
        """`limit` in bytes; by default 1 GiB divided by the training processes of this machine."""
        self.kind = kind
        self.limit = CACHE_LIMIT // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if limit is None else limit
        self.lay_out(mmap.mmap(-1, max(self.limit, 1)), mmap.mmap(-1, 8 * (HEADER + 3 * num_images)))
        self.lock: AbstractContextManager[Any] = multiprocessing.Lock()

    def lay_out(self, pixels: mmap.mmap, places: mmap.mmap) -> None:
        """Take this memory for the pixels, one image after the other, and for where each ends, its height and its width."""
        self.memory, numbers = (pixels, places), np.frombuffer(places, np.int64)
        self.header, self.places = numbers[:HEADER], numbers[HEADER:].reshape(-1, 3)
        self.pixels = np.frombuffer(pixels, np.uint8)

    def has(self, index: int) -> bool:
        """Whether the image is kept."""
        return bool(self.places[index, 0])

    def get(self, index: int) -> np.ndarray | None:
        """The image, if it is kept."""
        end, height, width = self.places[index]
        if not end:
            return None
        channels, dtype = self.kind
        size = int(height * width) * channels * np.dtype(dtype).itemsize
        return self.pixels[end - size : end].view(dtype).reshape(height, width, channels)

    def keep(self, index: int, pixels: np.ndarray) -> None:
        """Keep the image, if there is room."""
        with self.lock:
            if self.places[index, 0] or not self.has_room(end := int(self.header[USED]) + pixels.nbytes):
                return
            self.header[USED], self.header[FLUSHED] = end, 0
        self.pixels[end - pixels.nbytes : end] = pixels.reshape(-1).view(np.uint8)
        self.places[index, 1:] = pixels.shape[:2]
        self.places[index, 0] = end  # last: from here on others may read it
        self.header[FLUSHED] = 0

    def has_room(self, end: int) -> bool:
        """Whether so many bytes may be used."""
        return end <= self.limit


class DiskCache(ImageCache):
    """The same in two files, which later runs and the other processes of this one share.

    A killed process takes nothing with it that others rely on. After the machine has started anew, what a run had not
    flushed is forgotten: a power cut may have kept an image's place, and not its pixels.
    """

    def __init__(self, file: Path, num_images: int, limit: int, kind: PixelKind = PHOTOGRAPHS):
        """`limit` in bytes of the disk, for the pixels. Raises OSError if the disk can't be used so."""
        self.kind = kind
        self.file, self.limit, boot = file, limit, int(BOOT_ID.read_text().replace("-", "")[:15], 16)
        file.parent.mkdir(parents=True, exist_ok=True)
        names = (file.with_suffix(end) for end in (".pixels", ".places"))
        self.opened = pixels, places = [open(name, "a+b") for name in names]  # noqa: SIM115
        self.lock = FileLock(places.fileno())
        with self.lock:
            os.truncate(places.fileno(), size := 8 * (HEADER + 3 * num_images))
            os.truncate(pixels.fileno(), room := max(limit, os.fstat(pixels.fileno()).st_size, 1))
            self.lay_out(mmap.mmap(pixels.fileno(), room), mmap.mmap(places.fileno(), size))
            if not self.header[FLUSHED] and self.header[BOOT] != boot:
                self.places[:], self.header[:] = 0, 0
            self.header[BOOT] = boot
            os.truncate(pixels.fileno(), int(self.header[ROOM]))  # what is mapped beyond has_room() makes before it is used

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskCache, (self.file, len(self.places), self.limit, self.kind)

    def has_room(self, end: int) -> bool:
        """Whether so many bytes may be used, and the disk has them: writing past its end would end the process."""
        start = int(self.header[ROOM])
        if start < end <= self.limit:
            room = min(self.limit, max(end, start + CHUNK))
            try:
                os.posix_fallocate(self.opened[0].fileno(), start, room - start)
                self.header[ROOM] = room
            except OSError:
                return False
        return end <= self.limit

    def flush(self) -> None:
        """Bring it to the disk."""
        pixels, places = self.memory
        pixels.flush()
        places.flush()
        self.header[FLUSHED] = 1
        places.flush()


class FileLock:
    """Held by one process at a time, of all on a machine that have the file open."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN)


def image_cache(num_images: int, kind: PixelKind = PHOTOGRAPHS) -> ImageCache | None:
    """A cache for so many images, or none where a limit (ulimit -v, a full /dev/shm) leaves no room for it."""
    try:
        return ImageCache(num_images, kind=kind)
    except OSError:
        return None
