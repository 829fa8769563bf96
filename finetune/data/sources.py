"""Where images come from: named data sets, folders, functions of the recipe; their faults."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive

from finetune.data_sources import TORCHVISION, data_folder, other_lists, read_image, require_package
from finetune.image_lists import ImageData, ImageList, from_lists, held_out, split
from finetune.recipe import Recipe, RecipeError
from finetune.recipe_file import nearest

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def load_data(recipe: Recipe) -> ImageData:
    """The recipe's images, downloaded if they are a named set that is not here yet.

    Raises:
        RecipeError: if they can't be had, or a folder of images is not in order.
    """
    data = whole_data(recipe)
    return held_out(data, recipe.data.holdout) if recipe.data.holdout else data


def whole_data(recipe: Recipe) -> ImageData:
    """The training and validation images of the recipe's source."""
    source = recipe.data.source
    if callable(source):
        return from_function(source, recipe.loss == "multi_label")
    if source in NAMED:
        return NAMED[source]()
    if lists := other_lists(source, recipe.loss == "multi_label"):
        return from_lists(*lists, source, 0 if source.startswith(("torchvision/", "hf/")) else recipe.seed)
    if Path(source).is_dir():
        return from_folder(Path(source), recipe.seed, check=recipe.data.on_bad_image == "stop")
    raise RecipeError(
        f"data: no data set or folder '{source}'.{nearest(source, [*NAMED, *DOWNLOADED])} Named sets: "
        f"{', '.join(NAMED)}, torchvision/NAME, hf/NAME"
    )


def known_size(recipe: Recipe) -> tuple[int, int] | None:
    """Training images and classes of a named set, as far as they are known without having it."""
    known = {"digits": (1438, 10), "elpv": (1969, 2), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}
    known |= {f"torchvision/{name}": row[2:4] for name, row in TORCHVISION.items()}
    return None if callable(recipe.data.source) else known.get(recipe.data.source)


def data_size(recipe: Recipe) -> tuple[int, int]:
    """Training images and classes, without having a named set that is still to be downloaded."""
    if (known := known_size(recipe)) and not recipe.data.holdout:
        return known
    data = load_data(recipe)
    return len(data.train), len(data.classes)


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
    labels, kinds = [int(chance >= 0.5) for _, chance, _ in rows], [kind for _, _, kind in rows]
    images = ImageList([path for path, _, _ in rows], labels, read_image, kinds)
    train, val = split(images, list(zip(labels, kinds, strict=True)), 0.25)
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


NAMED = {"digits": digits, "elpv": elpv, "cifar10": cifar10, "cifar100": cifar100, "generated": generated}
DOWNLOADED = ("cifar10", "cifar100", *map("torchvision/{}".format, TORCHVISION))  # the others come with packages


def is_downloaded(source: str | Callable[[], Any]) -> bool:
    """Whether images may come over a network."""
    return source in DOWNLOADED or (isinstance(source, str) and source.startswith("hf/") and not Path(source[3:]).is_dir())


def read_array(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def from_function(source: Callable[[], Any], multi_label: bool) -> ImageData:
    """What a function of the recipe file returns, checked."""
    try:
        train, val = source()
        classes, sizes = tuple(train.classes), (len(train), len(val))
        image, label = train[0]
        image.convert, np.asarray(label, dtype=float)
        if np.shape(label) not in (((), (len(classes),)) if multi_label else ((),)):
            raise ValueError(
                f"a label has the shape {np.shape(label)}"
                + (f", not that of {len(classes)} classes" if multi_label else "; several labels an image: loss='multi_label'")
            )
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"data: function {source.__name__} must return (train, validation), two data sets of (PIL "
            f"image, label) with a length, the first with a list `classes`: {error}"
        ) from error
    if not all(sizes) or len(classes) < 2:
        raise RecipeError(
            f"data: function {source.__name__} gave {sizes[0]} training and {sizes[1]} validation images "
            f"of {len(classes)} classes; there must be some of each, and 2 classes"
        )
    return ImageData(train, val, classes)


def from_folder(root: Path, seed: int, check: bool = True) -> ImageData:
    """train/ and val/ (or test/) with a folder for each class, or the class folders themselves: a fifth then validates.

    Raises:
        RecipeError: for a class without images, classes that differ between the splits, or a file that is no image.
    """
    if (root / "train").is_dir():
        val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        if val is None:
            raise RecipeError(f"data: {root} has train/ but neither val/ nor test/ beside it")
        (train, classes), (scored, theirs) = class_folders(root / "train", check), class_folders(val, check)
        if classes != theirs:
            only = [sorted(set(a) - set(b)) for a, b in ((classes, theirs), (theirs, classes))]
            raise RecipeError(
                f"data: the classes of {root / 'train'} and {val} differ: only in train: "
                f"{', '.join(only[0]) or 'none'}; only in {val.name}: {', '.join(only[1]) or 'none'}"
            )
        return ImageData(train, scored, classes)
    images, classes = class_folders(root, check)
    return from_lists([images], classes, root, seed)


def class_folders(root: Path, check: bool) -> tuple[ImageList, tuple[str, ...]]:
    """(images, classes) as torchvision reads a folder of class folders, its faults found before training.

    `check` opens every image, too.
    """
    try:
        folder = ImageFolder(root, allow_empty=True)
    except FileNotFoundError:
        raise RecipeError(
            f"data: {root} has no class folders. Wanted: train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"
        ) from None
    empty = [name for label, name in enumerate(folder.classes) if label not in set(folder.targets)]
    if empty:
        raise RecipeError(
            f"data: no images in class folder{'s' * (len(empty) > 1)} "
            f"{', '.join(str(root / name) for name in empty)} (looked for {', '.join(IMG_EXTENSIONS)})"
        )
    if len(folder.classes) < 2:
        raise RecipeError(f"data: {root} has one class, '{folder.classes[0]}'; there must be at least 2")
    for path, _ in folder.samples if check else ():
        try:
            Image.open(path).close()  # reads the header only
        except OSError as error:
            raise RecipeError(f"can't read the image {path}: {str(error).partition(' <')[0]}") from error
    return ImageList([path for path, _ in folder.samples], folder.targets, read_image), tuple(folder.classes)
