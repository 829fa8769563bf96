"""Images of more than one size: trained at one and evaluated at another, or growing over the run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.layers import resample_abs_pos_embed

from finetune import run
from finetune.data.loader import load
from finetune.data.sources import load_data
from finetune.export.export import export
from finetune.inference.evaluate import evaluate
from finetune.inference.predict import compute_logits
from finetune.models.backbone import build_backbone, meta_backbone
from finetune.models.saved import load_model
from finetune.recipe import Augment, Data, Group, LinearProbe, Lora
from finetune.recipe.load import override
from finetune.recipe.recipe import minimal_recipe
from finetune.tools.plan import describe_sizes
from finetune.training.setup import check_recipe
from finetune.utils.errors import RecipeError
from finetune.utils.seed import keyed_seed, seed_cpu
from helpers import PIXEL_ROUNDING, SmallNet, noise, prepare, run_here, small_recipe, timm_alone


def with_sizes(backbone, *fields, epochs=4):
    """A recipe on generated images with these fields of `data`."""
    return override(minimal_recipe(backbone, "generated", 64, 8), [*(f"data.{field}" for field in fields), f"epochs={epochs}"])


@pytest.mark.parametrize("epochs", [2, 3, 4, 7, 10, 30])
@pytest.mark.parametrize(("start", "image", "step"), [(64, 128, 32), (112, 224, 16), (98, 224, 14), (24, 32, 8)])
def test_sizes_rise_in_a_straight_line(epochs, start, image, step):
    """numpy's, between the first epoch and the last quarter, to a whole step; no epoch of the run is out of it."""
    data = Data("generated", (image, image + 3 * step), 8, start_size=(start, image))
    found = [data.sides_in(epoch, epochs) for epoch in range(epochs)]
    full = max(1, int(0.75 * epochs))
    for side, low, high in ((0, start, image), (1, image, image + 3 * step)):
        line = np.interp(range(epochs), (0, full), (low, high))
        apart = np.abs([sides[side] for sides in found] - line)
        assert apart.max() <= step / 2 and all((sides[side] - low) % step == 0 for sides in found)
    assert found[0] == data.start_sides and set(found[full:]) == {data.sides} and found == sorted(found)


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_augmented_images_are_timms_of_the_epochs_size(image_folder, erasing):
    """At each size; any number of workers, which stay from epoch to epoch, gives the same pixels to the bit."""
    recipe = small_recipe(
        backbone="test_resnet",
        head=None,
        groups=minimal_recipe("test_resnet", "digits", 32).groups,
        data=Data(str(image_folder), 48, 8, start_size=16, test_size=(64, 80)),
        augment=Augment(erasing=erasing, vflip=0.5),
    )
    _, _, (train, val) = prepare(recipe)
    indices, sizes = [0, 7, 20], []
    for epoch in range(recipe.epochs):
        alone, background = (next(load(train, epoch, [indices], workers))[0] for workers in (0, 2))
        assert torch.equal(alone, background)
        sizes.append(alone.shape[-1])
        inputs = train.transform.preprocessing | {"input_size": (3, sizes[-1], sizes[-1])}
        drawn = {"scale": (0.35, 1.0), "ratio": (3 / 4, 4 / 3), "vflip": 0.5, "re_prob": erasing, "re_mode": "pixel"}
        theirs = create_transform(**inputs, **drawn, is_training=True, color_jitter=None)
        for ours, index in zip(alone, indices, strict=True):
            seed_cpu(keyed_seed(recipe.seed, epoch, index))
            apart = (ours - theirs(Image.fromarray(train.read(index)[0]))).abs() * 255 * 0.225
            assert apart.max() < 8 and apart.mean() < 0.3  # bytes that PIL rounds otherwise
    assert sizes == [16, 32, 32, 48]
    assert next(load(train, recipe.epochs, [indices], 0))[0].shape[-1] == 48  # what is no epoch, such as a probe's view
    by_timm = create_transform(**val.transform.preprocessing)
    ours = next(load(val, 0, [[1]], 0))[0][0]
    assert ours.shape[1:] == (64, 80)
    assert ((ours - by_timm(Image.fromarray(val.read(1)[0]))).abs() * 255 * 0.225).max() < 8


RECIPE = """
from finetune import AdamW, Cosine, Data, Group, Recipe

recipe = Recipe(backbone="test_vit3", weights="none", data=Data("IMAGES", 64, 8, start_size=32, test_size=(96, 80)), epochs=4,
    groups=(Group("head", "fc|head", lr=1e-3), Group("rest", ".", lr=1e-4)), optimizer=AdamW(), schedule=Cosine(),
    batch_norm="frozen")
"""


def test_the_size_of_evaluation_goes_through_everything(tmp_path, image_folder, capfd):
    """Validated, saved, predicted, evaluated and exported at that size; timm alone gets the same logits from the files."""
    file, folder = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(RECIPE.replace("IMAGES", str(image_folder)))
    assert run.main(["--recipe", str(file), "--output", str(folder)]) == 0
    said = capfd.readouterr()
    sizes = [line for line in said.out.splitlines() if line.endswith(" px")]
    assert sizes == [f"from epoch {epoch}: images of {size} px" for epoch, size in ((1, 32), (3, 64))]
    assert "heat maps" not in said.err
    model = load_model(folder)
    assert list(model.preprocessing["input_size"]) == [3, 96, 80]
    result = json.loads((folder / "result.json").read_text())
    assert evaluate(folder, image_folder)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    images = load_data(model.recipe).val
    logits, _ = compute_logits(model, images, "stop", 0)
    theirs = timm_alone(folder / "model", images.items)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=PIXEL_ROUNDING)
    about = json.loads((export(folder, "torch") / "model.json").read_text())
    assert about["checked"]["largest_difference"] < 1e-4 and about["preprocessing"]["input_size"] == [3, 96, 80]
    card = (export(folder, "timm") / "README.md").read_text()
    assert "- input_size: [3, 96, 80]" in card
    assert "32 to 64 px, 96 x 80 px in evaluation" in (folder / "report.html").read_text()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit3", "eva02_tiny_patch14_224"])
def test_the_network_that_is_saved_is_the_one_that_was_trained(tmp_path, backbone):
    """timm, which builds it for the size of evaluation alone, computes the same logits from the saved weights."""
    patch = 14 if "patch14" in backbone else 16
    recipe = with_sizes(backbone, f"image_size={4 * patch}", f"start_size={2 * patch}", f"test_size={6 * patch}")
    recipe = replace(recipe, weights="none", epochs=2)
    net, _ = run_here(recipe, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path / 'model-best'}", pretrained=True).eval()
    again.load_state_dict(net.state_dict())
    assert not getattr(again, "dynamic_img_size", False)  # which would be in the graphs of exporters
    assert again.pretrained_cfg["fixed_input_size"] is timm.get_pretrained_cfg(backbone).fixed_input_size
    images = noise(3, 6 * patch)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), again(images), rtol=0, atol=1e-5)


def test_position_embeddings_are_resampled_for_training():
    """In a forward pass at another size they are timm's, resampled from those of the size of evaluation."""
    recipe = replace(with_sizes("test_vit3", "image_size=64", "test_size=96"), weights="none")
    net, other = build_backbone(recipe, 5).eval(), timm.create_model("test_vit3", num_classes=5, img_size=64).eval()
    assert net.patch_embed.grid_size == (6, 6)
    state = net.state_dict()
    tokens = net.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [4, 4], num_prefix_tokens=tokens)
    other.load_state_dict(state)
    images = noise(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(images), other(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "fields", "fault"),
    [
        ("resnet18", ("start_size=64",), "start_size=64 must be below image_size=64"),
        ("resnet18", ("image_size=64,96", "start_size=96"), r"start_size=96 must be below image_size=\(64, 96\)"),
        ("resnet18", ("start_size=33",), "steps of 32, 16, 14 or 8 pixels, and none of these divides both 33 and 64"),
        ("vgg11", ("start_size=8",), "vgg11 does not take 8 x 8 images: .*; --set data.start_size=32"),
        ("test_vit", ("start_size=40",), "into which 40 x 40 does not divide: --set data.start_size=32 or 48"),
        ("test_vit", ("test_size=100",), "into which 100 x 100 does not divide: --set data.test_size=96 or 112"),
        ("mixer_s16_224", ("test_size=96",), "one size in a run, not 64 px, 96 px in evaluation: leave out data.test_size"),
        ("beit_base_patch16_224", ("start_size=32",), "one size in a run, not 32 to 64 px: leave out data.start_size"),
    ],
)
def test_a_size_that_does_not_fit_is_one_message(backbone, fields, fault):
    """Before the first step, with the field and what there is instead."""
    with pytest.raises(RecipeError, match=fault):
        meta_backbone(with_sizes(backbone, *fields))


def test_what_does_not_go_with_growing_images_is_refused():
    """A single epoch; what is kept of images of one size; a blur that the smallest are too small for."""
    growing = Data("generated", 24, 8, start_size=8)
    with pytest.raises(RecipeError, match="start_size has no effect in a single epoch"):
        small_recipe(data=growing, epochs=1, groups=small_recipe().groups[:1])
    with pytest.raises(RecipeError, match="frozen_views does not go with data.start_size"):
        small_recipe(data=growing, augment=Augment(frozen_views=1))
    recipe = small_recipe(data=growing, augment=Augment(gaussian_blur_prob=0.1))
    with pytest.raises(RecipeError, match="needs images of 12 px or more, not 8"):
        check_recipe(recipe, SmallNet())


def test_a_linear_probe_sees_what_is_evaluated(tmp_path, monkeypatch):
    """Its first view of the training images is that of evaluation, at its size; the others are augmented, at image_size."""
    seen = []
    monkeypatch.setattr(SmallNet, "forward", counting(SmallNet.forward, seen))
    data = Data("generated", 24, 8, start_size=16, test_size=40)
    run_here(small_recipe(data=data, linear_probe=LinearProbe(views=2)), tmp_path)
    train, val = [8, 8, 6], [8, 2]
    probe = [*((n, 40) for n in train), *((n, 24) for n in train), *((n, 40) for n in val)]
    epochs = [[*((n, size) for n in train), *((n, 40) for n in val)] for size in (16, 16, 24, 24)]
    assert seen == sum(epochs, probe)


def counting(forward, seen):
    """The method, which notes how many images it gets, and their side."""

    def noting(net, images):
        seen.append((len(images), images.shape[-1]))
        return forward(net, images)

    return noting


SIZES = {"start_size": 32, "image_size": 64, "test_size": 96}
OPTIONS = {
    "channels": {"data": Data("generated", batch_size=8, channels=3, **SIZES), "loss": "binary"},
    "balanced, mixed, averaged": {
        "data": Data("generated", batch_size=8, sampling="balanced", **SIZES),
        "augment": Augment(mixup=0.4, cutmix=1.0),
        "ema_decay": 0.9,
    },
    "adapters of a ViT": {
        "backbone": "test_vit3",
        "head": None,
        "groups": (Group("head", "head", lr=1e-3), Lora("qkv", ".*qkv", lr=1e-3), Group("rest", ".", lr=0)),
        "gradient_checkpointing": True,
        "flip_test": True,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_sizes_go_with_every_option(tmp_path, monkeypatch, option):
    """Epochs train at their own size and are validated at test_size; two micro-batches a step do what one does."""
    recipe, losses = small_recipe(**{"data": Data("generated", batch_size=8, **SIZES), **OPTIONS[option]}), []
    check_recipe(recipe, meta_backbone(recipe))
    for accumulate in (1, 2):
        seen, real = [], torch.nn.Conv2d.forward

        def noting(conv, images, seen=seen, real=real):
            if images.shape[1] == 3:
                seen.append((images.shape[-1], torch.is_grad_enabled()))
            return real(conv, images)

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.Conv2d, "forward", noting)
            _, rows = run_here(recipe, tmp_path / str(accumulate), accumulate=accumulate)
        assert list(dict.fromkeys(seen)) == [(32, True), (96, False), (64, True)]
        assert max(i for i, one in enumerate(seen) if one == (32, True)) < seen.index((64, True))
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_jpegs_are_decoded_for_the_largest_size(tmp_path):
    """No training image is decoded smaller than a linear probe needs it; validation images are decoded whole."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.effect_noise((512, 512), 50).convert("RGB").save(tmp_path / split / name / "0.jpg")
    for test, side in ((None, 64), (96, 128), (64, 64)):
        data = Data(str(tmp_path), 64, 2, reduced_decode=1, test_size=test)
        _, _, (train, val) = prepare(small_recipe(data=data))
        assert train.read(0)[0].shape == (side, side, 3) and val.read(0)[0].shape == (512, 512, 3)


def test_a_plan_says_which_epochs_have_which_size():
    """Counted from 1, with the size of evaluation and the images of a step."""
    recipe = with_sizes("resnet18", "image_size=128", "start_size=64", "test_size=160", epochs=8)
    said = "64 px in epochs 1 to 2, 96 px in epochs 3 to 5, 128 px in epochs 6 to 8; 160 px in evaluation"
    assert describe_sizes(recipe) == f"{said}; a step has 8 images at each size"
    assert describe_sizes(replace(recipe, epochs=4)).startswith("64 px in epoch 1, 96 px in epochs 2 to 3, 128 px in epoch 4;")
