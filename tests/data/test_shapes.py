"""Images that are not square, and networks that do not take squares."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import run
from finetune.data.sources import load_data
from finetune.export.export import export
from finetune.inference.evaluate import evaluate
from finetune.inference.predict import compute_logits
from finetune.models.backbone import meta_backbone
from finetune.models.pretrained import preprocessing
from finetune.models.saved import load_model
from finetune.recipe import Data
from finetune.recipe.load import override
from finetune.recipe.recipe import minimal_recipe
from finetune.recipe.serialize import from_dict, to_dict
from finetune.utils.errors import RecipeError
from helpers import PIXEL_ROUNDING, on_folder, timm_alone


@pytest.fixture(scope="module")
def long_images(tmp_path_factory):
    """Two classes that differ at one end of long images, on their sides and upright."""
    root = tmp_path_factory.mktemp("long")
    for split, count in (("train", 6), ("val", 3)):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(10 * label + i).randint(0, 100, (30, 90, 3))
                pixels[:, :20] += 150 * label
                pixels = pixels if i % 3 else pixels.transpose(1, 0, 2)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / str(label) / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("backbone", "size", "resize"),
    [("test_resnet", (32, 64), "pad"), ("test_vit", (32, 96), "squash"), ("test_resnet", 32, "pad"), ("test_vit", 64, "crop")],
)
def test_a_shape_goes_through_everything(tmp_path, long_images, backbone, size, resize):
    """Trained, saved, predicted, evaluated and exported in that shape; timm alone gets the same logits from the files."""
    fields = [
        f"data.image_size={size}",
        f"data.resize={resize}",
        f"backbone={backbone}",
        "epochs=1",
    ]
    words = on_folder(long_images, tmp_path / "run", *fields)
    words[words.index("resnet18_cifar")] = str(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(RECIPE)
    assert run.main([*words, "--quiet"]) == 0
    model = load_model(tmp_path / "run")
    assert list(model.preprocessing["input_size"][1:]) == list(size if isinstance(size, tuple) else (size, size))
    assert evaluate(tmp_path / "run", long_images)["loss"] == pytest.approx(
        json.loads((tmp_path / "run" / "result.json").read_text())["loss"], rel=1e-5
    )
    images = load_data(model.recipe).val
    logits, _ = compute_logits(model, images, "stop", 0)
    theirs = timm_alone(tmp_path / "run" / "model", images.items)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=PIXEL_ROUNDING)
    about = json.loads((export(tmp_path / "run", "torch") / "model.json").read_text())
    assert about["checked"]["largest_difference"] < 1e-4


RECIPE = """
from finetune import AdamW, Cosine, Data, Group, Recipe

recipe = Recipe(backbone="test_resnet", weights="none", data=Data("generated", 32, 8), batch_norm="frozen", epochs=1,
    groups=(Group("head", "fc|head", lr=1e-3), Group("rest", ".", lr=1e-4)), optimizer=AdamW(), schedule=Cosine())
"""


@pytest.mark.parametrize(
    ("resize", "mode", "crop_pct"),
    [(None, "center", 0.875), ("crop", "center", 0.875), ("pad", "border", 1.0), ("squash", "squash", 1.0)],
)
def test_all_of_an_image_is_seen_where_it_is_padded_or_squashed(resize, mode, crop_pct):
    """The weights' own crop is left out there, unless the recipe asks for one."""
    recipe = minimal_recipe("resnet18.tv_in1k", "digits", 64)
    for asked, given in ((None, crop_pct), (0.9, 0.9)):
        changed = override(recipe, [f"data.resize={resize}", f"data.crop_pct={asked}"])
        inputs = preprocessing(changed, meta_backbone(changed, 10))
        assert (inputs["crop_mode"], inputs["crop_pct"]) == (mode, given)


def test_the_weights_own_way_is_kept():
    """Some are evaluated on squashed images, and are here, unless the recipe says otherwise."""
    recipe = minimal_recipe("convnext_base.fb_in22k_ft_in1k_384", "digits", 384)
    assert preprocessing(recipe, meta_backbone(recipe, 10))["crop_mode"] == "squash"


@pytest.mark.parametrize(
    ("backbone", "size", "fault"),
    [
        (
            "vit_small_patch16_224",
            (100, 224),
            r"16 x 16 pixels, into which 100 x 224 .*image_size=96,224 or 112,224$",
        ),
        ("vit_small_patch14_dinov2", (100, 100), r"image_size=98 or 112$"),
        ("crossvit_tiny_240", (240, 480), "are for 240 x 240 images"),
    ],
)
def test_a_shape_that_does_not_fit_is_one_message(backbone, size, fault):
    """With the sizes that do."""
    with pytest.raises(RecipeError, match=fault):
        meta_backbone(minimal_recipe(backbone, "digits", size), 10)


@pytest.mark.parametrize("size", [(0, 32), (32, 32, 32), 2.5, (32.0, 32)])
def test_what_is_no_size_is_refused(size):
    """Two whole numbers above 0, or one."""
    with pytest.raises(RecipeError, match="data.image_size must be"):
        minimal_recipe("resnet18", "digits", size)


def test_a_shape_is_written_and_read():
    """In recipe.json as a list, and as "64 x 256" in words."""
    recipe = minimal_recipe("resnet18", "digits", (64, 256))
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert recipe.data.pixels == "64 x 256" and Data("digits", 64, 8).pixels == "64"
    assert override(recipe, ["data.image_size=32,64"]).data.sides == (32, 64)
