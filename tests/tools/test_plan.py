"""What is shown before a run."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from finetune.__main__ import main as verb
from finetune.data import sources
from finetune.models import pretrained
from finetune.optim.param_groups import build_param_groups, describe_param_groups, planned_lrs
from finetune.recipe import SGD, Group, Step, Switch
from finetune.recipe.load import load_recipe
from finetune.run import main
from finetune.training import setup
from helpers import RECIPES, SmallNet, small_recipe

ROWS = (
    Group("head", "fc", lr=1e-2, schedule=Step(every=1, factor=0.5)),
    Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
    Group("norm", "norm", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9)),
    Group("stem", ".", lr=0),
)


def test_the_group_table_has_first_peak_and_last_lr():
    """A late group's first and highest learning rate are those it gets; a frozen row has none; a switch has its own table."""
    recipe = small_recipe(groups=ROWS, switch=Switch(at=2, optimizer=SGD(momentum=0.5), lr_factor=2.0))
    groups = build_param_groups(recipe, SmallNet())
    first, second = (text.splitlines() for text in describe_param_groups(groups, 3, 4).split("\n\nfrom epoch 3:\n"))
    cells = {line.split()[0]: line.split() for line in first}
    lrs = planned_lrs(groups, range(12), 3, 4)
    assert cells["body"][3:6] == [f"{lr:.2g}" for lr in (lrs["body"][3], max(lrs["body"][3:6]), lrs["body"][5])]
    assert cells["stem"][-2:] == ["frozen", "never"] and cells["head"][-2:] == ["AdamW", "1"]
    later = {line.split()[0]: line.split() for line in second}
    assert later["body"][4] == f"{max(lrs['body'][6:]):.2g}" and later["body"][-2:] == ["SGD", "2"]
    assert later["norm"][-2:] == ["SGD", "3"]


def test_plan_shows_everything_and_trains_nothing(here, monkeypatch, capsys):
    """Without weights, data or network: groups, learning rates, steps, stages with memory, layers, and a picture."""
    for module in (setup, pretrained, sources):
        for name in {"pretrained_state", "load_data"} & vars(module).keys():
            monkeypatch.setattr(module, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    assert verb(["plan", "resnet18_cifar", "--set", "epochs=5", "--output", "plans", "--wide"]) == 0
    out = capsys.readouterr().out
    for text in (
        "5 epochs of 391 steps of 128 images",
        "layer4 ",
        "learning rate at the start of each epoch",
        "stages",
        "activations",
        "layers, for one image",
        "512 x 4 x 4",
        "11,181,642",
    ):
        assert text in out
    with Image.open(here / "plans" / "resnet18_cifar-plan.png") as picture:
        assert picture.size[0] > 600
    assert [path.name for path in here.rglob("*")] == ["plans", "resnet18_cifar-plan.png"]


def test_a_plan_shows_the_images_that_are_there(here, image_folder, capsys, asked):
    """Of a folder it draws images as augmented and the sizes of classes; what can't be read ends no plan; nobody is asked."""
    words = ["plan", "resnet18_cifar", "--set", "data.image_size=32", "--data"]
    assert verb([*words, str(image_folder), "--output", "plans"]) == 0
    wanted = [f"resnet18_cifar-{what}.png" for what in ("augmented", "classes", "plan")]
    assert sorted(path.name for path in Path("plans").iterdir()) == wanted
    said = capsys.readouterr().out
    assert all(f"picture  {Path('plans', name)}" in said for name in wanted)
    shutil.copytree(image_folder, "photos")
    for path in Path("photos").glob("train/*/*.png"):
        path.write_bytes(path.read_bytes()[:80])  # the header can be read
    assert verb([*words, "photos", "--output", "others"]) == 0
    assert sorted(path.name for path in Path("others").iterdir()) == wanted[1:]
    assert not asked


def test_a_dry_run_is_the_plan(here, capsys):
    """--dry-run prints what the plan prints."""
    assert main(["--recipe", "vit_small_cifar100", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert verb(["plan", "vit_small_cifar100"]) == 0
    assert capsys.readouterr().out == dry and not list(here.iterdir())


def test_find_lr_says_what_to_paste(here, capsys):
    """Learning rates far too low are told so, with what to paste; the picture lies here and is named, and nothing else."""
    words = "find-lr efficientnet_lite0_digits --weights none --set data.image_size=32 --lr-scale 0.01"
    assert verb(words.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out if not line.startswith("the loss")] == ["steepest", "valley", "picture"]
    assert all(float(line.partition("--lr-scale ")[2]) > 0.01 for line in out[:2]) and max(map(len, out)) <= 80
    assert out[-1].endswith("efficientnet_lite0_digits-lr.png")
    assert [path.name for path in here.rglob("*")] == ["efficientnet_lite0_digits-lr.png"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_fits_80_columns_and_wide_has_it_all(name, capsys):
    """No line of any recipe's plan is longer than 80 columns; with --wide every column, epoch and name is there, whole."""
    source = load_recipe(name)[0].data.source
    there = {"photos": "digits", "xray": "generated", "tiles": "generated", "steel.csv": "generated"}.get(source, source)
    words = [name, "--epochs", "30", "--data", there, "--set", "data.val_share=None"]
    assert verb(["plan", *words]) == 0
    short = capsys.readouterr().out
    assert max(map(len, short.splitlines())) <= 80
    assert verb(["plan", *words, "--wide"]) == 0
    wide = capsys.readouterr().out
    assert "..." not in wide and len(wide.splitlines()) >= len(short.splitlines()) - 3
    for heading in ("first lr", "last lr", "without decay", "gradients  optimizer", "  17  "):
        assert heading in wide and heading not in short


def test_the_lrs_as_json_are_the_plans(capsys):
    """--json has each group's learning rate at the start of each epoch, as planned_lrs has it."""
    assert verb(["plan", "resnet50_cifar100", "--json"]) == 0
    lrs = json.loads(capsys.readouterr().out)
    assert list(lrs) == ["head", "layer4", "layer3", "stem"] and {len(values) for values in lrs.values()} == {20}
    assert lrs["layer4"][:3] == [0, 0.03, 0.03] and lrs["head"][1] == 0.1


@pytest.mark.parametrize(
    "arguments,fault",
    [
        (["plan", "resnet81_cifar"], "Did you mean resnet18_cifar?"),
        (["plan", "resnet18_cifar", "--set", "groups.head.pattern=x"], "no group matches 2 parameters"),
        (["find-lr", "resnet18_cifar", "--data", "nowhere"], "no data set or folder 'nowhere'"),
    ],
)
def test_a_verb_that_fails_says_one_message(capsys, arguments, fault):
    """Exit code 2 and one message, as with a run."""
    assert verb(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("finetune: ") and err.count("finetune: ") == 1 and fault in err
