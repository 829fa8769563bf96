"""What the README tells a reader to write."""

import re

import pytest

from conftest import ROOT, small_recipe
from finetune import lr_schedule, recipe
from finetune.backbone import outline
from finetune.plan import check
from finetune.recipe import LayerDecay

README = (ROOT / "README.md").read_text()
NAMES = {**vars(recipe), **vars(lr_schedule)}
TABLE = README[README.index("## Levers"):README.index("## In other loops")]
LEVERS = re.findall(r"^\| .+? \| `(.+?)` \| .+? \|$", TABLE, re.M)
OF_TIMM = {"groups": LayerDecay(head_lr=1e-3, stem_ratio=0.1), "backbone": "resnet18", "head": None}


@pytest.mark.parametrize("fields", LEVERS)
def test_every_lever_of_the_table_is_a_recipe(fields):
    """What the table of levers shows can be written into a recipe, and fits a network."""
    changes = eval(f"dict({fields})", NAMES)
    of_timm = "LayerDecay" in fields or changes.keys() & {"dropout", "gradient_checkpointing"}
    made = small_recipe(**{**(OF_TIMM if of_timm else {}), **changes})
    assert all(getattr(made, name) == value for name, value in changes.items())
    check(made, outline(made))


def test_the_table_has_every_field():
    """Each field of a recipe that changes training has its line."""
    told = {name for fields in LEVERS for name in re.findall(r"(\w+)=", fields)}
    fields = set(recipe.Recipe.__dataclass_fields__) | set(recipe.Group.__dataclass_fields__) | set(
        recipe.Augment.__dataclass_fields__)
    elsewhere = {"backbone", "weights", "head", "seed", "epochs", "name", "pattern", "crop_scale", "crop_ratio", "hflip",
                 "color_jitter"}  # shown with the recipe itself
    assert fields - told == elsewhere
    assert all(f"`{kind.__name__}`" in TABLE for kind in lr_schedule.Schedule.__subclasses__())
