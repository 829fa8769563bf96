"""An image file, or what another library has read, as pixels: the one way in."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from finetune.images.arrays import as_picture, check_shape, read_array, reader_of
from finetune.images.decode import WHITE, Colour, open_file, silent, to_rgb
from finetune.images.remote import Fetched, here
from finetune.utils.cores import on_all_cores
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.files import file_digest
from finetune.utils.known_files import KnownFiles
from finetune.utils.text import progress
from finetune.utils.urls import Unreachable, as_path

CHECKING = "checking the images"
NO_PICTURE = "it is an array, no picture: --set data.channels=N (of suggest --channels N) reads those of N channels"


def read_image(
    item: Any,
    load: Callable[[Any], Any] = open_file,
    where: Callable[[Any], str] = str,
    background: Colour = WHITE,
    shortest: int = 0,
    channels: int | None = None,
    dtype: str = "",
) -> Any:
    """An image file, or what `load` makes of an item: a PIL image in RGB, or with `channels` an array [H, W, channels].

    `where` names the item. With `shortest`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size while its shorter side keeps so
    many pixels; the decoder then leaves out frequencies, which takes a fraction of the time. With a `dtype`, arrays must be of
    that type.

    Raises:
        RecipeError: with that name, for whatever fault its decoder finds.
    """
    try:
        if channels:
            array = read_array(item, channels, load, background)
            if dtype not in ("", array.dtype.name):
                raise ValueError(f"it holds {array.dtype.name}, where the training images hold {dtype}")
            return array
        with silent(), load(item) as image:
            if shortest:
                image.draft(None, (shortest, shortest))  # of other formats it does nothing
            return to_rgb(image, background)
    except RecipeError:
        raise
    except Unreachable as error:
        raise RecipeError(f"can't reach the image {where(item)}: {error}", one_process=True) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, RuntimeError, struct.error, ...
        why = NO_PICTURE if not channels and is_array(item) else reason_of(error)
        raise RecipeError(f"can't read the image {where(item)}: {why}", one_process=True) from error


def is_array(item: Any) -> bool:
    """Whether an item is a file that Pillow does not read and `channels` does, by its name."""
    return isinstance(item, str | Path) and as_path(item).suffix.lower() in (".npy", ".dcm")


def check_header(path: Any, channels: int | None = None) -> None:
    """Raise an error of any kind unless a file's header, or what was fetched, is that of such an image."""
    try:
        if channels:
            check_shape(path if isinstance(path, Fetched) else Path(path), channels)
        elif is_array(str(path) if isinstance(path, Fetched) else path):
            raise ValueError(NO_PICTURE)
        else:
            open_file(path).close()
    except Exception:
        if not (isinstance(path, Fetched) and path.part):
            raise
        check_header(here(path.url), channels)  # a TIFF may have its header at the end


def header_fault(file: Any, channels: int | None = None) -> str:
    """Why a file, or what could be fetched of it, is no such image, by its header; "" if it is one.

    Raises:
        RecipeError: where a package is missing, for all files.
    """
    try:
        if isinstance(file, Unreachable):
            raise file
        check_header(file, channels)
    except RecipeError:
        raise
    except Exception as error:
        return reason_of(error)
    return ""


def look_into(files: Sequence[Any], channels: int | None, shown: bool) -> tuple[dict[str, str], list[str]]:
    """(the fault of each file that has one, as `header_fault` names it; the digest of each).

    Of a large set, those that were in order and have not changed since are not opened again.
    """
    known, faults = KnownFiles(files, f"{channels} {PIL.__version__}"), dict[str, str]()
    new = [i for i, digest in enumerate(known.digests) if not digest]
    looked = progress(on_all_cores(partial(look, channels), [files[i] for i in new]), len(new), CHECKING, shown)
    digests = list(known.digests)
    for i, (fault, digest) in zip(new, looked, strict=True):
        digests[i] = digest
        if fault:
            faults[str(files[i])] = fault
    known.keep(digests)
    return faults, digests


def look(channels: int | None, file: Any) -> tuple[str, str]:
    """The fault and the digest of one file."""
    fault = header_fault(file, channels)
    return fault, "" if fault else file_digest(file)


def is_image(path: str) -> bool:
    """Whether a file's header is an image's, of a picture or an array."""
    try:
        file = here(path)
        if not reader_of(file if isinstance(file, Fetched) else Path(file)):
            open_file(file).close()
    except Exception:  # whatever its decoder says; it is named where it is read
        return False
    return True


def as_pil(image: Any, background: Colour = WHITE) -> Image.Image:
    """What `read_image` returns, or a PIL image of any kind, to look at: in RGB."""
    return to_rgb(image, background) if isinstance(image, Image.Image) else as_picture(image)


def reason_of(error: Exception) -> str:
    """What an error says, in one line and without an object's address."""
    return first_line(error).partition(" <")[0]
