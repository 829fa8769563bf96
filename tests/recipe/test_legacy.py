"""Recipes and run folders of version 0.1: read, each old name with a warning that gives today's."""

import importlib
import sys
import warnings
from dataclasses import replace

import pytest

from finetune.recipe import Augment, Constant, Cosine, Frozen, Group, LinearProbe
from finetune.recipe.load import load_recipe, override
from finetune.recipe.serialize import diff, from_dict, to_dict
from finetune.utils.errors import RecipeError
from helpers import small_recipe

OLD_FILE = '''"""A recipe as version 0.1 has it."""
from finetune.baseline import Baseline
from finetune.lr_schedule import Cosine
from finetune.recipe import AdamW, Augment, Data, Frozen, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="test_resnet",
    weights="none",
    data=Data("digits", image_size=24, batch_size=8),
    augment=Augment(hflip=0.0, randaugment="rand-m9"),
    linear_probe=LinearProbe(),
    groups=(
        Group("head", "fc", lr=1e-2),
        Frozen("rest", "."),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    norm_stats="eval",
    score="macro_f1",
    epochs=4,
)

baseline = Baseline(metric="macro_f1", mean=0.9, low=0.8, high=1.0)
'''
NEW = replace(
    small_recipe(backbone="test_resnet", head=None, groups=(Group("head", "fc", lr=1e-2), Group("rest", ".", lr=0))),
    data=replace(small_recipe().data, source="digits"),
    augment=Augment(hflip=0.0, auto_augment="rand-m9"),
    linear_probe=LinearProbe(),
    batch_norm="frozen",
    metric="macro_f1",
)


def old_values():
    """NEW as version 0.1 wrote it in a run's recipe.json."""
    values = to_dict(NEW)
    values["norm_stats"] = {"frozen": "eval"}[values.pop("batch_norm")]
    values["score"] = values.pop("metric")
    values["augment"]["randaugment"] = values["augment"].pop("auto_augment")
    values["groups"][1] = {"type": "Frozen", "name": "rest", "pattern": "."}
    del values["lr_scale"]
    return values


def test_a_recipe_file_of_version_01_loads(tmp_path, monkeypatch):
    """It gives today's recipe, and a FutureWarning at the file's own line for each old name, with the new one."""
    file = tmp_path / "mine.py"
    file.write_text(OLD_FILE)
    for module in ("finetune.lr_schedule", "finetune.baseline"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.warns(FutureWarning) as caught:
        assert load_recipe(str(file))[0] == NEW
    lines = OLD_FILE.splitlines()
    assert {(lines[warning.lineno - 1].strip(), str(warning.message)) for warning in caught} == {
        ("from finetune.lr_schedule import Cosine", "finetune.lr_schedule is now finetune: from finetune import Cosine, ..."),
        ('Frozen("rest", "."),', "Frozen('rest', '.') is now Group('rest', '.', lr=0)"),
        ("recipe = Recipe(", "norm_stats='eval' is now batch_norm='frozen'; please rename it"),
        ("recipe = Recipe(", "score='macro_f1' is now metric='macro_f1'; please rename it"),
        (
            'augment=Augment(hflip=0.0, randaugment="rand-m9"),',
            "randaugment='rand-m9' is now auto_augment='rand-m9'; please rename it",
        ),
        (lines[-1], "baseline = Baseline(...) is no longer read: please delete it"),
    }
    assert {warning.filename for warning in caught} == {str(file)}


def test_a_run_folder_of_version_01_is_read():
    """Its recipe.json gives today's recipe, without a warning: there is nothing that a person should rename."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_dict(old_values()) == NEW and not diff(from_dict(old_values()), NEW)


def test_a_run_with_a_schedule_that_was_removed_is_read():
    """A run with Polynomial is still read, its schedule by its name alone."""
    values = old_values() | {"schedule": {"type": "Polynomial", "warmup_epochs": 0.5, "warmup_start": 0.01, "power": 2.0}}
    read = from_dict(values)
    assert to_dict(read.schedule) == values["schedule"] and replace(read, schedule=NEW.schedule) == NEW


@pytest.mark.parametrize(
    "old,new",
    [
        ({"norm_stats": "eval"}, {"batch_norm": "frozen"}),
        ({"norm_stats": "train"}, {"batch_norm": "train"}),
        ({"score": "macro_f1"}, {"metric": "macro_f1"}),
    ],
)
def test_an_old_name_outweighs_its_new_one(old, new):
    """dataclasses.replace with an old name changes the field, as it did."""
    recipe = small_recipe(batch_norm="sync")
    with pytest.warns(FutureWarning, match="please rename it"):
        assert replace(recipe, **old) == replace(recipe, **new)


@pytest.mark.parametrize(
    "old,new",
    [
        ("norm_stats=eval", "batch_norm='frozen'"),
        ("score=macro_f1", "metric='macro_f1'"),
        ("augment.randaugment=rand-m9", "augment.auto_augment='rand-m9'"),
    ],
)
def test_set_reads_old_names(old, new):
    """--set with an old name sets the field that it is now, and says so."""
    recipe = small_recipe(batch_norm="train")
    with pytest.warns(FutureWarning, match=f"is now {new.removeprefix('augment.')}; please rename it"):
        changed = override(recipe, [old])
    assert changed == override(recipe, [new]) != recipe


def test_an_old_value_needs_its_old_name():
    """ "eval" is no value of batch_norm."""
    with pytest.raises(RecipeError, match="batch_norm must be 'frozen' or 'train' or 'sync', not 'eval'"):
        small_recipe(batch_norm="eval")


def test_frozen_is_a_group_with_lr_0():
    """Frozen gives today's row, and a warning that spells it out."""
    with pytest.warns(FutureWarning, match=r"Frozen\('rest', '.'\) is now Group\('rest', '.', lr=0\)"):
        assert Frozen("rest", ".") == Group("rest", ".", lr=0)


def test_polynomial_says_what_to_write(monkeypatch):
    """A recipe with the schedule that was removed gets one sentence with what there is instead."""
    monkeypatch.delitem(sys.modules, "finetune.lr_schedule", raising=False)
    with pytest.warns(FutureWarning, match="finetune.lr_schedule is now finetune"):
        lr_schedule = importlib.import_module("finetune.lr_schedule")
    assert (lr_schedule.Cosine, lr_schedule.Constant) == (Cosine, Constant)
    with pytest.raises(RecipeError, match=r"Polynomial was removed: write Linear\(\) for power=1, else Lambda\(function=...\)"):
        lr_schedule.Polynomial(power=2.0)
