"""Transforms against timm's; each image is decoded once."""

import math
import pickle
import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from finetune.data.builtin import elpv
from finetune.data.dataset import ImageList
from finetune.data.loader import ImageDataset, load
from finetune.images.cache import ImageCache
from finetune.images.transforms import Pixels, Timm, eval_transform, training_transform
from finetune.recipe import Augment, Data
from finetune.utils.seed import keyed_seed, seed_cpu
from helpers import ALL, prepare, small_recipe

PHOTOGRAPH, FLOWER = (image.copy() for image in load_sample_images().images)  # 427 x 640; torch wants them writable
IMAGES = {
    "photograph": PHOTOGRAPH,
    "upright": FLOWER[:, 200:400],
    "small": np.array(Image.fromarray(FLOWER).resize((32, 32))),
    "tiny": PHOTOGRAPH[:9, :7],
    "grey": None,
}
TIMM = {"backbone": "test_resnet", "head": None, "groups": ALL}


def pixels(name):
    if name == "grey":
        pytest.importorskip("elpv_dataset")
        return np.array(elpv().train[0][0].convert("RGB"))
    return IMAGES[name]


def inputs(interpolation="bicubic", crop_pct=1.0, size=48):
    return {
        "input_size": (3, size, size),
        "interpolation": interpolation,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop_pct,
        "crop_mode": "center",
    }


def levels(transform, image):
    """What the network sees, in steps of 1 / 255 of full brightness."""
    return transform.batch(transform.image(image)[None])[0] * torch.tensor(inputs()["std"]).view(3, 1, 1) * 255


def assert_as_through_pil(ours, theirs):
    """The same but for rounding: bytes from PIL's and torch's arithmetic differ by 1 in up to every fourth, rarely by more."""
    apart = (ours - theirs).abs()
    assert apart.max() < 8 and apart.mean() < 0.3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", IMAGES)
def test_training_images_are_timms(name, interpolation):
    """From the same seed the same crop, the same size and the same flips as timm's transform."""
    image, augment = pixels(name), Augment(crop_scale=(0.2, 1.0), crop_ratio=(0.5, 2.0), hflip=0.5, vflip=0.3)
    given = inputs(interpolation)
    ours = training_transform(small_recipe(augment=augment), given)
    options = {"scale": (0.2, 1.0), "ratio": (0.5, 2.0), "hflip": 0.5, "vflip": 0.3, "color_jitter": None}
    theirs = Timm(given, timm.data.create_transform(**given, is_training=True, **options))
    seen = []
    for number in range(20):
        seed_cpu(number)
        seen.append(levels(ours, image))
        seed_cpu(number)
        assert_as_through_pil(seen[-1], levels(theirs, image))
    assert isinstance(ours, Pixels) and len({tuple(one.flatten().tolist()) for one in seen}) > 10


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 1.2])
@pytest.mark.parametrize("name", IMAGES)
def test_evaluated_images_are_timms(name, crop_pct):
    """Resized and cropped in the middle as timm's transform does it."""
    for interpolation in ("bilinear", "bicubic"):
        given = inputs(interpolation, crop_pct)
        ours, theirs = eval_transform(given), Timm(given, timm.data.create_transform(**given))
        assert isinstance(ours, Pixels)
        assert_as_through_pil(levels(ours, pixels(name)), levels(theirs, pixels(name)))


AUGMENT = {"crop_scale": (0.2, 1.0), "crop_ratio": (0.5, 2.0), "hflip": 0.3}
THEIRS = {"is_training": True, "scale": (0.2, 1.0), "ratio": (0.5, 2.0), "hflip": 0.3, "color_jitter": None}
COLOURS = [
    {"auto_augment": "rand-m9-mstd0.5"},
    {"auto_augment": "augmix-m5-w4-d2"},
    {"auto_augment": "original-mstd0.5"},
    {"auto_augment": "3a", "color_jitter": 0.3},
    {"color_jitter": 0.4, "grayscale_prob": 0.5},
    {"gaussian_blur_prob": 0.5},
]


@pytest.mark.parametrize("changes", COLOURS, ids=str)
def test_colours_are_timms(changes):
    """Policies and colours are drawn as in timm's transform from the same seed, and done by timm to the crop from here."""
    ours, crop = (training_transform(small_recipe(augment=Augment(**AUGMENT, **more)), inputs()) for more in (changes, {}))
    theirs = timm.data.create_transform(**inputs(), **THEIRS | changes)
    apart = []
    for number in range(20):
        seed_cpu(number)
        seen = levels(ours, PHOTOGRAPH)
        seed_cpu(number)
        image = Image.fromarray(crop.image(PHOTOGRAPH).numpy())
        for step in theirs.transforms[2:]:  # after crop and flip
            image = step(image)
        torch.testing.assert_close(seen, image * torch.tensor(inputs()["std"]).view(3, 1, 1) * 255, rtol=0, atol=1e-3)
        seed_cpu(number)
        apart.append((seen - levels(Timm(inputs(), theirs), PHOTOGRAPH)).abs().mean().item())
    assert isinstance(ours, Pixels) and np.median(apart) < 0.3  # through PIL alone; an equalised step of 1 becomes more


def test_erasing_is_timms():
    """From the same seed a photograph is what timm's transform makes of it."""
    ours = training_transform(small_recipe(augment=Augment(**AUGMENT, erasing=0.5)), inputs())
    theirs = timm.data.create_transform(**inputs(), **THEIRS, re_prob=0.5, re_mode="pixel")
    for number in range(10):
        seed_cpu(number)
        seen = levels(ours, PHOTOGRAPH)
        seed_cpu(number)
        assert torch.equal(seen, levels(Timm(inputs(), theirs), PHOTOGRAPH))


def test_the_rarer_filters_are_left_to_timm():
    """Other interpolations are none of `Pixels`."""
    assert isinstance(eval_transform(inputs() | {"interpolation": "lanczos"}), Timm)


SHAPES = [(48, 48), (32, 64), (60, 20)]  # of the network's input
IN_WORDS = {"crop": "center", "pad": "border", "squash": "squash"}


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("mode", IN_WORDS.values())
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_another_shape_are_evaluated_as_timm_does_it(name, mode, size):
    """Cut, with borders of the mean, or distorted, into squares and others, whole or less: as timm's transform."""
    bilinear = mode == "center" and size[0] != size[1]  # as timm 1.0.26 resizes these, whatever is asked for
    for crop_pct in (1.0, 0.8):
        given = inputs("bilinear" if bilinear else "bicubic", crop_pct) | {"crop_mode": mode, "input_size": (3, *size)}
        ours, theirs = eval_transform(given), Timm(given, timm.data.create_transform(**given))
        assert isinstance(ours, Pixels)
        assert_as_through_pil(levels(ours, pixels(name)), levels(theirs, pixels(name)))


def to_shape(image, mode, size):
    """A photograph of PIL's, brought to the shape of the network's input as in evaluation, at full resolution."""
    (wide, high), shape = image.size, size[1] / size[0]
    whole = max(wide, math.ceil(high * shape)), max(high, math.ceil(wide / shape))
    if mode == "pad":
        return ImageOps.pad(image, whole, color=tuple(round(255 * value) for value in inputs()["mean"]))
    return image.resize(whole, Image.Resampling.BICUBIC) if mode == "squash" else image


@pytest.mark.parametrize("erasing", [0.0, 0.3])
@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("mode", IN_WORDS)
def test_random_crops_are_of_what_evaluation_shows(mode, size, erasing):
    """From the same seed, timm's crop of the image once it has borders, or is distorted; its ratio is that of the input."""
    augment = Augment(**AUGMENT, erasing=erasing)
    given = inputs() | {"crop_mode": IN_WORDS[mode], "input_size": (3, *size)}
    ours, shape = training_transform(small_recipe(augment=augment), given), size[1] / size[0]
    theirs = timm.data.create_transform(
        **given, **THEIRS | {"ratio": (0.5 * shape, 2.0 * shape)}, re_prob=erasing, re_mode="pixel"
    )
    apart = []
    for number in range(10):
        seed_cpu(number)
        seen = levels(ours, PHOTOGRAPH)
        seed_cpu(number)
        image = np.asarray(to_shape(Image.fromarray(PHOTOGRAPH), mode, size))
        apart.append((seen - levels(Timm(given, theirs), image)).abs().mean().item())
    assert max(apart) < (3 if mode == "squash" else 0.3)  # squashed, timm's is resampled twice


@pytest.mark.parametrize("changes,layout", [({}, torch.contiguous_format), (TIMM, torch.channels_last)])
def test_a_batch_is_as_its_images(changes, layout):
    """An image looks the same alone and in a batch, which is channels last but for a function's own network."""
    images = prepare(small_recipe(**changes))[2][0]
    ((batch, _),) = load(images, 2, [[4, 1, 9]], 0)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=layout)
    for image, index in zip(batch, (4, 1, 9), strict=True):
        assert torch.equal(next(load(images, 2, [[index]], 0))[0][0], image)


class Reader:
    """Makes an image of a number, and writes down that it did."""

    def __init__(self, file):
        self.file = file

    def __call__(self, number):
        with open(self.file, "a") as lines:
            lines.write(f"{number}\n")
        return Image.fromarray(np.random.RandomState(number).randint(0, 255, (10 + number, 20, 3)).astype(np.uint8))

    def read(self):
        return sorted(map(int, self.file.read_text().split()))


def counted(tmp_path):
    """Six images of different sizes that are counted when they are decoded."""
    reader = Reader(tmp_path / "read")
    return ImageDataset(ImageList(range(6), [0, 1] * 3, reader), eval_transform(inputs()), 0, ("a", "b")), reader


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_is_decoded_once(tmp_path, workers):
    """In the second epoch nothing is decoded, in loader processes neither, and the images are those of the first."""
    images, reader = counted(tmp_path)
    first, second = (list(load(images, epoch, [[0, 5], [3, 1], [2, 4]], workers)) for epoch in (0, 1))
    assert reader.read() == list(range(6))
    for (a, labels), (b, again) in zip(first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(labels, again)


def test_what_has_no_room_is_decoded_again(tmp_path):
    """Beyond the limit, images are decoded each time and are the same."""
    images, reader = counted(tmp_path)
    images.cache = ImageCache(6, limit=3 * 20 * (10 + 11))  # the first two
    first, second = (list(load(images, epoch, [[i] for i in range(6)], 0)) for epoch in (0, 1))
    assert reader.read() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_the_cache_is_not_sent_to_spawned_processes(tmp_path):
    """A pickled set decodes for itself."""
    images, reader = counted(tmp_path)
    list(load(images, 0, [[0, 1]], 0))
    sent = pickle.loads(pickle.dumps(images))
    assert sent.cache is None and images.cache.get(1).shape == (11, 20, 3)
    assert torch.equal(next(load(sent, 0, [[1]], 0))[0], next(load(images, 0, [[1]], 0))[0]) and reader.read() == [0, 1, 1]


def test_images_of_a_function_are_asked_for_each_time():
    """What a recipe's own function returns may differ each time, and is not kept."""
    asked = []

    class Changing:
        classes, targets = ("a", "b"), [0, 1] * 8

        def __len__(self):
            return 16

        def __getitem__(self, index):
            asked.append(index)
            return Image.new("RGB", (24, 24), (len(asked), 0, 0)), index % 2

    def changing():
        return Changing(), Changing()

    images = prepare(small_recipe(data=Data(changing, 24, 8)))[2][1]
    asked.clear()
    first, second = (next(load(images, 0, [[3]], 0))[0] for _ in range(2))
    assert asked == [3, 3] and not torch.equal(first, second)


def test_an_images_seed_is_its_own():
    """The generators that transforms draw from are set for each image: Python's, numpy's and torch's."""
    drawn = []
    for _ in range(2):
        seed_cpu(keyed_seed(0, 1, 2))
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
        torch.rand(3)
    assert drawn[0] == drawn[1]


def test_the_parts_of_a_set_do_not_share_a_cache():
    """Training and validation images have a cache each."""
    train, val = prepare(small_recipe())[2]
    list(load(train, 0, [[0]], 0))
    assert val.cache.get(0) is None and train.cache.get(0) is not None
