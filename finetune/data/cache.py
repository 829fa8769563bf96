"""Decoded images, kept in memory from one epoch to the next."""

import mmap
import multiprocessing
import os

import numpy as np

LIMIT = 2**30  # bytes of each set on one machine; what has no room is decoded again each time


class ImageCache:
    """Pixels [H, W, 3] of up to `num_images` images, in memory shared with the loader processes forked from this one.

    No memory is used before an image is kept.
    """

    def __init__(self, num_images: int, limit: int | None = None):
        """`limit` in bytes; by default 1 GiB divided by the training processes of this machine."""
        self.limit = LIMIT // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if limit is None else limit
        self.pixels = np.frombuffer(mmap.mmap(-1, max(self.limit, 1)), np.uint8)
        self.places = np.frombuffer(mmap.mmap(-1, max(24 * num_images, 1)), np.int64, 3 * num_images).reshape(num_images, 3)
        self.used = multiprocessing.Value("q", 0)

    def get(self, index: int) -> np.ndarray | None:
        """The image, if it is kept."""
        end, height, width = self.places[index]
        return self.pixels[end - 3 * height * width : end].reshape(height, width, 3) if end else None

    def keep(self, index: int, pixels: np.ndarray) -> None:
        """Keep the image, if there is room."""
        with self.used.get_lock():
            if self.used.value + pixels.size > self.limit:
                return
            self.used.value += pixels.size
            end = self.used.value
        self.pixels[end - pixels.size : end] = pixels.reshape(-1)
        self.places[index, 1:] = pixels.shape[:2]
        self.places[index, 0] = end  # last: from here on others may read it


def image_cache(num_images: int) -> ImageCache | None:
    """A cache for so many images, or none where a limit (ulimit -v, a full /dev/shm) leaves no room for it."""
    try:
        return ImageCache(num_images)
    except OSError:
        return None
