"""What a recipe refuses and what it takes; its parts, and what a switch makes of it."""

import math
from dataclasses import replace

import pytest

from finetune.data.loader import plan_epoch
from finetune.recipe import (
    SGD,
    AdamW,
    Augment,
    Constant,
    Cosine,
    Data,
    EarlyStop,
    Frozen,
    Group,
    Lambda,
    LayerDecay,
    LinearProbe,
    Optimizer,
    Switch,
)
from finetune.recipe.load import replaced
from finetune.utils.errors import RecipeError
from helpers import ALL, SmallNet, plain

LBFGS = Optimizer("LBFGS")
FIRST, SECOND = Group("a", "fc", lr=1e-2, schedule=Constant(), optimizer=SGD()), Group("b", ".", lr=1e-3, unfreeze_at=1)
ROWS = plain(
    backbone="test_resnet",
    head=None,
    epochs=4,
    groups=(FIRST, SECOND),
    clip_norm=1.0,
    early_stop=EarlyStop(patience=1),
    linear_probe=LinearProbe(),
)
LAYERS = replace(ROWS, groups=LayerDecay(head_lr=1e-2, stem_ratio=0.1))
SWITCHED = replace(ROWS, switch=Switch(at=1, optimizer=SGD()))


def faults(recipe, **changes):
    """What the changed recipe is told, a sentence each."""
    with pytest.raises(RecipeError) as caught:
        replace(recipe, **changes)
    first, *found = str(caught.value).split("\n  ")
    assert first == "this recipe is not valid:"
    return found


@pytest.mark.parametrize(
    "changes,sentence",
    [
        ({"epochs": "3"}, "epochs must be a whole number, not '3'"),
        ({"epochs": True}, "epochs must be a whole number, not True"),
        ({"seed": 1.0}, "seed must be a whole number, not 1.0"),
        ({"label_smoothing": math.nan}, "label_smoothing must be a number, not nan"),
        ({"dropout": False}, "dropout must be a number, not False"),
        ({"flip_test": 1}, "flip_test must be True or False, not 1"),
        ({"weights": None}, "weights must be a text, not None"),
        ({"head": 3}, "head must be a text or None, not 3"),
        ({"backbone": 3}, "backbone must be a text or a function, not 3"),
        ({"data": Data(3, 8, 8)}, "data.source must be a text or a function, not 3"),
        ({"batch_norm": "eval"}, "batch_norm must be 'frozen' or 'train' or 'sync', not 'eval'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be 'no' or 'bf16' or 'fp16', not 'fp8'"),
        ({"optimizer": "AdamW"}, "optimizer must be an Optimizer, not 'AdamW'"),
        ({"optimizer": AdamW(weight_decay=True)}, "optimizer.weight_decay must be a number, not True"),
        ({"early_stop": 3}, "early_stop must be an EarlyStop or None, not 3"),
        ({"schedule": Lambda(function=3)}, "schedule.function must be a function, not 3"),
        ({"class_weights": (1, "a")}, "class_weights must be 'balanced' or a tuple of a number or None, not (1, 'a')"),
        ({"augment": Augment(crop_scale=0.5)}, "augment.crop_scale must be a tuple of a number and a number, not 0.5"),
        (
            {"augment": Augment(crop_scale=(0.1, 0.2, 0.3))},
            "augment.crop_scale must be a tuple of a number and a number, not (0.1, 0.2, 0.3)",
        ),
        ({"groups": [FIRST]}, f"groups must be a tuple of a Group or a Frozen or a LayerDecay, not {[FIRST]}"),
        ({"groups": (1,)}, "groups must be a tuple of a Group or a Frozen or a LayerDecay, not (1,)"),
        ({"groups": (FIRST, replace(SECOND, lr=math.nan))}, "groups.b.lr must be a number, not nan"),
        ({"groups": (replace(FIRST, optimizer=Optimizer(3)),)}, "groups.a.optimizer.name must be a text, not 3"),
        ({"groups": (FIRST, Frozen("b", None))}, "groups.b.pattern must be a text, not None"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(changes, sentence):
    """A value of another type than its field's gets one sentence, with the field and the type in words."""
    assert faults(ROWS, **changes) == [sentence]


RANGES = [
    (LAYERS, "epochs", "epochs must be at least 1", [1], [0]),
    (LAYERS, "seed", "seed must be 0 or more", [0], [-1]),
    (ROWS, "label_smoothing", "label_smoothing must be at least 0 and below 1", [0.0, 0.99], [-0.01, 1.0]),
    (ROWS, "dropout", "dropout must be at least 0 and below 1", [0, 0.99], [-0.01, 1.0]),
    (ROWS, "drop_path", "drop_path must be at least 0 and below 1", [0, 0.99], [-0.01, 1.0]),
    (ROWS, "class_weights", "class_weights must be above 0", [None, (0.1, 2)], [(1.0, 0.0)]),
    (ROWS, "l2_sp", "l2_sp must be 0 or more", [0.0, 2.0], [-0.01, math.inf]),
    (ROWS, "clip_norm", "clip_norm must be above 0, or None", [None, 0.01], [0, -1.0]),
    (ROWS, "clip_value", "clip_value must be above 0, or None", [None, 0.01], [0, -1.0]),
    (ROWS, "clip_adaptive", "clip_adaptive must be above 0, or None", [None, 0.01], [0, -1.0]),
    (ROWS, "clip_norm_type", "clip_norm_type must be above 0", [0.5, math.inf], [0.0]),
    (ROWS, "ema_decay", "ema_decay must be above 0 and below 1, or None", [None, 0.01, 0.99], [0.0, 1.0]),
    (ROWS, "early_stop.patience", "early_stop: patience must be at least 1", [1], [0]),
    (ROWS, "early_stop.threshold", "early_stop: threshold must be 0 or more", [0.0], [-0.01]),
    (ROWS, "linear_probe.views", "linear_probe: views must be at least 1", [1], [0]),
    (ROWS, "linear_probe.l2", "linear_probe: l2 must be a finite number above 0", [0.01, 2.0], [0.0, math.inf]),
    (ROWS, "data.image_size", "data: image_size must be at least 1", [1], [0]),
    (ROWS, "data.batch_size", "data: batch_size must be at least 1", [1], [0]),
    (ROWS, "data.crop_pct", "data: crop_pct must be above 0 and at most 1", [None, 0.01, 1.0], [0.0, 1.01]),
    (ROWS, "data.holdout", "data: holdout must be at least 0 and below 1", [0.0, 0.99], [-0.01, 1.0]),
    (
        ROWS,
        "augment.crop_scale",
        "augment: crop_scale must be two rising fractions",
        [(0.01, 0.01), (0.5, 1.0)],
        [(0.0, 1.0), (0.5, 0.4), (0.5, 1.01)],
    ),
    (ROWS, "augment.crop_ratio", "augment: crop_ratio must be two rising", [(0.01, 0.01), (1, 2)], [(0.0, 1.0), (2.0, 1.0)]),
    (ROWS, "augment.hflip", "augment: hflip must be a probability", [0, 1.0], [-0.01, 1.01]),
    (ROWS, "augment.erasing", "augment: erasing must be a probability", [0, 1.0], [-0.01, 1.01]),
    (ROWS, "augment.color_jitter", "augment: color_jitter must be 0 or more", [0, 0.4], [-0.01]),
    (ROWS, "augment.mixup", "augment: mixup must be 0 or more", [0.0, 2.0], [-0.01, math.inf]),
    (ROWS, "augment.cutmix", "augment: cutmix must be 0 or more", [0.0, 2.0], [-0.01, math.inf]),
    (ROWS, "augment.randaugment", "augment: randaugment must start with 'rand-'", [None, "rand-m9"], ["m9-rand-"]),
    (ROWS, "optimizer.weight_decay", "optimizer: weight_decay must be 0 or more", [0, 2.0], [-0.01, math.inf]),
    (ROWS, "groups.a.optimizer.weight_decay", "group 'a': optimizer: weight_decay must be 0 or more", [0], [-0.01]),
    (ROWS, "groups.a.schedule.warmup_epochs", "group 'a': schedule: warmup_epochs must be 0 or more", [0, 3.9], [-0.5]),
    (ROWS, "groups.b.lr", "group 'b': lr must be a finite number above 0", [1e-9, 5.0], [0.0, -1.0, math.inf]),
    (ROWS, "groups.b.unfreeze_at", "group 'b': unfreeze_at must be an epoch from 0", [0, 3], [-1]),
    (ROWS, "groups.b.weight_decay", "group 'b': weight_decay must be 0 or more", [None, 0.0, 2.0], [-0.01, math.inf]),
    (ROWS, "groups.b.warmup_epochs", "group 'b': warmup_epochs must be 0 or more", [0.0, 2.9], [-0.5]),
    (LAYERS, "groups.head_lr", "groups: head_lr must be a finite number above 0", [1e-9, 5.0], [0.0, math.inf]),
    (LAYERS, "groups.stem_ratio", "groups: stem_ratio must be above 0 and at most 1", [0.01, 1.0], [0.0, 1.01]),
    (LAYERS, "groups.unfreeze_at", "groups: unfreeze_at must be an epoch from 0", [0, 3], [-1]),
    (SWITCHED, "switch.lr_factor", "switch: lr_factor must be a finite number above 0", [0.1, 20.0], [0.0, math.inf]),
    (SWITCHED, "switch.optimizer.weight_decay", "switch: optimizer: weight_decay must be 0 or more", [0], [-0.01]),
]


@pytest.mark.parametrize("recipe,field,sentence,right,wrong", RANGES, ids=[row[1] for row in RANGES])
def test_every_number_has_its_range(recipe, field, sentence, right, wrong):
    """Values up to the ends of a field's range are taken, each value beyond them gets one sentence."""
    for value in right:
        replaced(recipe, field.split("."), value)
    for value in wrong:
        with pytest.raises(RecipeError) as caught:
            replaced(recipe, field.split("."), value)
        assert str(caught.value).count("\n") == 1
        assert f"\n  {sentence}" in str(caught.value) and f", not {value!r}" in str(caught.value)


SKIPPING, SEVERAL = Data("digits", 8, 8, on_bad_image="skip"), {"loss": "multi_label", "metric": "mean_average_precision"}
CLASHES = [
    ({"class_weights": "balanced"}, {"loss": "binary"}, "class_weights need loss='cross_entropy'"),
    ({"clip_norm": None}, {"clip_norm_type": 1.0}, "clip_norm_type has no effect without clip_norm"),
    ({"mixed_precision": "fp16"}, {"optimizer": LBFGS}, "LBFGS needs mixed_precision='no' or 'bf16'"),
    ({"mixed_precision": "fp16"}, {"groups": (replace(FIRST, optimizer=LBFGS), SECOND)}, "LBFGS needs"),
    ({"mixed_precision": "fp16"}, {"switch": Switch(at=1, optimizer=LBFGS)}, "LBFGS needs"),
    ({"data": Data("digits", 8, 8, sampling="balanced")}, SEVERAL, "data: sampling='balanced' needs one label an image"),
    ({"data": SKIPPING}, {"augment": Augment(mixup=0.2)}, "augment: mixup and cutmix need on_bad_image='stop'"),
    ({"data": SKIPPING}, {"augment": Augment(cutmix=0.2)}, "augment: mixup and cutmix need on_bad_image='stop'"),
    ({"epochs": 2}, {"schedule": Cosine(warmup_epochs=2)}, "schedule: warmup_epochs=2 does not end within epochs=2"),
    (
        {"epochs": 2},
        {"groups": (replace(FIRST, schedule=Cosine(warmup_epochs=2)), SECOND)},
        "group 'a': schedule: warmup_epochs=2 does not end within epochs=2",
    ),
    (
        {"epochs": 3},
        {"groups": (FIRST, replace(SECOND, warmup_epochs=2.0))},
        "group 'b': warmup_epochs=2.0 does not end within epochs=3",
    ),
    (
        {"epochs": 2},
        {"groups": (FIRST, replace(SECOND, unfreeze_at=2))},
        "group 'b': unfreeze_at=2 is past the last epoch, 1",
    ),
    ({"epochs": 2}, {"groups": replace(LAYERS.groups, unfreeze_at=2)}, "groups: unfreeze_at=2 is past the last epoch, 1"),
    (
        {"switch": Switch(at=1, optimizer=SGD())},
        {"groups": (FIRST, replace(SECOND, unfreeze_at=2), Group("c", ".", lr=1.0, unfreeze_at=3))},
        "switch: at=1 is no epoch at which a group unfreezes (those after the first: 2, 3)",
    ),
    (
        {"switch": Switch(at=1, optimizer=SGD())},
        {"groups": ALL},
        "switch: at=1 is no epoch at which a group unfreezes (those after the first: none)",
    ),
]


@pytest.mark.parametrize("one,other,sentence", CLASHES)
def test_what_does_not_go_together(one, other, sentence):
    """Either change is taken alone; both together get one sentence."""
    replace(ROWS, **one)
    replace(ROWS, **other)
    (found,) = faults(ROWS, **one, **other)
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    "changes,sentence",
    [
        ({"head": "fc"}, "head: a timm or torchvision backbone knows its own head"),
        ({"backbone": SmallNet, "dropout": 0.1}, "dropout: only timm's networks have it"),
        ({"backbone": "torchvision/resnet18", "drop_path": 0.1}, "drop_path: only timm's networks have it"),
        ({"backbone": SmallNet, "gradient_checkpointing": True}, "gradient_checkpointing: only timm's networks have it"),
        ({"loss": "multi_label"}, "metric='top1' and loss='multi_label' do not go together"),
        ({"metric": "mean_average_precision"}, "metric='mean_average_precision' and loss='cross_entropy' do not go together"),
        ({"optimizer": AdamW(lr=1e-3)}, "optimizer: lr belongs to the groups"),
        ({"optimizer": SGD(params=[])}, "optimizer: params belongs to the groups"),
        ({"schedule": Cosine(floor=1.0)}, "schedule: floor is a fraction of the peak"),
        ({"groups": (FIRST, replace(SECOND, name="b.c"))}, "group 'b.c': a name has letters, digits, '_' and '-' only"),
        ({"groups": (FIRST, Frozen("", "."))}, "group '': a name has"),
        ({"groups": (FIRST, Frozen("b", "f(c"))}, "group 'b': pattern 'f(c' is no regular expression"),
        ({"groups": (FIRST, FIRST)}, "group 'a' is there twice"),
        ({"groups": (replace(FIRST, unfreeze_at=1), Frozen("rest", "."))}, "nothing trains in epoch 0"),
        ({"epochs": 1}, "group 'b': unfreeze_at=1 is past the last epoch, 0"),
        ({"switch": Switch(at=0, optimizer=SGD())}, "switch: at=0 is no epoch at which a group unfreezes"),
        ({"switch": Switch(at=1, optimizer=SGD(lr=1.0))}, "switch: optimizer: lr belongs to the groups"),
    ],
)
def test_faults_are_named(changes, sentence):
    """What is wrong beyond one field's type and range gets one sentence, too."""
    (found,) = faults(ROWS, **changes)
    assert found.startswith(sentence)


def test_all_faults_at_once():
    """Several faults make one message: those of values, or those of types."""
    found = faults(ROWS, epochs=0, seed=-1, groups=(Group("a", "fc", lr=0.0), Group("b", "x", lr=-1.0, unfreeze_at=-1)))
    assert [text.split(":")[0].split(" must")[0] for text in found] == ["group 'a'", "group 'b'", "group 'b'", "epochs", "seed"]
    assert len(faults(ROWS, epochs="3", seed="0", groups=(FIRST, replace(SECOND, lr="1")))) == 3
    assert len(faults(ROWS, groups=())) == 2 and faults(ROWS, groups=())[0] == "groups: at least one is needed"


@pytest.mark.parametrize("images", [1, 7, 8, 9, 17])
def test_updates_are_those_an_epoch_is_planned_with(images):
    """The number of updates that plans and schedules count with is that of the updates an epoch has."""
    assert Data("digits", 8, batch_size=8).updates(images) == len(plan_epoch(images, 8, seed=0, epoch=0))


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_early_stop_waits_for_its_patience(patience):
    """It stops once `patience` epochs have followed the best one, and a gain no larger than the threshold is none."""
    rows = [{"top1": score, "loss": 1.0 - score} for score in (0.5, 0.7, 0.74, 0.72, 0.74, 0.6, 0.6)]
    for mode in ("max", "min"):
        stop = EarlyStop(patience=patience, mode=mode, threshold=0.05)
        assert [stop.stops(rows[:epoch], "top1") for epoch in range(8)] == [epoch >= 2 + patience for epoch in range(8)]


def test_a_switch_changes_optimizer_and_rates_from_its_epoch_on():
    """From the switch on there is its optimizer and rates times its factor; rows with an optimizer of their own keep both."""
    switch = Switch(at=1, optimizer=AdamW(), lr_factor=10.0)
    rows = (FIRST, Group("b", "x", lr=1e-3), Group("c", "y", lr=1e-4, unfreeze_at=1), Frozen("d", "."))
    recipe = replace(ROWS, switch=switch, groups=rows)
    changed = (FIRST, replace(rows[1], lr=1e-2), replace(rows[2], lr=1e-3), rows[3])
    assert recipe.at(0) is recipe and ROWS.at(3) is ROWS
    assert recipe.at(1) == recipe.at(3) == replace(recipe, switch=None, optimizer=switch.optimizer, groups=changed)
    layered = replace(recipe, groups=replace(LAYERS.groups, unfreeze_at=1))
    assert layered.at(1).groups == replace(layered.groups, head_lr=0.1)
    assert [recipe.optimizer_begins(epoch) for epoch in range(4)] == [0, 1, 1, 1] and ROWS.optimizer_begins(3) == 0
