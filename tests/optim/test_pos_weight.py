"""The weight of positive targets, against torch's BCEWithLogitsLoss."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import BCEWithLogitsLoss
from torch.nn.functional import one_hot

from finetune.data.loader import ImageDataset
from finetune.optim.loss import Criterion
from finetune.recipe import Augment, Data
from finetune.recipe.load import override
from finetune.tools.smoke import smoke_recipe
from finetune.utils.errors import RecipeError
from helpers import Coloured, SmallNet, assert_same_weights, bare_loop, plain, run_here, small_recipe

LABELS = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0]])
SEVERAL = {"loss": "multi_label", "metric": "mean_average_precision"}
WEIGHTS = (0.2, 30.0, 4.0)


def criterion(labels=LABELS, **changes):
    """The criterion of a recipe on images with these labels, of the classes a, b and c."""
    images = ImageDataset(Coloured(labels, "abc"), None, 0, tuple("abc"))
    return Criterion(small_recipe(**changes), SmallNet(), images, torch.device("cpu"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [WEIGHTS, 5.0, 3])
def test_several_labels_are_weighted_as_by_torch(weight, smoothing):
    """Of plain and of mixed targets, smoothed towards a half, without the images that can't be read, to 1e-6."""
    loss = criterion(pos_weight=weight, label_smoothing=smoothing, **SEVERAL).loss
    theirs = BCEWithLogitsLoss(pos_weight=torch.tensor(weight).float(), reduction="none")
    logits, labels = torch.randn(5, 3) * 4, torch.tensor(LABELS).float()
    for targets in (labels, 0.3 * labels + 0.7 * labels.flip(0)):
        expected = theirs(logits, targets * (1 - smoothing) + smoothing / 2).mean(1)
        torch.testing.assert_close(loss(logits, targets), expected.sum())
        gone = targets.clone()
        gone[1] = torch.nan
        torch.testing.assert_close(loss(logits, gone), expected[[0, 2, 3, 4]].sum())


@pytest.mark.parametrize("class_weights", [None, (2.0, 1.0, 0.5)])
def test_one_label_is_weighted_as_by_torch(class_weights):
    """One class against the rest: each part of a mixed image is weighted as an image of its class, class weights included."""
    loss = criterion([0, 1, 2], loss="binary", pos_weight=WEIGHTS, class_weights=class_weights, label_smoothing=0.1).loss
    theirs = BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHTS), reduction="none")
    logits, labels, others = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 2, 0]), torch.tensor([2, 2, 1, 0, 0, 1])

    def expected(labels):
        factors = torch.tensor(class_weights or (1.0, 1.0, 1.0))[labels]
        return factors * theirs(logits, one_hot(labels, 3) * 0.9 + 0.1 / 3).mean(1)

    torch.testing.assert_close(loss(logits, labels), expected(labels).sum())
    mixed = 0.3 * one_hot(labels, 3) + 0.7 * one_hot(others, 3)
    torch.testing.assert_close(loss(logits, mixed), (0.3 * expected(labels) + 0.7 * expected(others)).sum())


def test_steps_are_those_of_torchs_loss(tmp_path):
    """A run in micro-batches takes the steps of a bare loop with BCEWithLogitsLoss, to 1e-5."""
    weights = torch.arange(1.0, 11.0)
    theirs = BCEWithLogitsLoss(pos_weight=weights)
    recipe = plain(loss="binary", pos_weight=tuple(weights.tolist()))
    trail = bare_loop(recipe, lambda net, logits, labels: theirs(logits, one_hot(labels, 10).float()))[1]
    assert_same_weights(run_here(recipe, tmp_path, accumulate=2)[0], trail[-1], 1e-5)


def test_balanced_is_the_negatives_to_each_positive():
    """As the ratio of scikit-learn's balanced weights of a class and of the rest, of several labels an image and of one."""
    for labels, kind in ((LABELS, SEVERAL), (np.array([0, 1, 1, 2, 1]), {"loss": "binary"})):
        columns = labels.T if labels.ndim == 2 else [labels == i for i in range(3)]
        both = [compute_class_weight("balanced", classes=np.array([0, 1]), y=column.astype(int)) for column in columns]
        wanted = [yes / no for no, yes in both]
        assert criterion(labels, pos_weight="balanced", **kind).pos_weight.tolist() == pytest.approx(wanted)


def test_a_weight_that_does_not_fit_is_one_sentence():
    """A class that no training image has, or every one, and another number of weights than of classes."""
    for change, fault in (
        ({"labels": LABELS * [1, 1, 0]}, "no training image has the class 'c', and there is nothing to weigh"),
        ({"labels": LABELS | [0, 1, 0]}, "every training image has the class 'b'"),
        ({"pos_weight": (1.0, 2.0)}, "pos_weight: 2 for 3 classes: a, b, c"),
    ):
        with pytest.raises(RecipeError, match=fault):
            criterion(**{"pos_weight": "balanced", **SEVERAL, **change})


@pytest.mark.parametrize(
    "changes,fault",
    [
        ({"loss": "cross_entropy"}, "pos_weight needs a sigmoid for each class: loss='multi_label' or 'binary'"),
        ({"class_weights": "balanced"}, "pos_weight='balanced' and class_weights='balanced' would make up"),
        ({"data": Data("generated", 24, 8, sampling="balanced")}, "pos_weight='balanced' and data.sampling='balanced' would"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, fault):
    """A softmax, and what makes up for rare classes already."""
    with pytest.raises(RecipeError, match=fault):
        small_recipe(**{"loss": "binary", "pos_weight": "balanced", **changes})


def test_it_is_set_in_a_terminal():
    """As a word, a number or one for each class; a smoke run, which has other classes, leaves the last out."""
    recipe = small_recipe(augment=Augment(mixup=0.2), **SEVERAL)
    for text, value in (("balanced", "balanced"), ("3", 3), ("0.5,2", (0.5, 2)), ("None", None)):
        found = override(recipe, [f"pos_weight={text}"])
        assert found.pos_weight == value
        assert smoke_recipe(found, 1).pos_weight == (None if isinstance(value, tuple) else value)
