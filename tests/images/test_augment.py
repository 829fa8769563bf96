"""Augmentations that torchvision and numpy own: their images, and which options are refused."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomRotation, TrivialAugmentWide

from finetune.images.transforms import Pixels, mean_colour, random_crop, training_transform
from finetune.recipe import Augment, Data
from finetune.training.setup import check_recipe
from finetune.utils.errors import RecipeError
from finetune.utils.seed import seed_cpu
from helpers import SmallNet, small_recipe

PHOTOGRAPH = load_sample_images().images[0].copy()  # 427 x 640


def inputs(height=48, width=48, mode="center", interpolation="bicubic"):
    return {
        "input_size": (3, height, width),
        "interpolation": interpolation,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 1.0,
        "crop_mode": mode,
    }


def bytes_of(transform, image):
    """The network's input as bytes [H, W, 3], by way of its normalised floats."""
    mean, std = (torch.tensor(inputs()[name]).view(3, 1, 1) for name in ("mean", "std"))
    normalised = transform.batch(transform.image(image)[None])[0]
    return ((normalised * std + mean) * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()


THEIRS = {
    "rotation": ({"rotation": 40.0}, lambda fill: RandomRotation(40.0, Image.Resampling.BILINEAR, fill=fill)),
    "ta_wide": (
        {"auto_augment": "ta_wide"},
        lambda fill: TrivialAugmentWide(interpolation=Image.Resampling.BILINEAR, fill=fill),
    ),
}


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"], ids=["pixels", "timm"])
@pytest.mark.parametrize("name", THEIRS)
def test_torchvisions_transforms_are_done_to_the_crop(name, interpolation):
    """From the same seed, torchvision's transform of the crop, to the byte; what it uncovers has the mean colour."""
    changes, theirs = THEIRS[name]
    given = inputs(40, 64, interpolation=interpolation)
    ours, plain = (training_transform(small_recipe(augment=Augment(**more)), given) for more in (changes, {}))
    theirs, seen = theirs(mean_colour(given)), set()
    for number in range(20):
        seed_cpu(number)
        found = bytes_of(ours, PHOTOGRAPH)
        seed_cpu(number)
        wanted = np.asarray(theirs(Image.fromarray(bytes_of(plain, PHOTOGRAPH))))
        np.testing.assert_array_equal(found, wanted)
        seen.add(tuple(found[0, 0]))
    assert len(seen) > 2 and (name != "rotation" or tuple(mean_colour(given)) in seen)


def test_quarter_turns_are_numpys():
    """With probability p an image becomes one of numpy's four turns, each as often; without the crop it keeps each pixel."""
    image, given, p = PHOTOGRAPH[::20, ::20], inputs(mode="squash"), 0.8
    augment, turns = Augment(rot90=p, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)), [np.rot90(image, k) for k in range(4)]
    counts = np.zeros(4)
    for number in range(400):
        seed_cpu(number)
        found = random_crop(image, augment, given)
        counts[[k for k, turn in enumerate(turns) if np.array_equal(found, turn)]] += 1
    assert counts.sum() == 400
    assert chisquare(counts, 400 * np.array([1 - 3 * p / 4, p / 4, p / 4, p / 4])).pvalue > 1e-3


def test_turned_images_are_cut_to_the_networks_shape():
    """A turned image gives a crop of the network's shape, whatever that is."""
    for mode in ("center", "border", "squash"):
        ours = training_transform(small_recipe(augment=Augment(rot90=1.0)), inputs(24, 40, mode))
        assert all(ours.image(PHOTOGRAPH).shape == (24, 40, 3) for _ in range(8))


REFUSED = {
    "a policy of torchvision's that timm does not know": ({"auto_augment": "ra"}, "auto_augment must be 'ta_wide', or start"),
    "a section that timm does not know": ({"auto_augment": "augmix-x5"}, "timm can't read auto_augment='augmix-x5'"),
    "an option without effect": (
        {"auto_augment": "ta_wide", "color_jitter": 0.4},
        "timm leaves out color_jitter beside auto_augment='ta_wide'",
    ),
    "a blur of few pixels": ({"gaussian_blur_prob": 0.1}, "gaussian_blur_prob needs images of 12 px or more, not 8"),
    "no function": ({"function": "flip"}, "augment.function must be a function or None, not 'flip'"),
    "too far": ({"rotation": 181}, "augment.rotation must be from 0 to 180, not 181"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_done_is_refused(name):
    """Each in one sentence, before anything is loaded."""
    changes, text = REFUSED[name]
    size = 8 if "blur" in name else 24
    with pytest.raises(RecipeError, match=re.escape(text)):
        check_recipe(small_recipe(augment=Augment(**changes), data=Data("generated", size, 8)), SmallNet())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("augment", [None, Augment(crop_scale=(1.0, 1.0))])
def test_pixels_may_be_read_only(augment):
    """As Pillow's are; nothing is said of it in the terminal."""
    torch.set_warn_always(True)  # not only the first time
    try:
        Pixels(inputs(), augment).image(np.asarray(Image.fromarray(PHOTOGRAPH)))
    finally:
        torch.set_warn_always(False)
