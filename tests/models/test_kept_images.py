"""What frozen layers make of images, kept: the same run as without, several times less of it computed."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.models import kept_images
from finetune.optim.freezing import stage_epochs
from finetune.recipe import SGD, Augment, Constant, Data, Group, LayerDecay, LinearProbe
from finetune.utils.errors import RecipeError
from helpers import Coloured, DroppingNet, SmallNet, assert_same_weights, prepare, run_here, small_recipe

GROUPS = (
    Group("head", "fc", lr=1e-2),
    Group("body", "body", lr=3e-3, unfreeze_at=3),
    Group("stem", "stem|norm", lr=1e-3, unfreeze_at=7),
)


def staged(**changes):
    """Three epochs of the head, four of the body too, one of all; two augmentations while something is frozen."""
    augment = changes.pop("augment", Augment(frozen_views=2))
    return small_recipe(**{"groups": GROUPS, "epochs": 8, "augment": augment, **changes})


def full_disk(monkeypatch):
    """A disk without room."""
    usage = kept_images.shutil.disk_usage("/")
    monkeypatch.setattr(kept_images.shutil, "disk_usage", lambda path: usage._replace(free=100))


def assert_same_rows(rows, others, rounding=1e-4):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.get("lr") == other.get("lr") and row["step"] == other["step"]
        for key in {"loss", "grad_norm"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=rounding, abs=1e-6), key


class Sized(SmallNet):
    """What comes late looks at the size of the images, as rotary position embeddings do."""

    def forward(self, images):
        return super().forward(images) * images.shape[-1] / 24


OPTIONS = {
    "plain": {},
    "one view": {"augment": Augment(frozen_views=1)},
    "linear probe and average": {"linear_probe": LinearProbe(), "ema_decay": 0.9},
    "balanced": {"data": Data("generated", 24, 8, sampling="balanced")},
    "evaluated at another size": {"backbone": Sized, "data": Data("generated", 24, 8, test_size=(32, 40))},
    "dropout and batch norm": {"backbone": DroppingNet, "batch_norm": "train"},
    "bf16": {"mixed_precision": "bf16"},
    "two losses": {"loss": "binary", "label_smoothing": 0.1, "class_weights": "balanced"},
    "layer decay": {
        "backbone": "test_resnet",
        "head": None,
        "groups": LayerDecay(head_lr=1e-2, stem_ratio=0.1, unfreeze_at=4),
        "data": Data("generated", 32, 8),
        "epochs": 5,
    },
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("option", OPTIONS)
def test_kept_is_as_good_as_computed(tmp_path, monkeypatch, capsys, option, accumulate):
    """With what the frozen layers make of images kept, weights and metrics are those of a run that computes it each time."""
    net, rows = run_here(staged(**OPTIONS[option]), tmp_path / "kept", accumulate=accumulate)
    assert "frozen_views: kept: " in capsys.readouterr().out
    full_disk(monkeypatch)
    other, others = run_here(staged(**OPTIONS[option]), tmp_path / "computed", accumulate=accumulate)
    text = capsys.readouterr().out
    assert "computed anew in each epoch, for want of room on the disk" in text and "kept: " not in text
    rounding = 1e-2 if option == "bf16" else 1e-4
    assert_same_rows(rows, others, rounding)
    assert_same_weights(net, other.state_dict(), rounding)
    assert not [*(tmp_path / "kept").glob("activations*")]


def test_a_stage_is_a_bare_loop_over_two_views(tmp_path):
    """The head's epochs are those of a loop of torch's own in which each image has two augmentations, in turns."""
    recipe = staged(
        groups=(GROUPS[0], Group("rest", ".", lr=0)), optimizer=SGD(), schedule=Constant(), epochs=5, clip_norm=None
    )
    net, _ = run_here(recipe, tmp_path)
    other, _, images = prepare(recipe)
    optimizer = torch.optim.SGD(other.fc.parameters(), lr=1e-2)
    for epoch in range(5):
        for plan in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images[0], epoch % 2, plan.micro_batches, 0)
            optimizer.zero_grad()
            cross_entropy(other(batch), labels).backward()
            optimizer.step()
    assert_same_weights(net, other.state_dict())
    assert not torch.equal(*(next(load(images[0], view, [[0]], 0))[0] for view in (0, 1)))


def test_frozen_layers_see_each_view_once(tmp_path, monkeypatch):
    """The stem computes on as many images as there are views, and once a stage on each validation image."""
    seen, real = [], torch.nn.Conv2d.forward

    def counting(module, images):
        if images.shape[1] == 3:
            seen.append(len(images))
        return real(module, images)

    recipe = staged(epochs=7, groups=(*GROUPS[:2], Group("stem", "stem|norm", lr=0)))
    _, _, (train, val) = prepare(recipe)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", counting)
    run_here(recipe, tmp_path)
    assert sum(n for n in seen if n > 2) == 2 * (2 * len(train) + len(val))  # two images are a trial's


class Wide(SmallNet):
    """Nearly all of its computation comes after the stem."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(self.body, torch.nn.Conv2d(16, 16, 9, padding=4))


@pytest.mark.parametrize(
    ("groups", "backbone", "text"),
    [
        ((GROUPS[0], Group("rest", ".", lr=1e-3, unfreeze_at=2)), SmallNet, "this stage sees none of 2 views twice"),
        ((Group("stem", "stem", lr=1e-2), Group("rest", ".", lr=0)), SmallNet, "no frozen first layers whose output is all"),
        ((Group("rest", "body|fc", lr=1e-2), Group("stem", ".", lr=0)), Wide, "the frozen layers are 5% of the network"),
    ],
)
def test_what_is_not_kept_is_said(tmp_path, capsys, groups, backbone, text):
    """A stage says so in which keeping would gain nothing, or can't be done."""
    run_here(staged(groups=groups, backbone=backbone, epochs=3), tmp_path)
    out = capsys.readouterr().out
    assert text in out and "frozen_views: kept" not in out


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"groups": (Group("all", ".", lr=1e-2),)}, "frozen_views has no effect: no group is ever frozen"),
        ({"augment": Augment(frozen_views=2, mixup=0.1)}, "does not go with mixup and cutmix"),
        ({"flip_test": True}, "does not go with flip_test"),
        ({"backbone": "test_resnet", "head": None, "torch_compile": True}, "does not go with torch_compile"),
        ({"backbone": "test_resnet", "head": None, "gradient_checkpointing": True}, "does not go with gradient_checkpointing"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, text):
    """An option that needs the images, or that runs layers in its own way, is named."""
    with pytest.raises(RecipeError, match=text):
        staged(**changes)


@pytest.mark.parametrize("kind", ["several labels", "unreadable"])
def test_labels_are_kept_too(tmp_path, monkeypatch, image_folder, kind):
    """Several labels an image, and the mark of an image that could not be read, lie beside what is kept."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for file in (images / "train" / "red" / "3.png", images / "val" / "red" / "1.png"):
        file.write_bytes(b"no image")
    labels = [np.array([i % 2, (i // 2) % 2, 0], dtype=np.float32) for i in range(24)]
    data = Data(lambda: (Coloured(labels, ("red", "dark", "never")), Coloured(labels[:9], ("red", "dark", "never"))), 24, 8)
    several = {"data": data, "loss": "multi_label", "metric": "mean_average_precision"}
    recipe = staged(**several if kind == "several labels" else {"data": Data(str(images), 24, 8, on_bad_image="skip")})
    _, rows = run_here(recipe, tmp_path / "kept")
    full_disk(monkeypatch)
    _, others = run_here(recipe, tmp_path / "computed")
    assert_same_rows(rows, others)
    assert [row.get("skipped_images") for row in rows] == [row.get("skipped_images") for row in others]


def test_a_stage_ends_where_the_next_one_starts():
    """Its epochs, counted by hand."""
    _, groups, _ = prepare(staged())
    assert [stage_epochs(groups, epoch, 8) for epoch in range(8)] == [3, 3, 3, 4, 4, 4, 4, 1]
