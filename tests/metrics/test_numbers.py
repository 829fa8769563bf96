"""Metrics of numbers against scikit-learn and scipy, their intervals against a bootstrap of these."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from finetune.data.loader import is_unreadable
from finetune.metrics.compute import best_row, compute_metrics
from finetune.metrics.measure import measure, resampled
from finetune.metrics.numbers import mean_metrics, number_metrics
from finetune.models.linear_probe import Units
from finetune.recipe.metrics import fits, write_value
from finetune.recipe.recipe import EarlyStop
from finetune.recipe.schedules import Plateau
from helpers import small_recipe

RECIPE = small_recipe(loss="mse", metric="mae")
REFERENCES = {
    "mae": mean_absolute_error,
    "rmse": root_mean_squared_error,
    "r2": r2_score,
    "spearman": lambda labels, outputs: np.mean([spearmanr(*pair).statistic for pair in zip(labels.T, outputs.T, strict=True)]),
}


def numbers(images=60, columns=3):
    """(outputs, labels) of numbers in three very different units, with ties among the labels of the last."""
    random = np.random.RandomState(0)
    labels = random.normal(size=(images, columns)) * [1e6, 1e-6, 3] + [5e6, 0, -100]
    labels[:, -1] = labels[:, -1].round()
    outputs = labels + random.normal(size=labels.shape) * [3e5, 1e-6, 2]
    return torch.tensor(outputs), torch.tensor(labels)


@pytest.mark.parametrize("metric", REFERENCES)
def test_metrics_are_scikit_learns_and_scipys(metric):
    """Of weighted images each metric is the reference's of as many copies of them, for each number and as the mean."""
    outputs, labels = numbers()
    drawn = torch.randint(len(labels), (4, len(labels)), generator=torch.Generator().manual_seed(1))
    weights = torch.stack([torch.bincount(row, minlength=len(labels)) for row in drawn]).double()
    found, mean = number_metrics(outputs, labels)[metric](weights), mean_metrics(outputs, labels)[metric](weights)
    for row, each, one in zip(drawn, found, mean, strict=True):
        copies = labels[row].numpy(), outputs[row].numpy()
        wanted = [REFERENCES[metric](*(part[:, [i]] for part in copies)) for i in range(3)]
        np.testing.assert_allclose(each, wanted, rtol=1e-9)
        assert one.item() == pytest.approx(np.mean(wanted), rel=1e-9)


def test_what_is_not_defined_is_left_out():
    """Labels that are all the same have neither R2 nor a rank correlation; outputs that are all the same rank nothing: 0."""
    outputs, labels = numbers()
    flat = labels.clone()
    flat[:, 0] = 7.0
    whole = torch.ones(1, len(labels))
    found = number_metrics(outputs, flat)
    assert [found[name](whole).isnan().tolist()[0] for name in ("mae", "r2", "spearman")] == [
        [False] * 3,
        *[[True, False, False]] * 2,
    ]
    assert number_metrics(torch.zeros_like(labels), labels)["spearman"](whole).tolist() == [[0, 0, 0]]
    row = compute_metrics(RECIPE, outputs[:, :1], flat[:, :1])
    assert "r2" not in row and math.isfinite(row["mae"])


def test_intervals_are_those_of_the_bootstrap_of_images_or_groups():
    """An interval has the middle 95 % of the reference's values of the same draws; with groups, of whole groups."""
    outputs, labels = (part[:, 2:] for part in numbers())
    for groups in (None, [str(i // 3) for i in range(len(labels))]):
        found = measure(RECIPE, outputs, labels, groups, names=("size",), units=Units((0.0,), (1.0,)))
        weights = torch.cat([*resampled(len(labels), groups)]).long()
        copies = [torch.arange(len(labels)).repeat_interleave(row) for row in weights[:200]]
        drawn = [mean_absolute_error(labels[row], outputs[row]) for row in copies]
        own = mean_metrics(outputs, labels)["mae"](weights.float())
        np.testing.assert_allclose(own[:200], drawn, rtol=1e-9)
        assert found["intervals"]["mae"] == pytest.approx(own.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
        assert found["numbers"][0]["name"] == "size" and found["numbers"][0]["intervals"] == found["intervals"]


def test_the_baseline_is_the_error_of_the_training_mean():
    """Beside the metrics stands what scikit-learn's DummyRegressor, fitted to the training labels, reaches."""
    from sklearn.dummy import DummyRegressor

    outputs, labels = numbers()
    train = numbers(90)[1].numpy() * 1.1
    units = Units(tuple(train.mean(0)), tuple(train.std(0)))
    guess = DummyRegressor().fit(np.zeros((90, 1)), train).predict(np.zeros((60, 1)))
    found = measure(RECIPE, outputs, labels, names="abc", units=units)["baseline"]
    assert found["mae"] == pytest.approx(mean_absolute_error(labels, guess))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(labels, guess))
    assert found["numbers"]["rmse"] == pytest.approx(root_mean_squared_error(labels, guess, multioutput="raw_values").tolist())


def test_minus_100_is_a_number():
    """Of numbers an image that could not be read is NaN, and left out; -100 is a label like any other."""
    outputs, labels = numbers()
    labels[3] = -100.0
    wanted = compute_metrics(RECIPE, outputs, labels)
    missing = torch.full_like(labels[:2], torch.nan)
    padded = compute_metrics(RECIPE, torch.cat([outputs, outputs[:2]]), torch.cat([labels, missing]))
    assert padded == wanted and wanted["val_images"] == 60
    assert is_unreadable(torch.cat([labels, missing])).tolist() == [False] * 60 + [True] * 2


def test_of_errors_less_is_better():
    """model-best, early stopping and the plateau take the lower MAE, and the higher R2; shares are in percent, errors not."""
    rows = [{"mae": value, "r2": value, "loss": 1.0} for value in (3.0, 1.0, 2.0, 2.5)]
    assert best_row(rows, "mae") is rows[1] and best_row(rows, "r2") is rows[0]
    stop = EarlyStop(patience=2)
    assert not stop.should_stop(rows[:3], "mae") and stop.should_stop(rows, "mae") and stop.should_stop(rows[:3], "r2")
    plateau = Plateau(patience=0)
    falling = [3.0, 2.0, 1.0]
    assert plateau.toward("mae").scale(3, 1, 9, falling) == 1 and plateau.toward("r2").scale(3, 1, 9, falling) < 0.2
    assert plateau.toward("top1") is plateau
    assert [write_value("mae", 0.5), write_value("top1", 0.5)] == ["0.5", "50.00%"]
    assert fits("huber", "spearman") and not fits("huber", "top1") and not fits("binary", "mae")
    assert replace(RECIPE, loss="l1").of_numbers and not small_recipe().of_numbers
