"""The command, from its arguments to the last file of the run folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from conftest import ROOT
from finetune.run import main

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """A run of resnet18_cifar on the image folder, from random weights, with its terminal's output."""
    output = tmp_path_factory.mktemp("run") / "out"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "finetune" / "run.py"),
            "--recipe",
            "resnet18_cifar",
            "--data",
            str(image_folder),
            "--weights",
            "none",
            "--set",
            "data.image_size=32",
            "--set",
            "data.batch_size=8",
            "--set",
            "mixed_precision=no",
            "--set",
            "epochs=4",
            "--seed",
            "3",
            "--output",
            str(output),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout, done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_smokes(here, capsys, name):
    """Every recipe runs end to end on generated images, says that this is no result, and has all its stages."""
    assert main(["--recipe", name, "--smoke", "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert "SMOKE RUN" in out and "promised  nothing: a smoke run" in out
    assert json.loads((here / "out" / "result.json").read_text())["smoke"] is True


LEVERS = """
from finetune.lr_schedule import Constant, Step
from finetune.recipe import *

recipe = Recipe(
    backbone="resnet18", weights="none", data=Data("cifar10", 64, 32, sampling="balanced"),
    groups=(Group("head", "fc", lr=1e-2, schedule=Step(every=5, factor=0.9, warmup_epochs=2.0), weight_decay=0.0),
            Group("top", "layer[34]", lr=1e-3, unfreeze_at=3, warmup_epochs=2.0, optimizer=SGD(momentum=0.9)),
            Group("middle", "layer2", lr=1e-3, unfreeze_at=7), Frozen("rest", ".")),
    optimizer=AdamW(), schedule=Constant(), epochs=20, norm_stats="eval", switch=Switch(at=7, optimizer=Optimizer("NAdam")),
    class_weights=tuple(range(1, 11)), early_stop=EarlyStop(patience=1), augment=Augment(mixup=0.2, cutmix=1.0, erasing=0.1),
    dropout=0.1, drop_path=0.1, ema_decay=0.9, l2_sp=0.1, flip_test=True, clip_value=1.0, score="macro_f1", loss="LOSS",
    linear_probe=LinearProbe(views=2))
"""


@pytest.mark.parametrize("loss", ["cross_entropy", "multi_label"])
def test_a_recipe_with_every_lever_smokes(here, capsys, loss):
    """The smoke run cuts every lever down to a stage an epoch: three stages, two optimizers and a switch among them."""
    text = LEVERS.replace("LOSS", loss)
    if loss == "multi_label":
        text = text.replace("macro_f1", "mean_average_precision").replace("class_weights=tuple(range(1, 11)), ", "")
        text = text.replace(', sampling="balanced"', "")
    (here / "levers.py").write_text(text)
    assert main(["--recipe", "levers.py", "--smoke", "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert [f"from epoch {epoch}: trains" in out for epoch in range(4)] == [True, True, True, False]
    rows = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows} == {-1, 0, 1, 2, 3} and {row["lr"]["rest"] for row in rows if "lr" in row} == {0.0}
    assert json.loads((here / "out" / "result.json").read_text())["drift"]["rest"] == 0.0


def test_a_run_folder_is_complete(finished, image_folder):
    """The folder holds the recipe as given and as resolved, groups, metrics, a result with its surroundings, a picture."""
    folder, _, _ = finished
    assert (folder / "recipe.py").read_text() == (ROOT / "recipes" / "resnet18_cifar.py").read_text()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["seed"], recipe["weights"], recipe["data"]["source"]) == (4, 3, "none", str(image_folder))
    assert (folder / "groups.txt").read_text().split()[0] == "group"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "grad_norm" in row]
    assert [row["step"] for row in updates] == list(range(16)) and len(rows) == 1 + 16 + 4  # the head alone first
    assert updates[0].keys() == {"step", "epoch", "loss", "grad_norm", "lr"}
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
        "updates",
    }
    assert "top5" not in result and 0 <= result["top1"] <= 1 and result["val_images"] == 15  # 3 classes: top-5 says nothing
    assert result["versions"]["torch"] == torch.__version__ and result["hardware"]["processes"] == 1
    with Image.open(folder / "curves.png") as picture:
        assert picture.size[0] > 600


def test_timm_alone_gets_the_same_score(finished, image_folder):
    """timm loads model/ by its own means, preprocesses by its own means, and classifies as many images rightly."""
    folder, _, _ = finished
    net = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    names = json.loads((folder / "model" / "config.json").read_text())["label_names"]
    assert names == ["blue", "green", "red"]
    right = 0
    for label, name in enumerate(names):
        for path in (image_folder / "val" / name).iterdir():
            with torch.no_grad():
                right += int(net(transform(Image.open(path).convert("RGB"))[None]).argmax()) == label
    result = json.loads((folder / "result.json").read_text())
    assert right == round(15 * result["top1"])
    assert timm.create_model(f"local-dir:{folder / 'model-best'}", pretrained=True).num_classes == 3


def test_the_terminal_tells_it_all_in_lines(finished):
    """Without a terminal there are lines and no bars: the group table, a line an epoch, what was reached, where it lies."""
    folder, out, err = finished
    for text in (
        "group   tensors  parameters",
        "epoch   0  training loss",
        "reached   top-1",
        "promised  nothing:",
        f"model     {folder / 'model'}",
        "layer4",
    ):
        assert text in out
    assert "\r" not in out + err and "it/s" not in err and out.count("top-1") == 1 + 4 + 3


@pytest.mark.parametrize(
    "arguments,fault",
    [
        (["--recipe", "resnet81_cifar"], "no recipe 'resnet81_cifar'. Did you mean resnet18_cifar?"),
        (["--recipe", "mine.py"], "no recipe file mine.py"),
        (["--recipe", "resnet18_cifar", "--set", "epoch=3"], "no 'epoch'. Did you mean epochs?"),
        (["--recipe", "resnet18_cifar", "--set", "groups.head.lr=0"], "group 'head': lr must be a finite number above 0"),
        (
            ["--recipe", "resnet18_cifar", "--set", "data.batch_size=10", "--accumulate", "4"],
            "can't be divided by 1 processes x 4",
        ),
        (["--recipe", "resnet18_cifar", "--data", "nowhere"], "no data set or folder 'nowhere'"),
        (["--recipe", "resnet18_cifar", "--weights", "none", "--set", "mixed_precision=fp16"], "needs a GPU"),
        (["--recipe", "efficientnet_lite0_digits", "--weights", "nowhere.pth"], "no weights file nowhere.pth"),
        (["--recipe", "efficientnet_lite0_digits", "--set", "augment.randaugment=rand-x9"], "can't read randaugment='rand-x9'"),
        (["--recipe", "resnet18_cifar", "--output", "used"], "output folder used already holds files"),
        (["--recipe", "resnet18_cifar", "--resume"], "no run to resume in runs/"),
        (["--recipe", "resnet18_cifar", "--resume", "used"], "no run to resume in used"),
    ],
)
def test_what_is_wrong_ends_in_one_message(here, capsys, arguments, fault):
    """Exit code 2, one message, no traceback, and nothing written."""
    (here / "used").mkdir()
    (here / "used" / "notes.txt").write_text("mine")
    if torch.accelerator.is_available() and "fp16" in arguments[-1]:
        pytest.skip("fp16 works here")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("finetune: ") and fault in err and "Traceback" not in err
    assert sorted(path.name for path in here.rglob("*")) == ["notes.txt", "used"]


@pytest.mark.parametrize(
    "variable,value,fault",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision belongs to the recipe"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "asked for with --accumulate"),
    ],
)
def test_the_launcher_may_not_change_the_recipe(here, capsys, monkeypatch, variable, value, fault):
    """What Accelerate's flags would change, or would seem to, is refused."""
    monkeypatch.setenv(variable, value)
    assert main(["--recipe", "efficientnet_lite0_digits"]) == 2
    assert fault in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_or_resumed(finished, capsys):
    """A folder that holds a run is refused; a finished one can't be resumed."""
    folder, _, _ = finished
    before = (folder / "result.json").stat().st_mtime_ns
    assert main(["--recipe", "resnet18_cifar", "--output", str(folder)]) == 2
    assert f"output folder {folder} already holds a run" in capsys.readouterr().err
    assert main(["--recipe", "resnet18_cifar", "--resume", str(folder)]) == 2
    assert "is finished: nothing to resume" in capsys.readouterr().err
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_resume_goes_on_and_refuses_another_recipe(finished, image_folder, tmp_path, capsys):
    """A run cut short before its end goes on to the same result; with another recipe it names what differs."""
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    (folder / "result.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99}\n')  # a line written after the checkpoint
    arguments = [
        "--recipe",
        "resnet18_cifar",
        "--data",
        str(image_folder),
        "--weights",
        "none",
        "--set",
        "data.image_size=32",
        "--set",
        "data.batch_size=8",
        "--set",
        "mixed_precision=no",
        "--seed",
        "3",
        "--resume",
        str(folder),
    ]
    assert main([*arguments, "--set", "epochs=5"]) == 2
    assert "was started with another recipe:\n  epochs: 4 before, 5 now" in capsys.readouterr().err
    assert main([*arguments, "--set", "epochs=4"]) == 0
    assert "going on after update 16, 4 epochs done" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
    results = [json.loads((path / "result.json").read_text())["top1"] for path in (folder, finished[0])]
    assert results[0] == results[1]


def test_dry_run_needs_neither_data_nor_weights(here, capsys):
    """--dry-run shows the table and the rates of a recipe whose data and weights are elsewhere, and writes nothing."""
    assert main(["--recipe", "resnet50_cifar100", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "50000 images of 100 classes at 224 px; 20 epochs of 391 updates of 128 images" in out
    assert "layer4       30  14,964,736" in out
    rates = next(line for line in out.splitlines() if line.startswith("stem ") and "e-03" in line and "-  " in line).split()
    assert rates[1:4] == ["-", "-", "-"] and rates[4] == "3.0e-03"
    assert not list(here.iterdir())


def test_an_unknown_recipe_fails_before_torch_is_loaded(command):
    """A misspelt name is answered by the script itself with exit code 2, without importing torch."""
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:], "--recipe", "resnet81_cifar"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "finetune: no recipe" in done.stderr and "torch" not in done.stderr


MINE = '''
"""A LeNet on patches of two colours."""
from PIL import Image
from torch import nn

from finetune.lr_schedule import Constant
from finetune.recipe import SGD, Data, Group, Recipe


class Patches(list):
    classes = ["dark", "light"]


def lenet():
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 12 * 12, 10))


def patches():
    return [Patches((Image.new("RGB", (28, 28), (40 + 150 * (i % 2),) * 3), i % 2) for i in range(n)) for n in (24, 8)]


recipe = Recipe(backbone=lenet, head="4", data=Data(patches, image_size=28, batch_size=8, crop_pct=1.0),
                groups=(Group("convolution", "0", lr=0.05), Group("head", "4", lr=0.05)), optimizer=SGD(momentum=0.9),
                schedule=Constant(), norm_stats="train", epochs=3)
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
