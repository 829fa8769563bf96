"""How a recipe is read and changed."""

import subprocess
import sys

import pytest

from finetune.recipe import EarlyStop, LinearProbe, Optimizer
from finetune.recipe.load import load_recipe, override
from finetune.utils.errors import RecipeError
from helpers import RECIPES, ROOT, small_recipe


def test_recipes_load_without_torch():
    """A misspelt recipe must fail in well under a second, so reading recipes imports nothing heavy."""
    code = (
        "import sys; from finetune.recipe.load import load_recipe; "
        f"[load_recipe(name) for name in {RECIPES}]; "
        "heavy = {'torch', 'timm', 'numpy', 'accelerate'} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_set_reaches_every_part():
    """--set changes fields of the recipe, its parts, its groups by name, and the optimizer's options."""
    changed = override(
        small_recipe(),
        [
            "epochs=5",
            "data.image_size=128",
            "groups.body.lr=5e-3",
            "clip_norm=None",
            "optimizer.betas=(0.9, 0.95)",
            "optimizer.weight_decay=0.1",
            "schedule.floor=0.1",
            "mixed_precision=bf16",
            "augment.crop_scale=[0.2, 1.0]",
        ],
    )
    assert (changed.epochs, changed.data.image_size, changed.groups[1].lr, changed.clip_norm) == (5, 128, 5e-3, None)
    assert changed.optimizer == Optimizer("AdamW", weight_decay=0.1, betas=(0.9, 0.95))
    assert (changed.schedule.floor, changed.mixed_precision, changed.augment.crop_scale) == (0.1, "bf16", (0.2, 1.0))


def test_set_is_checked_as_a_whole():
    """Two changes that only fit together may come in either order; values that do not fit are refused."""
    filled = override(small_recipe(), ["linear_probe.views=2", "linear_probe.l2=0.3", "early_stop.patience=4"])
    assert filled.linear_probe == LinearProbe(views=2, l2=0.3) and filled.early_stop == EarlyStop(patience=4)
    changed = override(small_recipe(), ["epochs=2", "groups.stem.unfreeze_at=1"])
    assert changed == override(small_recipe(), ["groups.stem.unfreeze_at=1", "epochs=2"])
    with pytest.raises(RecipeError, match="with --set epochs=2, this recipe .*\n  groups.stem: unfreeze_at=2 is past the"):
        override(small_recipe(), ["epochs=2"])


@pytest.mark.parametrize(
    "assignment,fault",
    [
        ("epoch=3", "no 'epoch'. Did you mean epochs?"),
        ("groups.haed.lr=1", "no 'haed'. Did you mean head? There are: head, body, stem"),
        ("groups.head.lrr=1", "no 'lrr'. Did you mean lr?"),
        ("data.imagesize=3", "no 'imagesize'. Did you mean image_size?"),
        ("seed.x=3", "no 'x'. Nothing lies below it."),
        ("epochs", "write FIELD=VALUE"),
        ("linear_probe.view=2", "no 'view'. Did you mean views?"),
        ("linear_probe.views.x=2", "no 'x'. Nothing lies below it."),
        ("clip_value.x=2", "no 'x'. Nothing lies below it."),
        ("optimizer.betas.x=2", "no 'x'. Nothing lies below it."),
        ("switch.at=2", "the recipe has no switch yet, and one needs more than that: at, optimizer, lr_factor"),
        ("epochs=3.5", "epochs must be a whole number, not 3.5"),
        ("groups.head.lr=fast", "groups.head.lr must be a number, not 'fast'"),
    ],
)
def test_wrong_set_is_named(assignment, fault):
    """A --set that can't be done says which, and what there is instead."""
    with pytest.raises(RecipeError) as caught:
        override(small_recipe(), [assignment])
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    "text,fault",
    [
        ("x = 1", "is no recipe: it needs a line 'recipe = Recipe(...)'"),
        ("recipe = ", ":1: SyntaxError"),
        (
            "from finetune.recipe import Group\n\nrecipe = Group('a', 'b', lr=1.0, unfreze_at=3)",
            ":3: Group has no field 'unfreze_at'. Did you mean unfreeze_at?",
        ),
        ("from finetune import Cosine\nCosine(warmup=3)", ":2: Cosine has no field 'warmup'. Did you mean"),
        ("from finetune import Cosinus", "cannot import name 'Cosinus'"),
        ("\n1/0", ":2: ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, fault):
    """What is wrong in a recipe's file is said with its line."""
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert fault in str(caught.value) and str(file) in str(caught.value)


def test_unknown_names():
    """A recipe that does not exist is answered with the nearest one and all there are."""
    with pytest.raises(RecipeError, match=r"no recipe 'resnet81_cifar'. Did you mean resnet18_cifar\? Recipes here: dino"):
        load_recipe("resnet81_cifar")
    with pytest.raises(RecipeError, match="no recipe file nowhere.py"):
        load_recipe("nowhere.py")
