"""Data sets by name: digits, ELPV, CIFAR."""

import csv
import importlib.util
import os
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.utils import download_and_extract_archive

from finetune.data.dataset import ImageData, ImageList, split
from finetune.data.folders import read_image
from finetune.utils.errors import RecipeError

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def digits() -> ImageData:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels (UCI, CC BY 4.0); a fixed fifth of each class validates."""
    require_package("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images * 255 / 16).round().astype(np.uint8)
    train, val = split(ImageList(images, scans.target, read_array), scans.target.tolist(), 0.2)
    return ImageData(train, val, tuple("0123456789"))


def elpv() -> ImageData:
    """2,624 electroluminescence photographs of solar cells (package elpv-dataset, CC BY-NC-SA 4.0), 300 px: defective or not.

    A cell counts as defective from a stated defect probability of 0.5. A fixed quarter of each label and cell type validates.
    """
    require_package("elpv_dataset", "elpv-dataset")
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec and spec.origin  # it was required just now
    folder = Path(spec.origin).parent / "data"
    with open(folder / "labels.csv", newline="") as file:
        rows = [
            (folder / path, float(chance), kind)
            for path, chance, kind in csv.reader((" ".join(line.split()) for line in file), delimiter=" ")
        ]
    labels, subgroups = [int(chance >= 0.5) for _, chance, _ in rows], [kind for _, _, kind in rows]
    images = ImageList([path for path, _, _ in rows], labels, read_image, subgroups)
    train, val = split(images, list(zip(labels, subgroups, strict=True)), 0.25)
    return ImageData(train, val, ("functional", "defective"))


def cifar(name: str, archive: str, md5: str, label_bytes: int, train: list[str], val: list[str], names: str) -> ImageData:
    """CIFAR in its binary form, rows of label bytes and 3 x 32 x 32 pixels: the Python form is a pickle and can run code."""
    root = data_folder()
    folder = root / name
    if not (folder / val[0]).is_file():
        try:
            download_and_extract_archive(CIFAR_URL + archive, str(root), md5=md5)
        except Exception as error:  # no network, a cut file, a full disk
            raise RecipeError(
                f"can't download {CIFAR_URL}{archive}: {error}\n  by hand: unpack that file so that "
                f"{folder / val[0]} exists (FINETUNE_DATA names another folder than {root})"
            ) from None

    def part(files: list[str]) -> ImageList:
        rows = np.concatenate([np.fromfile(folder / file, np.uint8) for file in files])
        rows = rows.reshape(-1, label_bytes + 3072)
        pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return ImageList(pixels, rows[:, label_bytes - 1], read_array)

    return ImageData(part(train), part(val), tuple((folder / names).read_text().split()))


def cifar10() -> ImageData:
    """CIFAR-10: 50,000 and 10,000 images of 32 px (Krizhevsky 2009)."""
    return cifar(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        1,
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
        "batches.meta.txt",
    )


def cifar100() -> ImageData:
    """CIFAR-100: as many, of 100 classes (Krizhevsky 2009); the first label byte, the coarse class, is left aside."""
    return cifar(
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        2,
        ["train.bin"],
        ["test.bin"],
        "fine_label_names.txt",
    )


def generated() -> ImageData:
    """A few coloured patches for --smoke. They show that everything runs, and nothing else."""

    def patch(number: int) -> Image.Image:
        noise = np.random.RandomState(number).randint(0, 64, (16, 16, 3))
        return Image.fromarray((noise + 19 * (number % 10)).astype(np.uint8))

    train, val = (ImageList(numbers, [number % 10 for number in numbers], patch) for numbers in (range(22), range(22, 32)))
    return ImageData(train, val, tuple(f"patch {i}" for i in range(10)))


def read_array(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def data_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("FINETUNE_DATA", Path.home() / ".cache" / "finetune"))


def require_package(module: str, package: str, install: str = "") -> None:
    """Raise RecipeError, with the pip line, if an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        raise RecipeError(
            f"this data set needs the package {package}, which is not installed: pip install {install or package}"
        )
