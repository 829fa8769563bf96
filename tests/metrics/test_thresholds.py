"""A threshold for each class, against a search by scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_curve

from finetune.data.loader import UNREADABLE
from finetune.metrics.calibration import deal
from finetune.metrics.thresholds import best_thresholds, choose_thresholds, over_thresholds


def made(images=400, classes=6, shift=-2.0, seed=0):
    """Logits with ties that know something of their labels, too low by a constant; the last class is not there."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, classes)) < np.linspace(0.5, 0.0, classes)).astype(np.int64)
    logits = (2 * labels + rng.normal(0, 1, labels.shape) + shift).round(1)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels)


def best_by_scikit_learn(truth, probs):
    """The highest F1 of all thresholds."""
    precision, recall, _ = precision_recall_curve(truth, probs)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()


@pytest.mark.parametrize("shift", [-2.0, 0.0, 5.0])
def test_thresholds_are_the_best_of_all(shift):
    """Each has the highest F1 that scikit-learn's search finds, to 1e-12; of a class that is not there it is 0.5."""
    logits, labels = made(shift=shift)
    probs = logits.double().sigmoid()
    found = best_thresholds(probs, labels.bool())
    for k in range(5):
        ours = f1_score(labels[:, k], probs[:, k] > found[k])
        assert ours == pytest.approx(best_by_scikit_learn(labels[:, k], probs[:, k]), abs=1e-12)
    assert found[5] == 0.5 and (found[:5] != 0.5).any()


def test_a_half_stays_where_it_does_as_well():
    """It is 0.5 where no other does better, and lies midway between two probabilities where another does."""
    probs = torch.tensor([[0.9, 0.4, 0.3], [0.6, 0.2, 0.3], [0.1, 0.1, 0.3]], dtype=torch.float64)
    truth = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1]]).bool()
    assert best_thresholds(probs, truth).tolist() == pytest.approx([0.5, 0.3, 0.15])


@pytest.mark.parametrize("groups", [None, [f"patient {i // 7}" for i in range(400)]])
def test_what_is_predicted_was_not_chosen_on(groups):
    """What is predicted of each fold, or of its groups, is by the thresholds of the other folds, at the temperature."""
    logits, labels = made()
    thresholds, predicted = choose_thresholds(logits, labels, 1.3, groups)
    probs, folds = (logits.double() / 1.3).sigmoid(), deal(400, groups)
    assert not groups or len({*zip(groups, folds.tolist(), strict=True)}) == len(set(groups))
    assert torch.equal(torch.tensor(thresholds, dtype=torch.float64), best_thresholds(probs, labels.bool()))
    for fold in range(5):
        here = folds == fold
        assert torch.equal(predicted[here], probs[here] > best_thresholds(probs[~here], labels[~here].bool()))
    gone = torch.full((3, 6), UNREADABLE)
    more = choose_thresholds(
        torch.cat([logits, logits[:3]]), torch.cat([labels, gone]), 1.3, groups and [*groups, "x", "y", "z"]
    )
    assert more[0] == thresholds and torch.equal(more[1], predicted)


def test_thresholds_that_do_not_help_are_halves():
    """Where others do no better on held-out images, of few images, and of logits that are no numbers."""
    logits, labels = made(shift=-2.0)
    noise = logits.new_tensor(np.random.default_rng(1).normal(3, 0.5, logits.shape))
    assert (best_thresholds(noise.double().sigmoid(), labels.bool()) != 0.5).any()
    for inputs in ((noise, labels), (logits[:9], labels[:9]), (logits * torch.nan, labels)):
        thresholds, predicted = choose_thresholds(*inputs, 1.0)
        assert thresholds == [0.5] * 6 and torch.equal(predicted, inputs[0] > 0)


def test_logits_over_thresholds():
    """They are above 0 where probabilities are above their thresholds, of which 0 and 1 are any and none."""
    logits, _ = made()
    thresholds = np.array([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
    assert np.array_equal(over_thresholds(logits, thresholds.tolist()) > 0, logits.double().sigmoid().numpy() > thresholds)
