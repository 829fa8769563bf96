"""The command, from its arguments to the last file of the run folder."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from finetune.recipe.load import load_recipe
from finetune.run import main
from helpers import RECIPES, ROOT, timm_alone


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_smokes(here, capsys, name):
    """Every recipe runs end to end on generated images, says that this is no result, and has all its stages."""
    assert main(["--recipe", name, "--smoke", "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert "SMOKE RUN" in out and "baseline  none: a smoke run" in out
    result, rows = json.loads((here / "out" / "result.json").read_text()), load_recipe(name)[0].groups
    stages = len({0} | {getattr(row, "unfreeze_at", 0) for row in (rows if isinstance(rows, tuple) else [rows])})
    assert [f"from epoch {epoch + 1}: trains" in out for epoch in range(stages + 1)] == [True] * stages + [False]
    assert result["smoke"] is True and result["epochs"] == stages + 1


EVERY_OPTION = """
from finetune import *

recipe = Recipe(
    backbone="resnet18", weights="none", data=Data("cifar10", 64, 32, sampling="balanced"),
    groups=(Group("head", "fc", lr=1e-2, schedule=Step(every=5, factor=0.9, warmup_epochs=2.0), weight_decay=0.0),
            Group("top", "layer[34]", lr=1e-3, unfreeze_at=3, warmup_epochs=2.0, optimizer=SGD(momentum=0.9)),
            Group("middle", "layer2", lr=1e-3, unfreeze_at=7), Group("rest", ".", lr=0)),
    optimizer=AdamW(), schedule=Constant(), epochs=20, batch_norm="frozen", switch=Switch(at=7, optimizer=Optimizer("NAdam")),
    class_weights=tuple(range(1, 11)), early_stop=EarlyStop(patience=1), augment=Augment(mixup=0.2, cutmix=1.0, erasing=0.1),
    dropout=0.1, drop_path=0.1, ema_decay=0.9, l2_sp=0.1, flip_test=True, clip_value=1.0, metric="macro_f1", loss="LOSS",
    linear_probe=LinearProbe(views=2))
"""


@pytest.mark.parametrize("loss", ["cross_entropy", "multi_label"])
def test_a_recipe_with_every_option_smokes(here, capsys, loss):
    """The smoke run cuts every option down to a stage an epoch: three stages, two optimizers and a switch among them."""
    text = EVERY_OPTION.replace("LOSS", loss)
    if loss == "multi_label":
        text = text.replace("macro_f1", "mean_average_precision").replace("class_weights=tuple(range(1, 11)), ", "")
        text = text.replace(', sampling="balanced"', "")
    (here / "options.py").write_text(text)
    assert main(["--recipe", "options.py", "--smoke", "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert [f"from epoch {epoch + 1}: trains" in out for epoch in range(4)] == [True, True, True, False]
    rows = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows} == {-1, 0, 1, 2, 3} and {row["lr"]["rest"] for row in rows if "lr" in row} == {0.0}
    assert json.loads((here / "out" / "result.json").read_text())["drift"]["rest"] == 0.0


def test_a_run_folder_is_complete(finished, image_folder):
    """The folder holds the recipe as given and as resolved, groups, metrics, a result with versions and hardware, a picture."""
    folder, _, _ = finished
    assert (folder / "recipe.py").read_text() == (ROOT / "recipes" / "resnet18_cifar.py").read_text()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["seed"], recipe["weights"], recipe["data"]["source"]) == (4, 3, "none", str(image_folder))
    assert (folder / "groups.txt").read_text().split()[0] == "group"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    assert [row["step"] for row in steps] == list(range(16)) and len(rows) == 1 + 16 + 4  # the linear probe first
    assert steps[0].keys() == {"step", "epoch", "loss", "grad_norm", "lr"}
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() >= {
        "top1",
        "loss",
        "macro_f1",
        "class_accuracy",
        "seconds",
        "images_per_second",
        "peak_memory_gib",
        "seed",
        "versions",
        "hardware",
        "best_epoch",
        "best_top1",
        "val_images",
        "steps",
    }
    assert "top5" not in result and 0 <= result["top1"] <= 1 and result["val_images"] == 15  # 3 classes: top-5 says nothing
    assert result["versions"]["torch"] == torch.__version__ and result["hardware"]["processes"] == 1
    with Image.open(folder / "curves.png") as picture:
        assert picture.size[0] > 600


def test_timm_by_itself_gets_the_same_metric(finished, image_folder):
    """timm loads model/ by its own means, preprocesses by its own means, and classifies as many images rightly."""
    folder, _, _ = finished
    names = json.loads((folder / "model" / "config.json").read_text())["label_names"]
    assert names == ["blue", "green", "red"]
    files = sorted((image_folder / "val").rglob("*.png"))
    guesses = timm_alone(folder / "model", files).argmax(1)
    right = sum(file.parent.name == names[guess] for file, guess in zip(files, guesses, strict=True))
    assert right == round(15 * json.loads((folder / "result.json").read_text())["top1"])
    assert timm.create_model(f"local-dir:{folder / 'model-best'}", pretrained=True).num_classes == 3


def test_the_terminal_has_it_all_in_lines(finished):
    """Without a terminal there are lines and no bars: the group table, a line an epoch, the result, where it lies."""
    folder, out, err = finished
    for text in (
        "group   parameters  peak lr",
        "training loss  validation loss",
        "epoch 4 of 4  ",
        "result    top-1",
        "baseline  not measured",
        "use       model",
        f"finetune predict {folder} PHOTO",
        "layer4",
    ):
        assert text in out
    assert "\r" not in out + err and "it/s" not in err and out.count("epoch 4 of 4") == 1


MINE = '''
"""A LeNet on patches of two colours."""
from PIL import Image
from torch import nn

from finetune import SGD, Constant, Data, Group, Recipe


class Patches(list):
    classes = ["dark", "light"]


def lenet():
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 12 * 12, 10))


def patches():
    return [Patches((Image.new("RGB", (28, 28), (40 + 150 * (i % 2),) * 3), i % 2) for i in range(n)) for n in (24, 8)]


recipe = Recipe(backbone=lenet, head="4", data=Data(patches, image_size=28, batch_size=8, crop_pct=1.0),
                groups=(Group("convolution", "0", lr=0.05), Group("head", "4", lr=0.05)), optimizer=SGD(momentum=0.9),
                schedule=Constant(), batch_norm="train", epochs=3)
'''


@pytest.mark.parametrize("start", ["script", "module"])
def test_a_copied_recipe_runs_from_any_folder(tmp_path, command, start):
    """A file anywhere, with its own network and data, runs from its folder with nothing else edited, and learns."""
    (tmp_path / "mine.py").write_text(MINE)
    starts = {"script": command, "module": [sys.executable, "-m", "finetune.run"]}
    done = subprocess.run(
        [*starts[start], "--recipe", "mine.py", "--output", "out", "--workers", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)} if start == "module" else None,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["top1"] == 1.0
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["label_names"] == ["dark", "light"]
