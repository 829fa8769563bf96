"""What becomes of an image's pixels, whatever file or library it comes from."""

import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_dtype

from finetune.data.loader import ImageDataset
from finetune.data.sources import load_data
from finetune.images.cache import USED
from finetune.images.decode import ENDINGS, TURNS, open_file, to_rgb
from finetune.images.read import read_image
from finetune.images.transforms import eval_transform
from finetune.models.backbone import meta_backbone
from finetune.recipe import Data
from finetune.training.setup import build_datasets
from finetune.utils.errors import RecipeError
from helpers import PREPROCESSING, predict, small_recipe
from image_files import PHOTOS, PIXELS

COLOURS, GREY16 = Image.fromarray(PIXELS[0][:16]), np.random.RandomState(1).randint(0, 65536, (16, 32)).astype(np.uint16)
SHAPE = np.zeros((16, 32), np.uint8)
SHAPE[4:12, 8:24], SHAPE[0] = 255, 100


def saved(image, file, **options):
    """The image, written to a file."""
    image.save(file, **options)
    return file


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("number", range(1, 9))
def test_an_image_is_upright(tmp_path, kind, number):
    """For each EXIF orientation in each format the pixels are those of ImageOps.exif_transpose."""
    file = saved(COLOURS, tmp_path / f"a.{kind}", exif=turned(number))
    with Image.open(file) as theirs:
        assert np.array_equal(read_image(file), ImageOps.exif_transpose(theirs).convert("RGB"))
    assert read_image(file).size == ((32, 16) if number < 5 else (16, 32))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("number", TURNS)
def test_a_tiff_is_upright(tmp_path, mode, compression, number):
    """Also where Pillow, opening it by its name, garbles it: raw pixels that are to lie on their side."""
    image = Image.fromarray(GREY16) if mode == "I;16" else COLOURS.convert(mode)
    file = saved(image, tmp_path / "a.tif", compression=compression, tiffinfo={274: number})
    assert np.array_equal(read_image(file), to_rgb(image).transpose(TURNS[number]))


def test_damaged_exif_leaves_an_image_as_it_is_stored(tmp_path):
    """EXIF data that can't be read do not make an image unreadable."""
    for damage in (b"Exif\x00\x00", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff", b"Exif\x00\x00" + os.urandom(40)):
        file = saved(COLOURS, tmp_path / "a.jpg", exif=damage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(read_image(file), Image.open(file).convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK", "YCbCr"])
def test_a_plain_8_bit_image_keeps_its_pixels(mode):
    """Without EXIF or alpha the pixels are Pillow's, to the bit."""
    image = COLOURS.convert(mode)
    assert np.array_equal(to_rgb(image), image.convert("RGB")) and to_rgb(image).mode == "RGB"


def test_somebody_elses_image_stays_as_it_is(tmp_path):
    """An image that was opened elsewhere keeps its EXIF data; what is made of it is a copy, which can be read once more."""
    with Image.open(saved(COLOURS, tmp_path / "a.jpg", exif=turned(6))) as image:
        upright = to_rgb(image)
        assert upright is not image and image.getexif()[0x0112] == 6 and image.size == (32, 16)
    assert np.array_equal(read_image(upright, lambda image: image), upright)


def big_endian_png(values, channels):
    """A PNG of 16 bits, grey or in colours; Pillow writes none in colours."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_16_bits_are_scaled_to_8(tmp_path):
    """A grey image of 16 bits, in any format and byte order, or in 32 bits, has torchvision's 8 bits of it."""
    expected = to_dtype(torch.from_numpy(GREY16), torch.uint8, scale=True).numpy()
    image = Image.fromarray(GREY16)
    big = Image.frombytes("I;16B", (32, 16), GREY16.astype(">u2").tobytes())
    files = [saved(image, tmp_path / name) for name in ("a.png", "a.tif")]
    files += [saved(big, tmp_path / "b.tif"), saved(Image.fromarray(GREY16.astype(np.int32)), tmp_path / "c.tif")]
    (tmp_path / "a.pgm").write_bytes(b"P5\n32 16\n65535\n" + GREY16.astype(">u2").tobytes())
    (tmp_path / "rgb.png").write_bytes(big_endian_png(np.stack([GREY16] * 3, -1), 3))
    for file in (*files, tmp_path / "a.pgm", tmp_path / "rgb.png"):
        assert np.array_equal(np.asarray(read_image(file))[..., 0], expected), file
    white_is_zero = saved(image, tmp_path / "d.tif", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(read_image(white_is_zero))[..., 0], 255 - expected)


def test_numbers_without_a_known_white_are_refused(tmp_path):
    """Floats from 0 to 1 are scaled; others, NaN, and integers beyond 16 bits are refused with the file's name."""
    floats = np.linspace(0, 1, 512, dtype=np.float32).reshape(16, 32)
    ours = np.asarray(read_image(saved(Image.fromarray(floats), tmp_path / "a.tif")))[..., 0]
    assert np.abs(ours - 255 * floats).max() <= 0.5
    for number, values in enumerate((255 * floats, floats - 0.1, floats * np.nan, (floats * 1e6).astype(np.int32))):
        file = saved(Image.fromarray(values), tmp_path / f"{number}.tif")
        with pytest.raises(RecipeError, match=f"can't read the image .*{number}.tif: its .* go from .* save it in 8 or 16"):
            read_image(file)


def transparent_images():
    grey = Image.fromarray(np.full((16, 32), 30, np.uint8))
    palette = COLOURS.quantize(16)
    return {
        "RGBA": Image.merge("RGBA", (*COLOURS.split(), Image.fromarray(SHAPE))),
        "LA": Image.merge("LA", (grey, Image.fromarray(SHAPE))),
        "key": (grey, {"transparency": 30}),
        "palette": (palette, {"transparency": bytes(range(0, 256, 16))}),
    }


@pytest.mark.parametrize("ending", ["tga", "png"])
def test_a_fourth_byte_that_says_nothing_is_no_transparency(tmp_path, ending):
    """A TGA with 0 in all of it is opaque, and transparent where it is not 0 everywhere; a PNG means it."""
    clear, part = (Image.merge("RGBA", (*COLOURS.split(), Image.fromarray(alpha))) for alpha in (0 * SHAPE, SHAPE))
    white = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255)), part).convert("RGB")
    assert np.array_equal(read_image(saved(part, tmp_path / f"part.{ending}")), white)
    expected = np.full_like(COLOURS, 255) if ending == "png" else np.asarray(COLOURS)
    assert np.array_equal(read_image(saved(clear, tmp_path / f"clear.{ending}")), expected)


def test_pillows_warnings_are_not_passed_on(tmp_path, monkeypatch, recwarn):
    """They name no file; an image of many pixels is read without a word, and so is its header."""
    file = saved(COLOURS, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert np.array_equal(read_image(file), COLOURS) and open_file(file).size == COLOURS.size
    assert not [warning for warning in recwarn if "PIL" in warning.filename]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "key", "palette"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_what_is_transparent_shows_the_background(tmp_path, kind, background):
    """The pixels are Pillow's alpha_composite on the recipe's colour, white by default, in a run and when it predicts."""
    image, options = transparent_images()[kind], {}
    if isinstance(image, tuple):
        image, options = image
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            saved(image, tmp_path / part / label / f"{label}.png", **options)
    with Image.open(tmp_path / "train" / "a" / "a.png") as theirs:
        canvas = Image.new("RGBA", theirs.size, background)
        expected = np.asarray(Image.alpha_composite(canvas, theirs.convert("RGBA")).convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "train" / "a" / "a.png", background=background), expected)
    data = load_data(small_recipe(data=Data(str(tmp_path), 24, 8, background=background)))
    assert np.array_equal(data.train[0][0], expected) and np.array_equal(data.val[1][0], expected)


def test_the_images_of_a_function_are_read_alike():
    """A PIL image that a recipe's function returns is turned upright and composited, too."""
    image = transparent_images()["RGBA"]
    image.info["exif"] = turned(6).tobytes()
    images = ImageDataset([(image, 0)], eval_transform(PREPROCESSING), 0, ("a", "b"), background=(9, 9, 9))
    expected = ImageOps.exif_transpose(image)
    expected = Image.alpha_composite(Image.new("RGBA", expected.size, (9, 9, 9)), expected).convert("RGB")
    assert np.array_equal(images.read(0)[0], expected)


def test_a_photo_upright_or_turned_gives_the_same_answer(run_folder, tmp_path):
    """predict says the same of a photograph as the camera wrote it and as it is stored upright."""
    exif = turned(8)
    as_written, upright = saved(COLOURS, tmp_path / "a.png", exif=exif), tmp_path / "b.png"
    ImageOps.exif_transpose(Image.open(as_written)).save(upright)
    one, other = predict(run_folder / "model", [as_written, upright])
    assert one["top"] == other["top"]


def damaged(kind, seed):
    """An image file with a cut, flipped bytes, or both; or none of an image at all."""
    content = io.BytesIO()
    COLOURS.save(content, kind)
    data, chance = bytearray(content.getvalue()), random.Random(seed)
    for _ in range(chance.randint(0, 12)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.randint(8, len(data))])


@pytest.mark.parametrize("kind", [name for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF") if name in Image.SAVE])
def test_every_fault_of_a_decoder_is_one_line(tmp_path, kind):
    """A damaged file is read, or refused in one line with its path; there is no other exception."""
    refused = 0
    for seed in range(150):
        file = tmp_path / f"{seed}.{kind.lower()}"
        file.write_bytes(damaged(kind, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_image(file).mode == "RGB"
            except RecipeError as error:
                refused += 1
                assert str(error).startswith(f"can't read the image {file}: ") and "\n" not in str(error)
    assert refused > 20


def test_a_bomb_and_a_pipe_are_refused(tmp_path, monkeypatch):
    """An image of too many pixels, memory that is not enough, and a pipe are refused at once, by their path."""
    image = saved(Image.new("1", (60, 60)), tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(RecipeError, match="pipe.png: it is a folder, a pipe or a device"):
        read_image(tmp_path / "pipe.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RecipeError, match="bomb.png: Image size .3600 pixels. exceeds limit"):
        read_image(image)

    def hungry(item):
        raise MemoryError

    with pytest.raises(RecipeError, match="can't read the image x: MemoryError"):
        read_image("x", hungry)


def test_endings_are_those_that_pillow_reads():
    """The usual formats are among them, what Pillow can only write or name is not."""
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".pgm", ".tga"} <= ENDINGS
    assert not {".pdf", ".eps", ".mpg", ".h5", ".wmf", ".heic", ".txt"} & ENDINGS


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("shortest", "size"), [(428, (640, 427)), (213, (320, 214)), (100, (160, 107)), (10, (80, 54))])
def test_a_large_jpeg_is_decoded_smaller(tmp_path, mode, shortest, size):
    """To the least half, quarter or eighth that keeps the shorter side: about the means of so many pixels, and upright."""
    file = saved(PHOTOS[0].convert(mode), tmp_path / "a.jpg", quality=95)
    small, whole = read_image(file, shortest=shortest), read_image(file)
    assert small.size == size and whole.size == (640, 427)
    means = np.asarray(whole.reduce(640 // size[0]), float)
    assert np.abs(np.asarray(small, float) - means).mean() < 1.5  # of 255 levels
    upright = read_image(saved(PHOTOS[0].convert(mode), tmp_path / "b.jpg", quality=95, exif=turned(6)), shortest=shortest)
    assert np.array_equal(upright, small.transpose(Image.Transpose.ROTATE_270))
    png = saved(PHOTOS[0], tmp_path / "a.png")
    assert np.array_equal(read_image(png, shortest=shortest), PHOTOS[0])  # other formats are decoded whole


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("ending", [".jpg", ".PNG", ".gif", ".webp", ".tga", ".tif"])
def test_a_files_content_counts_not_its_ending(tmp_path, kind, ending):
    """A file of one kind that is called like another is read as what it is."""
    PHOTOS[0].save(tmp_path / "a", kind)
    (file := tmp_path / f"a{ending}").write_bytes((tmp_path / "a").read_bytes())
    with Image.open(tmp_path / "a") as theirs, open_file(file) as image:
        assert image.format == theirs.format == kind and np.array_equal(np.array(image), np.array(theirs))


def test_only_training_images_are_decoded_smaller(tmp_path):
    """What is evaluated is what `predict` reads; the cache then holds the small images."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            saved(PHOTOS[0], tmp_path / part / name / "1.jpg")
    recipe = small_recipe(data=Data(str(tmp_path), 32, 2, reduced_decode=2.5))
    data = load_data(recipe)
    train, val = build_datasets(recipe, meta_backbone(recipe, 2), data)
    assert [part.read(0)[0].shape for part in (train, val)] == [(107, 160, 3), (427, 640, 3)]
    assert train.read(0)[0].shape == (107, 160, 3) and train.cache.header[USED] == 107 * 160 * 3
    assert data.train[0][0].size == (640, 427)
    text = "reduced_decode is for files that this library opens"
    with pytest.raises(RecipeError, match=text):
        small_recipe(data=Data(lambda: None, 32, 2, reduced_decode=2))
