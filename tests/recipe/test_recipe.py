"""What a recipe refuses and what it takes."""

import math
from dataclasses import fields, replace

import pytest

from finetune.data.batches import plan_epoch
from finetune.recipe import (
    SGD,
    AdamW,
    Augment,
    Constant,
    Cosine,
    Data,
    EarlyStop,
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
        ({"groups": [FIRST]}, f"groups must be a tuple of a Group or a LayerDecay, not {[FIRST]}"),
        ({"groups": (1,)}, "groups must be a tuple of a Group or a LayerDecay, not (1,)"),
        ({"groups": (FIRST, replace(SECOND, lr=math.nan))}, "groups.b.lr must be a number, not nan"),
        ({"groups": (replace(FIRST, optimizer=Optimizer(3)),)}, "groups.a.optimizer.name must be a text, not 3"),
        ({"groups": (FIRST, Group("b", None, lr=0))}, "groups.b.pattern must be a text, not None"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(changes, sentence):
    """A value of another type than its field's gets one sentence, with the field and the type in words."""
    assert faults(ROWS, **changes) == [sentence]


RANGES = [
    (LAYERS, "epochs", "1 or more", [1], [0]),
    (LAYERS, "seed", "at least 0 and below 4294967296", [0, 2**32 - 1], [-1, 2**32]),
    (ROWS, "label_smoothing", "at least 0 and below 1", [0.0, 0.99], [-0.01, 1.0]),
    (ROWS, "dropout", "at least 0 and below 1", [0, 0.99], [-0.01, 1.0]),
    (ROWS, "drop_path", "at least 0 and below 1", [0, 0.99], [-0.01, 1.0]),
    (ROWS, "class_weights", "above 0", [None, (0.1, 2)], [(1.0, 0.0), (-1.0, 1.0)]),
    (ROWS, "class_weights", "finite and above 0", [], [(1.0, math.inf)]),
    (ROWS, "l2_sp", "0 or more", [0.0, 2.0], [-0.01]),
    (ROWS, "l2_sp", "finite and 0 or more", [], [math.inf]),
    (ROWS, "clip_norm", "above 0, or None", [None, 0.01, math.inf], [0, -1.0]),
    (ROWS, "clip_value", "above 0, or None", [None, 0.01], [0, -1.0]),
    (ROWS, "clip_adaptive", "above 0, or None", [None, 0.01], [0, -1.0]),
    (ROWS, "clip_norm_type", "above 0", [0.5, math.inf], [0.0]),
    (ROWS, "ema_decay", "above 0 and below 1, or None", [None, 0.01, 0.99], [0.0, 1.0]),
    (ROWS, "lr_scale", "above 0", [0.01, 100], [0.0, -1.0]),
    (ROWS, "lr_scale", "finite and above 0", [], [math.inf]),
    (ROWS, "early_stop.patience", "1 or more", [1], [0]),
    (ROWS, "early_stop.threshold", "0 or more", [0.0], [-0.01]),
    (ROWS, "linear_probe.views", "1 or more", [1], [0]),
    (ROWS, "linear_probe.l2", "above 0, or None", [0.01, 2.0], [0.0]),
    (ROWS, "linear_probe.l2", "finite and above 0, or None", [], [math.inf]),
    (ROWS, "data.image_size", "1 or more", [1], [0]),
    (ROWS, "data.batch_size", "1 or more", [1], [0]),
    (ROWS, "data.crop_pct", "above 0 and at most 1, or None", [None, 0.01, 1.0], [0.0, 1.01]),
    (ROWS, "data.holdout", "at least 0 and below 1", [0.0, 0.99], [-0.01, 1.0]),
    (
        ROWS,
        "augment.crop_scale",
        "a share of the area, above 0 and at most 1",
        [(0.01, 0.01), (0.5, 1.0)],
        [(0.0, 1.0), (0.5, 1.01)],
    ),
    (ROWS, "augment.crop_ratio", "above 0", [(0.01, 0.01), (1, 2)], [(0.0, 1.0)]),
    (ROWS, "augment.hflip", "a probability, from 0 to 1", [0, 1.0], [-0.01, 1.01]),
    (ROWS, "augment.erasing", "a probability, from 0 to 1", [0, 1.0], [-0.01, 1.01]),
    (ROWS, "augment.color_jitter", "0 or more", [0, 0.4], [-0.01]),
    (ROWS, "augment.mixup", "0 or more", [0.0, 2.0], [-0.01]),
    (ROWS, "augment.cutmix", "0 or more", [0.0, 2.0], [-0.01]),
    (ROWS, "augment.cutmix", "finite and 0 or more", [], [math.inf]),
    (ROWS, "optimizer.weight_decay", "0 or more", [0, 2.0], [-0.01]),
    (ROWS, "optimizer.weight_decay", "finite and 0 or more", [], [math.inf]),
    (ROWS, "groups.a.optimizer.weight_decay", "0 or more", [0], [-0.01]),
    (ROWS, "groups.a.schedule.warmup_epochs", "0 or more", [0, 3.9], [-0.5]),
    (ROWS, "groups.b.lr", "0 or more", [1e-9, 5.0], [-1.0]),
    (ROWS, "groups.b.lr", "finite and 0 or more", [], [math.inf]),
    (ROWS, "groups.b.unfreeze_at", "an epoch, 0 or more", [0, 3], [-1]),
    (ROWS, "groups.b.weight_decay", "0 or more, or None", [None, 0.0, 2.0], [-0.01]),
    (ROWS, "groups.b.warmup_epochs", "0 or more", [0.0, 2.9], [-0.5]),
    (LAYERS, "groups.head_lr", "above 0", [1e-9, 5.0], [0.0]),
    (LAYERS, "groups.head_lr", "finite and above 0", [], [math.inf]),
    (LAYERS, "groups.stem_ratio", "above 0 and at most 1", [0.01, 1.0], [0.0, 1.01]),
    (LAYERS, "groups.unfreeze_at", "an epoch, 0 or more", [0, 3], [-1]),
    (SWITCHED, "switch.lr_factor", "above 0", [0.1, 20.0], [0.0]),
    (SWITCHED, "switch.lr_factor", "finite and above 0", [], [math.inf]),
    (SWITCHED, "switch.optimizer.weight_decay", "0 or more", [0], [-0.01]),
]


@pytest.mark.parametrize("recipe,field,sentence,right,wrong", RANGES, ids=[" ".join(row[1:3]) for row in RANGES])
def test_every_number_has_its_range(recipe, field, sentence, right, wrong):
    """Values up to the ends of a field's range are taken, each value beyond them gets one sentence."""
    for value in right:
        replaced(recipe, field.split("."), value)
    for value in wrong:
        with pytest.raises(RecipeError) as caught:
            replaced(recipe, field.split("."), value)
        assert str(caught.value) == f"this recipe is not valid:\n  {field} must be {sentence}, not {value!r}"


SKIPPING, SEVERAL = Data("digits", 8, 8, on_bad_image="skip"), {"loss": "multi_label", "metric": "mean_average_precision"}
BALANCED = Data("digits", 8, 8, sampling="balanced")
CLASHES = [
    ({"class_weights": "balanced"}, SEVERAL, "class_weights need one label an image: loss='cross_entropy' or 'binary'"),
    ({"clip_norm": None}, {"clip_norm_type": 1.0}, "clip_norm_type has no effect without clip_norm"),
    ({"mixed_precision": "fp16"}, {"optimizer": LBFGS}, "LBFGS needs mixed_precision='no' or 'bf16'"),
    ({"mixed_precision": "fp16"}, {"groups": (replace(FIRST, optimizer=LBFGS), SECOND)}, "LBFGS needs"),
    ({"mixed_precision": "fp16"}, {"switch": Switch(at=1, optimizer=LBFGS)}, "LBFGS needs"),
    ({"data": BALANCED}, SEVERAL, "data: sampling='balanced' needs one label an image"),
    ({"data": SKIPPING}, {"augment": Augment(mixup=0.2)}, "augment: mixup and cutmix need on_bad_image='stop'"),
    ({"data": SKIPPING}, {"augment": Augment(cutmix=0.2)}, "augment: mixup and cutmix need on_bad_image='stop'"),
    ({"epochs": 2}, {"schedule": Cosine(warmup_epochs=2)}, "schedule: warmup_epochs=2 does not end within epochs=2"),
    (
        {"epochs": 2},
        {"groups": (replace(FIRST, schedule=Cosine(warmup_epochs=2)), SECOND)},
        "groups.a.schedule: warmup_epochs=2 does not end within epochs=2",
    ),
    (
        {"epochs": 3},
        {"groups": (FIRST, replace(SECOND, warmup_epochs=2.0))},
        "groups.b: warmup_epochs=2.0 does not end within epochs=3",
    ),
    (
        {"epochs": 2},
        {"groups": (FIRST, replace(SECOND, unfreeze_at=2))},
        "groups.b: unfreeze_at=2 is past the last epoch, 1",
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
        ({"schedule": Cosine(floor=1.0)}, "schedule.floor must be a share of the peak"),
        ({"augment": Augment(crop_scale=(0.5, 0.4))}, "augment: crop_scale must be (lowest, highest), not (0.5, 0.4)"),
        ({"augment": Augment(crop_ratio=(2.0, 1.0))}, "augment: crop_ratio must be (lowest, highest), not (2.0, 1.0)"),
        ({"augment": Augment(auto_augment="m9-rand-")}, "augment: auto_augment must be 'ta_wide', or start with 'rand', 'augm"),
        (
            {"groups": (FIRST, replace(SECOND, name="b.c"))},
            "groups.b.c: the name 'b.c' must consist of letters, digits, '",
        ),
        ({"groups": (FIRST, Group("", ".", lr=0))}, "groups.: the name '' must consist of letters"),
        ({"groups": (FIRST, Group("b", "f(c", lr=0))}, "groups.b: pattern 'f(c' is no regular expression"),
        ({"groups": (FIRST, FIRST)}, "groups: two rows are called 'a'"),
        ({"groups": (replace(FIRST, unfreeze_at=1), Group("rest", ".", lr=0))}, "nothing trains in epoch 0"),
        ({"epochs": 1}, "groups.b: unfreeze_at=1 is past the last epoch, 0"),
        ({"switch": Switch(at=0, optimizer=SGD())}, "switch: at=0 is no epoch at which a group unfreezes"),
        ({"switch": Switch(at=1, optimizer=SGD(lr=1.0))}, "switch.optimizer: lr belongs to the groups"),
    ],
)
def test_faults_are_named(changes, sentence):
    """What is wrong beyond one field's type and range gets one sentence, too."""
    (found,) = faults(ROWS, **changes)
    assert found.startswith(sentence)


FIELDS_OF_A_GROUP = {
    "unfreeze_at": 1,
    "weight_decay": 0.0,
    "schedule": Constant(),
    "warmup_epochs": 0.5,
    "optimizer": SGD(),
}


@pytest.mark.parametrize("name", FIELDS_OF_A_GROUP)
def test_what_has_no_effect_on_a_frozen_row_is_refused(name):
    """A row with lr=0 is taken as it is, and with any other option of a row it is refused by the option's name."""
    assert {"name", "pattern", "lr", *FIELDS_OF_A_GROUP} == {field.name for field in fields(Group)}
    replace(ROWS, groups=(FIRST, Group("b", ".", lr=0)))
    (found,) = faults(ROWS, groups=(FIRST, Group("b", ".", lr=0, **{name: FIELDS_OF_A_GROUP[name]})))
    assert found == f"groups.b: {name} has no effect with lr=0, which freezes the row for the whole run"


def test_all_faults_at_once():
    """Several faults make one message: those of types, or else those of ranges and then those of conflicts."""
    rows = (Group("a", "fc", lr=0.0, warmup_epochs=1.0), Group("b", "(", lr=-1.0, unfreeze_at=-1))
    found = faults(ROWS, epochs=0, seed=-1, groups=rows, switch=Switch(at=3, optimizer=SGD(lr=1.0), lr_factor=0.0))
    assert [text.split(" must")[0].split(":")[0] for text in found] == [
        *("epochs", "seed"),
        *("groups.b.lr", "groups.b.unfreeze_at", "switch.lr_factor"),
        *("nothing trains in epoch 0", "switch", "groups.a", "groups.b", "switch.optimizer"),
    ]
    assert len(faults(ROWS, epochs="3", seed="0", groups=(FIRST, replace(SECOND, lr="1")))) == 3
    assert len(faults(ROWS, groups=())) == 2 and faults(ROWS, groups=())[0] == "groups: at least one is needed"


@pytest.mark.parametrize("images", [1, 7, 8, 9, 17])
def test_steps_are_those_an_epoch_is_planned_with(images):
    """The number of steps that plans and schedules count with is that of the steps an epoch has."""
    assert Data("digits", 8, batch_size=8).steps_per_epoch(images) == len(plan_epoch(images, 8, seed=0, epoch=0))
