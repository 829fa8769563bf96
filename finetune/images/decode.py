"""What Pillow reads of a file, as upright 8-bit RGB pixels."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from finetune.images.remote import Fetched, here

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
Image.init()  # names every format that this Pillow knows
NO_DECODER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow tells their size, or needs another program
ENDINGS = frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - NO_DECODER)
UNUSED_ALPHA = {"BMP", "DIB", "TGA"}  # formats of which many files have a fourth byte that says nothing: 0 everywhere
# Tried first, by a file's ending: each knows its own files by their first bytes, and Pillow would ask twenty others before.
LIKELY = {end: (kind,) for end, kind in Image.registered_extensions().items() if kind in {"JPEG", "PNG", "WEBP", "GIF", "BMP"}}
TURNS = {  # by the number in EXIF's orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, BLACK_AND_WHITE, NUMBERS = 258, 262, 339  # tags of a TIFF: BitsPerSample, PhotometricInterpretation, SampleFormat


def open_file(path: Any) -> Image.Image:
    """Pillow's image of a file, not decoded yet; a pipe, which could keep it waiting for ever, is refused."""
    path = here(path)
    if isinstance(path, Fetched):
        ending = path.suffix.lower()
    elif stat.S_ISREG(os.stat(path).st_mode):
        ending = os.path.splitext(path)[1].lower()
    else:
        raise OSError("it is a folder, a pipe or a device")
    with silent():
        try:
            image = Image.open(path, formats=LIKELY.get(ending))
        except UnidentifiedImageError:
            image = Image.open(path)  # by its content, whatever it is called
    if image.format == "TIFF":
        image.filename = ""  # by its name Pillow would map raw pixels into memory, with the sides of the turned image
    return image


@contextmanager
def silent() -> Iterator[None]:
    """Within, no warnings of Pillow: they name no file, and are of what is read all the same, such as damaged EXIF data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """The image upright, in 8 bits, with what is transparent on `background`; an upright 8-bit image keeps its pixels.

    Raises:
        ValueError: for values of which none is known to be white.
    """
    image.load()  # a TIFF turns itself here, and forgets its orientation
    turn = TURNS.get(orientation(image))
    if image.mode == "F":
        image = floats_to_8_bits(image)
    elif image.mode.startswith("I"):
        image = integers_to_8_bits(image)
    elif image.has_transparency_data:
        unused, image = image.format in UNUSED_ALPHA, image.convert("RGBA")
        if not unused or image.getchannel("A").getbbox():
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    image.info = {}  # with the orientation in it, the next reader would turn it again
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> Any:
    """The number in its EXIF data, or None.

    ImageOps.exif_transpose would write all other tags anew, and fail on damaged ones.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged: viewers show the image as it is stored
        return None


def integers_to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits, by the highest bits, as Pillow itself reads 16-bit colours.

    White is the highest number of its type, or of the bits that a TIFF says it uses. An image of 32 bits is read as one of 16.
    """
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.int64)
    bits = tags.get(BITS, (16,))[0] - (tags.get(NUMBERS, (1,))[0] == 2)  # one is the sign
    white = 2 ** min(bits, 16) - 1
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > white:
        raise ValueError(f"its values go from {low} to {high}, where 0 is black and {white} white: save it in 8 or 16 bits")
    if tags.get(BLACK_AND_WHITE) == 0:  # 0 is white; Pillow turns only 8 bits round
        values = white - values
    return Image.fromarray((values * 256 // (white + 1)).astype(np.uint8))


def floats_to_8_bits(image: Image.Image) -> Image.Image:
    """An image of floats from 0, black, to 1, white."""
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"its floats go from {low:g} to {high:g}, not from 0 to 1: save it in 8 or 16 bits")
    return Image.fromarray((values * 255).round().astype(np.uint8))
