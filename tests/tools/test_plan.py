"""What is shown before a run."""

import pytest
from PIL import Image

from finetune.__main__ import main as verb
from finetune.data import sources
from finetune.models import pretrained
from finetune.optim.param_groups import build_param_groups, describe_param_groups, planned_lrs
from finetune.recipe import SGD, Group, Step, Switch
from finetune.run import main
from finetune.training import setup
from helpers import SmallNet, small_recipe

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
    first, second = (text.splitlines() for text in describe_param_groups(groups, 3, 4).split("\n\nfrom epoch 2:\n"))
    cells = {line.split()[0]: line.split() for line in first}
    lrs = planned_lrs(groups, range(12), 3, 4)
    assert cells["body"][3:6] == [f"{lr:.2g}" for lr in (lrs["body"][3], max(lrs["body"][3:6]), lrs["body"][5])]
    assert cells["stem"][-2:] == ["frozen", "never"] and cells["head"][-2:] == ["AdamW", "0"]
    later = {line.split()[0]: line.split() for line in second}
    assert later["body"][4] == f"{max(lrs['body'][6:]):.2g}" and later["body"][-2:] == ["SGD", "1"]
    assert later["norm"][-2:] == ["SGD", "2"]


def test_plan_shows_everything_and_trains_nothing(here, monkeypatch, capsys):
    """Without weights, data or network: groups, learning rates, steps, stages with memory, layers, and a picture."""
    for module in (setup, pretrained, sources):
        for name in {"pretrained_state", "load_data"} & vars(module).keys():
            monkeypatch.setattr(module, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    assert verb(["plan", "resnet18_cifar", "--set", "epochs=5", "--output", "plans"]) == 0
    out = capsys.readouterr().out
    for text in (
        "5 epochs of 196 steps of 256 images",
        "layer4 ",
        "learning rate at the start of each epoch",
        "stages",
        "activations",
        "layers, for one image",
        "512 x 7 x 7",
        "11,181,642",
    ):
        assert text in out
    with Image.open(here / "plans" / "resnet18_cifar-plan.png") as picture:
        assert picture.size[0] > 600
    assert [path.name for path in here.iterdir()] == ["plans"]


def test_a_dry_run_is_the_plan(here, capsys):
    """--dry-run prints what the plan prints."""
    assert main(["--recipe", "vit_small_cifar100", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert verb(["plan", "vit_small_cifar100"]) == 0
    assert capsys.readouterr().out == dry and not list(here.iterdir())


def test_find_lr_says_what_to_paste(here, capsys):
    """The verb prints two suggestions as one option for all learning rates, draws the picture, and writes nothing else."""
    words = "find-lr efficientnet_lite0_digits --weights none --set data.image_size=32 --output out"
    assert verb(words.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["steepest", "valley", "picture"]
    assert all(line.count("--set lr_scale=") == 1 for line in out[:2])
    assert [path.name for path in here.rglob("*")] == ["out", "efficientnet_lite0_digits-lr.png"]


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
