"""Images of any number of channels as arrays of their own numbers: grey pictures, .npy, TIFF, DICOM."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.images.decode import TURNS, WHITE, Colour, open_file, orientation, silent, to_rgb
from finetune.images.remote import Fetched, here
from finetune.utils.errors import RecipeError

ENDINGS = frozenset({".npy", ".tif", ".tiff", ".dcm"})  # beside those of Pillow's images
MAGIC = {  # the first bytes of a file, or those after 128, and what reads it
    (0, b"\x93NUMPY"): "numpy",
    (0, b"II*\0"): "tifffile",
    (0, b"MM\0*"): "tifffile",
    (0, b"II+\0"): "tifffile",  # more than 4 GB
    (0, b"MM\0+"): "tifffile",
    (128, b"DICM"): "pydicom",
}
File = Path | Fetched
EXACT = 2**24  # integers up to here are floats of 32 bits as well
KEPT = (np.uint8, np.uint16, np.int16, np.float32)


def read_array(item: Any, channels: int, load: Callable[[Any], Any] = open_file, background: Colour = WHITE) -> np.ndarray:
    """The numbers of an image, [H, W, channels]: uint8, uint16, int16 or float32, as they come; others become float32.

    `item` is a file, whose content says what reads it, or whatever `load` makes a PIL image or an array of. Of pictures one
    channel is grey, three are red, green and blue. Arrays are [H, W], [H, W, channels] or [channels, H, W].

    Raises:
        RecipeError: where a package is missing.
        Exception: of any kind, from whatever reads the file; ValueError for another number of channels.
    """
    item = here(item)
    file: File | None = Path(item) if isinstance(item, str | Path) else item if isinstance(item, Fetched) else None
    reader = reader_of(file) if file else ""
    values: Any = READERS[reader](file) if file and reader else (open_file if isinstance(file, Fetched) else load)(item)
    if isinstance(values, Image.Image):
        with silent():
            values = picture_values(values, channels, background)
    return as_numbers(as_channels(np.asarray(values), channels))


def reader_of(file: File) -> str:
    """Which package reads a file that Pillow does not: "numpy", "tifffile" or "pydicom"; "" for all else."""
    if isinstance(file, Fetched):
        start = bytes(file.getbuffer()[:132])
    else:
        with open(file, "rb") as lines:
            start = lines.read(132)
    found = next((name for (at, magic), name in MAGIC.items() if start[at:].startswith(magic)), "")
    found = found or ("pydicom" if file.suffix.lower() == ".dcm" else "")
    if found and importlib.util.find_spec(found) is None:
        raise RecipeError(f'{file} is read by {found}, which is not installed: pip install "finetune-recipes[channels]"')
    return found


def shape_of(file: File) -> tuple[int, ...]:
    """The shape of a file's numbers by its header alone."""
    reader = reader_of(file)
    if reader == "numpy":
        mode: Any = None if isinstance(file, Fetched) else "r"
        return np.load(file, mmap_mode=mode, allow_pickle=False).shape
    if reader == "tifffile":
        import tifffile

        with tifffile.TiffFile(file) as tiff:
            return tuple(tiff.series[0].shape)
    if reader == "pydicom":
        import pydicom

        about = pydicom.dcmread(file, stop_before_pixels=True, force=file.suffix.lower() == ".dcm")
        frames, samples = int(about.get("NumberOfFrames") or 1), int(about.get("SamplesPerPixel") or 1)
        return tuple(number for number in (frames, about.Rows, about.Columns, samples) if number > 1)
    with open_file(file) as image:
        width, height = image.size
        return height, width, len(image.getbands())


def check_shape(file: File, channels: int) -> None:
    """Raise an error of any kind unless a file's header has so many channels; a picture may become one or three."""
    shape = shape_of(file)
    if reader_of(file) or channels not in (1, 3):
        as_channels(np.broadcast_to(np.uint8(0), shape), channels)


def read_npy(file: File) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def read_tiff(file: File) -> np.ndarray:
    """The first series of a TIFF, or its pages; where 0 is white it is turned round."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        values, page = tiff.series[0].asarray(), tiff.pages[0]
        white_is_0 = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        bits = page.bitspersample
    return (2**bits - 1 - values.astype(np.int64)).astype(values.dtype) if white_is_0 and values.dtype.kind == "u" else values


def read_dicom(file: File) -> Any:
    """A DICOM image in its own units, such as Hounsfield's, as float32; a coloured one as a picture."""
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut, convert_color_space

    data = pydicom.dcmread(file, force=file.suffix.lower() == ".dcm")
    values, kind = data.pixel_array, str(data.PhotometricInterpretation)
    if int(data.get("SamplesPerPixel") or 1) == 3:
        return Image.fromarray(values if kind == "RGB" else convert_color_space(values, kind, "RGB"))
    if kind == "MONOCHROME1":  # the lowest number is white
        highest = -1 if data.PixelRepresentation else 2**data.BitsStored - 1
        values = highest - values.astype(np.int64)
    return np.asarray(apply_modality_lut(values, data), np.float32)


READERS: dict[str, Callable[[File], Any]] = {"numpy": read_npy, "tifffile": read_tiff, "pydicom": read_dicom}


def picture_values(image: Image.Image, channels: int, background: Colour) -> np.ndarray:
    """The numbers of a PIL image, upright: for one channel grey, with all of its bits; of four the transparency as well."""
    image.load()
    deep = image.mode == "F" or image.mode.startswith("I")
    if channels == 3 or channels == 1 and not deep:
        return np.asarray(to_rgb(image, background).convert("L" if channels == 1 else "RGB"))
    turn = TURNS.get(orientation(image))
    values = np.asarray(image if turn is None else image.transpose(turn))
    if values.dtype.kind == "i" and values.min() >= 0 and values.max() < 2**16:  # Pillow's form of 16 bits
        return values.astype(np.uint16)
    return values


def as_channels(values: np.ndarray, channels: int) -> np.ndarray:
    """The array as [H, W, channels].

    Raises:
        ValueError: if it has another number of channels.
    """
    values = values.squeeze() if values.ndim > 3 else values
    if channels == 1 and values.ndim == 2:
        return values[:, :, None]
    if values.ndim == 3 and values.shape[2] == channels:
        return values
    if values.ndim == 3 and values.shape[0] == channels:
        return values.transpose(1, 2, 0)
    shape = " x ".join(map(str, values.shape))
    raise ValueError(f"its numbers are {shape}, of which neither the first nor the last are channels={channels}")


def as_numbers(values: np.ndarray) -> np.ndarray:
    """The numbers in a type that is kept, in this machine's order of bytes.

    Raises:
        ValueError: for what is no number, or not exactly one of 32 bits.
    """
    if values.dtype.kind == "b":
        return np.ascontiguousarray(values, np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise ValueError(f"it holds {values.dtype}, not numbers")
    native = values.dtype.newbyteorder("=")
    if native in KEPT:
        kept = np.ascontiguousarray(values, native)
    elif values.dtype.kind == "f" or np.abs(values.astype(np.float64)).max() <= EXACT:
        kept = np.ascontiguousarray(values, np.float32)
    else:
        raise ValueError(f"it holds {values.dtype} beyond 16,777,216, which floats of 32 bits can't tell apart")
    if kept.dtype.kind == "f" and not np.isfinite(kept).all():
        raise ValueError(f"{int((~np.isfinite(kept)).sum())} of its numbers are NaN or infinite: fill them, or leave it out")
    return kept


def as_picture(values: np.ndarray) -> Image.Image:
    """An array [H, W, channels] to look at: its only channel, or its first three.

    They are stretched from the 2nd to the 98th percentile, but for one channel of 8 bits, which is shown as it is.
    """
    shown = values[:, :, :3] if values.shape[2] >= 3 else values[:, :, :1]
    if values.dtype != np.uint8 or values.shape[2] != 1:
        low, high = np.percentile(shown, (2, 98), axis=(0, 1), keepdims=True)
        shown = ((shown - low) / np.maximum(high - low, 1e-12)).clip(0, 1) * 255
    shown = shown.astype(np.uint8)
    return Image.fromarray(shown if shown.shape[2] == 3 else shown[:, :, 0]).convert("RGB")
