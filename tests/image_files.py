"""Small sets of images in the layouts of other libraries."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from finetune.recipe import Data
from helpers import small_recipe

NAMES = ("ant", "bee")


PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 427 x 640
TILES = [photo.crop((x, y, x + 80, y + 80)) for photo in PHOTOS for y in (170, 250, 330) for x in range(0, 560, 80)]
PIXELS = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)


def encoded_again(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


CHANGES = {  # that leave an image nearly the same
    "re-encoded": encoded_again,
    "smaller": lambda image: image.resize((50, 50)),
    "larger": lambda image: image.resize((130, 130), Image.Resampling.BICUBIC),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((3, 1, 79, 77)),
    "cropped and mirrored": lambda image: image.crop((0, 4, 76, 80)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def source(value, holdout=0.0, **changes):
    """A small recipe on these images: a path or name, or a function."""
    value = value if callable(value) else str(value)
    return small_recipe(data=Data(value, image_size=24, batch_size=8, holdout=holdout), **changes)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_image(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[number % 12]).save(path)
    return path


def assert_same_set(ours, theirs):
    """A set of ours has the images and labels of another library's, in its order."""
    theirs = [(np.asarray(image.convert("RGB")), int(label)) for image, label in theirs]
    assert list(ours.labels) == [label for _, label in theirs]
    assert all(
        np.array_equal(image, other) and label == number and image.mode == "RGB" and type(label) is int
        for (image, label), (other, number) in zip((ours[i] for i in range(len(ours))), theirs, strict=True)
    )


def write_csv(root, rows, header="path,label,split"):
    return put(root / "labels.csv", "\n".join([header, *rows]) + "\n")
