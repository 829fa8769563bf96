"""A recipe's own augmentation: what it is given and may return, with other options, and when it is refused."""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from finetune.data.dataset import ImageList
from finetune.data.loader import UNREADABLE, ImageDataset, load
from finetune.images.own_function import OwnFunction
from finetune.images.transforms import training_transform
from finetune.recipe import Augment, Data
from finetune.recipe.serialize import from_dict, to_dict
from finetune.training.setup import setup
from finetune.utils.errors import RecipeError
from helpers import PREPROCESSING, ROOT, Coloured, prepare, run_here, small_recipe
from image_files import put_image, source

PHOTOGRAPH = load_sample_images().images[0].copy()  # 427 x 640


def invert(image, rng):
    """A function of a recipe's own that draws nothing."""
    return ImageOps.invert(image)


def noise(image, rng):
    """One that draws from what it is given and from each library's own generator, and changes the shape."""
    low = torch.randint(1, 4, (1,)).item() + np.random.randint(3) + rng.integers(3)
    pixels = np.asarray(image)[low:, ::-1]
    return (pixels * rng.uniform(0.5, 1, 3)).astype(np.uint8)


PHOTOS = [Image.fromarray(PHOTOGRAPH[i : i + 100 + 9 * i, i : 90 + 20 * i]) for i in range(6)]
INVERTED = [ImageOps.invert(photo) for photo in PHOTOS]


def dataset(photos=PHOTOS, function=None, **changes):
    """These images, augmented as a recipe asks; their numbers are what is read."""
    recipe = small_recipe(augment=Augment(function=function, rot90=0.5, auto_augment="rand-m9", **changes))
    images = ImageList(range(len(photos)), [0, 1] * 3, photos.__getitem__)
    own = OwnFunction(function) if function else None
    return ImageDataset(images, training_transform(recipe, PREPROCESSING), 3, ("a", "b"), function=own)


def batches(images, workers=0, epochs=(0, 1)):
    return [batch for epoch in epochs for batch, _ in load(images, epoch, [[0, 5], [3, 1], [2, 4]], workers)]


@pytest.mark.parametrize("erasing", [0.0, 0.5], ids=["pixels", "timm"])
def test_a_function_sees_each_image_as_it_is_decoded(erasing):
    """Its image then takes the way of any other, crop first: the same as if the files held what it makes of them."""
    ours, theirs = batches(dataset(function=invert, erasing=erasing)), batches(dataset(INVERTED, erasing=erasing))
    assert all(map(torch.equal, ours, theirs)) and not torch.equal(ours[0], batches(dataset(erasing=erasing))[0])


def test_its_draws_are_the_images_own():
    """Any number of workers gives the same; each epoch and image has its own draw; what is kept in memory stays as it was."""
    images = dataset(function=noise)
    alone = batches(images)
    for workers in (1, 2):
        assert all(map(torch.equal, alone, batches(dataset(function=noise), workers)))
    assert all(map(torch.equal, alone, batches(images)))  # from the cache
    np.testing.assert_array_equal(images.cache.get(0), np.asarray(PHOTOS[0]))
    drawn = []
    images.function = OwnFunction(lambda image, rng: drawn.append(rng.random()) or image)
    batches(images)
    assert len(set(drawn)) == 12


def test_what_is_evaluated_is_not_its_own(tmp_path):
    """No validation image reaches it, nor the linear probe's first view, and a recipe read from JSON needs it for none."""
    seen = []
    recipe = small_recipe(augment=Augment(function=lambda image, rng: seen.append(1) or image), epochs=3)
    run_here(recipe, tmp_path)
    assert len(seen) == 3 * 22
    datasets = prepare(replace(recipe, augment=from_dict(to_dict(recipe)).augment))[2]
    assert next(load(datasets[1], 0, [[0, 1]], 0)) and next(load(datasets[0].transformed_as(datasets[1]), 0, [[0]], 0))
    with pytest.raises(RecipeError, match="function <lambda> is known by its name alone"):
        next(load(datasets[0], 0, [[0]], 0))


RETURNED = {
    "a PIL image": lambda image, rng: image.rotate(90, expand=True),
    "a grey PIL image": lambda image, rng: image.convert("L"),
    "a transparent one": lambda image, rng: image.convert("RGBA"),
    "a read-only array": lambda image, rng: np.asarray(image),
    "a view": lambda image, rng: np.asarray(image)[::-2, ::-1],
    "an array in Fortran's order": lambda image, rng: np.asfortranarray(image),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_a_function_may_return(kind):
    """Any 8-bit image, of any sides and layout in memory, equal to Pillow's reading of it."""
    function = RETURNED[kind]
    returned = function(PHOTOS[1], None)
    wanted = np.asarray(returned.convert("RGB")) if isinstance(returned, Image.Image) else returned
    found = OwnFunction(function)(np.asarray(PHOTOS[1]), 0, "")
    np.testing.assert_array_equal(found, wanted)
    assert found.flags.writeable  # else torch warns
    assert len(batches(dataset(function=function))) == 6


def fails(image, rng):
    return image["image"]


WRONG = {
    "nothing": (lambda image, rng: None, "of image 5 in epoch 2 it returned None"),
    "a dict": (lambda image, rng: {"image": image}, "it returned dict"),
    "floats": (lambda image, rng: np.asarray(image) / 255, "it returned ndarray [145, 185, 3] of float64"),
    "a grey array": (lambda image, rng: np.asarray(image.convert("L")), "it returned ndarray [145, 185] of uint8"),
    "a tensor": (lambda image, rng: torch.zeros(3, 8, 8), "must return a PIL image or an array [height, width, 3] of uint8"),
    "an empty image": (lambda image, rng: np.asarray(image)[:0], "it returned ndarray [0, 185, 3] of uint8"),
    "an error": (fails, f"fails failed on image 5 in epoch 2: {__file__}:{fails.__code__.co_firstlineno + 1}: TypeError: "),
    "too few arguments": (lambda image: image, "failed on image 5 in epoch 2: TypeError: "),
    "a partial": (functools.partial(fails, rng=0), "fails(rng=0) failed on image 5 in epoch 2: TypeError: "),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_function_may_not_return(kind):
    """Anything else, or an error, is one sentence with the function, the image and what came of it."""
    function, text = WRONG[kind]
    with pytest.raises(RecipeError) as caught:
        list(load(dataset(function=function), 1, [[5]], 0))
    assert str(caught.value).startswith("augment.function: ") and text in str(caught.value)
    assert "\n" not in str(caught.value)


def unseeded(image, rng):
    return np.random.default_rng().permuted(np.asarray(image), axis=0)


@pytest.mark.parametrize(
    "function,text", [(unseeded, "made two different images of image 0 with the same rng"), (fails, "fails failed on image 0")]
)
def test_a_run_tries_the_function_before_it_starts(function, text):
    """A function that fails, or makes two images from the same seed, is refused while nothing is written yet."""
    with pytest.raises(RecipeError, match=text):
        setup(small_recipe(augment=Augment(function=function)), Accelerator(cpu=True))


def test_a_function_that_can_not_be_sent_is_named():
    """Where loader processes are started afresh, one that pickle can't find by its name is one sentence."""
    images = dataset(function=lambda image, rng: image)
    loader = images.loader(1)
    loader.multiprocessing_context = "spawn"
    with pytest.raises(RecipeError, match="augment.function: <lambda> can't be sent to loader processes: write it as a def"):
        list(load(images, 0, [[0]], 1))


def test_what_can_not_be_read_never_reaches_it(tmp_path):
    """With on_bad_image="skip", a black image stands for it, and the function is not called; the run's start leaves it out."""
    for i in range(12):
        put_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    seen = []
    recipe = source(tmp_path / "photos", augment=Augment(function=lambda image, rng: seen.append(image.size) or image))
    images = prepare(recipe)[2][0]
    with open(images.images.items[0], "r+b") as file:
        file.truncate(60)
    images.on_bad_image = "skip"
    ((_, labels),) = load(images, 0, [[0, 1]], 0)
    assert labels[0] == UNREADABLE and seen == [(32, 32)]
    images.function.try_on(images.read, len(images))


PAIRS = {
    "mixing": {"augment": Augment(mixup=0.4, vflip=0.5)},
    "frozen views": {"augment": Augment(frozen_views=2, rotation=20)},
    "borders": {"augment": Augment(rot90=0.5), "data": Data("generated", (24, 40), 8, resize="pad")},
    "several labels": {
        "augment": Augment(gaussian_blur_prob=0.5),
        "loss": "multi_label",
        "metric": "mean_average_precision",
        "data": Data(lambda: (Coloured(list(np.eye(7)) * 3, "abcdefg"),) * 2, 24, 8),
    },
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_function_goes_with_other_options(tmp_path, pair):
    """It is called for each image in each epoch, or once a view; however batches are cut, the weights are the same."""
    calls = []
    changes = {**PAIRS[pair], "epochs": 3}
    changes["augment"] = replace(changes["augment"], function=lambda image, rng: calls.append(1) or noise(image, rng))
    recipe, states = small_recipe(**changes), []
    for n in (1, 2):
        states.append(run_here(recipe, tmp_path / str(n), accumulate=n)[0].state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-6)
    assert len(calls) == 2 * 3 * (21 if pair == "several labels" else 22)


PAGE = (ROOT / "docs" / "augmentation.md").read_text()
EXAMPLES = [block for block in re.findall(r"^```python\n(.+?)^```$", PAGE, re.M | re.S) if "def augment_image(" in block]


@pytest.mark.parametrize("block", EXAMPLES, ids=["numpy", "albumentations", "torchvision", "kornia"])
def test_the_functions_on_the_page_do_what_it_says(monkeypatch, block):
    """As written there, each makes the same of an image with the same seed, something else with others, on any workers."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network
    for library in re.findall(r"^(?:import|from) (\w+)", block, re.M):
        pytest.importorskip(library)
    exec(block, scope := {})
    images = dataset(function=scope["augment_image"])
    images.function.try_on(images.read, len(images))
    assert len({images.function(np.asarray(PHOTOS[5]), seed, "").tobytes() for seed in range(20)}) > 5
    alone = batches(images)
    assert all(map(torch.equal, alone, batches(images, 2)))
