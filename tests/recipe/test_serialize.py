"""A recipe as plain data and back, and what differs between two."""

import json
import math
from dataclasses import dataclass, replace

import pytest

from finetune.recipe import (
    SGD,
    AdamW,
    Augment,
    Constant,
    Cosine,
    CosineRestarts,
    Data,
    EarlyStop,
    Exponential,
    Group,
    Lambda,
    LayerDecay,
    Linear,
    LinearProbe,
    MultiStep,
    OneCycle,
    Optimizer,
    Plateau,
    Recipe,
    Schedule,
    Step,
    Switch,
)
from finetune.recipe.load import load_recipe
from finetune.recipe.serialize import diff, from_dict, to_dict
from finetune.utils.errors import RecipeError
from helpers import RECIPES, SmallNet, small_recipe


def through_json(recipe):
    """The recipe as another process reads it from a run's recipe.json."""
    return from_dict(json.loads(json.dumps(to_dict(recipe))))


def my_images():
    """A function of a recipe's own."""


def half(epoch):
    """Another."""
    return 0.5


@dataclass(frozen=True, kw_only=True)
class Own(Schedule):
    """A schedule of a recipe's own."""

    share: float = 0.5


ROWS = (
    Group("head", "fc", lr=1e-2, weight_decay=0.0, schedule=Step(every=2), warmup_epochs=0.5),
    Group("body", "body", lr=1e-3, unfreeze_at=1, optimizer=Optimizer("lamb", weight_decay=0.1, betas=(0.9, 0.95))),
    Group("rest", ".", lr=0),
)
FULL = Recipe(
    backbone="test_resnet",
    weights="none",
    dropout=0.1,
    data=Data("digits", 24, 8, crop_pct=0.9, sampling="balanced", holdout=0.2),
    augment=Augment(crop_scale=(0.5, 1.0), auto_augment="rand-m9", mixup=0.2),
    linear_probe=LinearProbe(views=2),
    groups=ROWS,
    optimizer=AdamW(weight_decay=0.05, betas=(0.9, 0.99)),
    schedule=Cosine(warmup_epochs=0.5),
    lr_scale=0.3,
    switch=Switch(at=1, optimizer=SGD(momentum=0.9), lr_factor=10.0),
    batch_norm="sync",
    epochs=4,
    class_weights=(1.0, 2.0),
    clip_norm_type=math.inf,
    ema_decay=0.9,
    early_stop=EarlyStop(patience=2, mode="min"),
)
SCHEDULES = [
    Constant(warmup_epochs=0.5, warmup_start=0.1),
    Cosine(floor=0.1),
    Linear(end=0.2),
    Step(every=0.5),
    MultiStep(at=(1, 2.5)),
    Exponential(factor=0.9),
    CosineRestarts(period=1, stretch=2),
    OneCycle(rise=0.2),
    Plateau(mode="min"),
]


@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(load_recipe(name)[0], id=name) for name in RECIPES),
        pytest.param(FULL, id="every kind of part"),
        pytest.param(replace(FULL, groups=LayerDecay(head_lr=1.0, stem_ratio=0.1, unfreeze_at=1)), id="LayerDecay"),
        *(pytest.param(replace(FULL, schedule=schedule), id=type(schedule).__name__) for schedule in SCHEDULES),
    ],
)
def test_a_recipe_comes_back_from_json_as_it_was(recipe):
    """from_dict of to_dict, by way of JSON, is an equal recipe."""
    assert through_json(recipe) == recipe and not diff(through_json(recipe), recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        small_recipe(backbone=SmallNet),
        replace(FULL, data=replace(FULL.data, source=my_images)),
        replace(FULL, schedule=Lambda(function=half)),
        replace(FULL, augment=Augment(function=half)),
    ],
    ids=["backbone", "data", "Lambda", "augment"],
)
def test_functions_come_back_by_name(recipe):
    """Of a function its name comes back: it compares equal by diff, and says where it is when it is called."""
    read = through_json(recipe)
    assert not diff(read, recipe) and read != recipe
    places = read.backbone, read.data.source, getattr(read.schedule, "function", ""), read.augment.function
    (function,) = filter(callable, places)
    with pytest.raises(RecipeError, match=r"function \w+ is known by its name alone: it stands in the run's recipe.py"):
        function(1.0)


def test_a_schedule_of_ones_own_comes_back_by_name():
    """A schedule class that a recipe file defines compares equal after the way through JSON, and a changed field shows."""
    recipe = replace(FULL, schedule=Own(share=0.25))
    assert not diff(through_json(recipe), recipe)
    assert diff(through_json(recipe), replace(recipe, schedule=Own())) == [("schedule.share", 0.25, 0.5)]


def test_missing_fields_have_their_defaults():
    """A recipe of a version with fewer fields gets the defaults of the others, in its parts, too."""
    values = to_dict(small_recipe(backbone="test_resnet", head=None))
    for part, name in (
        (values, "lr_scale"),
        (values, "augment"),
        (values["data"], "holdout"),
        (values["groups"][0], "schedule"),
    ):
        del part[name]
    assert from_dict(values) == small_recipe(backbone="test_resnet", head=None)


@pytest.mark.parametrize(
    "path,fault",
    [
        ((), "Recipe has no field 'mixout' here: a newer version wrote it, or it was removed"),
        (("data",), "Data has no field 'mixout' here"),
        (("schedule",), "Cosine has no field 'mixout' here"),
        (("groups", 1), "Group has no field 'mixout' here"),
        (("groups", 1, "optimizer"), "Optimizer has no field 'mixout' here"),
    ],
)
def test_unknown_fields_are_named(path, fault):
    """A field that this version does not know is refused by its name and that of the part, not dropped."""
    values = part = to_dict(FULL)
    for key in path:
        part = part[key]
    part["mixout"] = 0.1
    with pytest.raises(RecipeError) as caught:
        from_dict(values)
    assert fault in str(caught.value)


def test_values_that_are_no_valid_recipe_are_refused():
    """What is read is checked as what is written by hand."""
    with pytest.raises(RecipeError, match="epochs must be 1 or more, not 0"):
        from_dict(to_dict(FULL) | {"epochs": 0, "switch": None})


def test_a_difference_is_named_by_its_path():
    """diff gives the path, with groups by name, and both values; "-" where one recipe has no such field."""
    rows = (replace(ROWS[0], lr=2e-2), ROWS[1], Group("all", ".", lr=0))
    other = replace(FULL, groups=rows, seed=1, optimizer=AdamW(betas=(0.9, 0.99)), data=replace(FULL.data, image_size=32))
    changes = {path: values for path, *values in diff(FULL, other)}
    lost = {path for path, (_, there) in changes.items() if there == "-"}
    assert lost == {f"groups.rest.{name}" for name in to_dict(ROWS[2])}
    assert {path: values for path, values in changes.items() if not path.startswith(("groups.rest", "groups.all"))} == {
        "data.image_size": [24, 32],
        "groups.head.lr": [1e-2, 2e-2],
        "optimizer.weight_decay": [0.05, 0.0],
        "seed": [0, 1],
    }
    assert changes["groups.all.pattern"] == ["-", "."] and diff(FULL, FULL) == []


@pytest.mark.parametrize("name", RECIPES)
def test_no_two_recipes_are_alike(name):
    """A recipe's data goes through JSON unchanged, and differs from every other's."""
    values = to_dict(load_recipe(name)[0])
    assert json.loads(json.dumps(values)) == values
    assert values["schedule"]["type"] and values["optimizer"]["name"]
    assert all(values != to_dict(load_recipe(other)[0]) for other in RECIPES if other != name)
