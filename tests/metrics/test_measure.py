"""Metrics against scikit-learn's, intervals against scipy's, temperatures against an independent fit."""

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import bootstrap
from sklearn import metrics as theirs

from finetune.data.loader import UNREADABLE
from finetune.metrics.calibration import COLDEST, HOTTEST, calibrate, deal, fit_temperature, probabilities
from finetune.metrics.compute import best_row, compute_metrics, subgroup_metrics
from finetune.metrics.measure import measure, metrics_of, resampled
from finetune.recipe import EarlyStop, Recipe
from finetune.utils.errors import RecipeError
from helpers import small_recipe

LOSSES = ("cross_entropy", "binary", "multi_label")
THRESHOLDS = np.linspace(0.2, 0.7, 7)


def made(loss, images=300, classes=7, seed=0, scale=1.5):
    """Logits that know something of their labels, with ties between images; of one label an image one class is not there."""
    rng = np.random.default_rng(seed)
    if loss == "multi_label":
        labels = (rng.random((images, classes)) < np.linspace(0.1, 0.6, classes)).astype(np.int64)
        logits = 2 * scale * (labels - 0.5) + rng.normal(0, scale, (images, classes))
    else:
        labels = rng.choice(classes - 1, images, p=np.arange(1, classes) / sum(range(classes)))
        logits = rng.normal(0, scale, (images, classes))
        logits[np.arange(images), labels] += scale
    return torch.tensor(logits.round(1) + np.arange(classes) / 1000, dtype=torch.float32), torch.tensor(labels)


def recipe_of(loss) -> Recipe:
    return replace(small_recipe(), loss=loss, metric="mean_average_precision" if loss == "multi_label" else "top1")


def expected(loss, logits, labels, temperature):
    """Each metric by scikit-learn; of classes that are not there, those that it can't give are left out."""
    raw, cooled = (probabilities(loss, logits, value).numpy() for value in (1.0, temperature))
    truth = labels.numpy()
    onehot = truth if loss == "multi_label" else np.eye(raw.shape[1])[truth]
    there = [k for k in range(raw.shape[1]) if 0 < onehot[:, k].sum() < len(onehot)]
    areas = [theirs.roc_auc_score(onehot[:, k], raw[:, k]) for k in there]
    precisions = [theirs.average_precision_score(onehot[:, k], raw[:, k]) for k in there]
    found = {"auroc": np.mean(areas)}
    if loss == "multi_label":
        found["mean_average_precision"] = np.mean(precisions)
        found["macro_f1"] = theirs.f1_score(truth, raw > 0.5, average="macro")
        found["macro_f1_at_thresholds"] = theirs.f1_score(truth, cooled > THRESHOLDS, average="macro")
    else:
        guess, every = raw.argmax(1), range(raw.shape[1])
        found |= {
            "average_precision": np.mean(precisions),
            "top1": theirs.accuracy_score(truth, guess),
            "top5": theirs.top_k_accuracy_score(truth, logits.numpy(), k=5, labels=every),
            "balanced_accuracy": theirs.balanced_accuracy_score(truth, guess),
            "macro_f1": theirs.f1_score(truth, guess, average="macro", labels=every, zero_division=0),
            "kappa": theirs.cohen_kappa_score(truth, guess),
        }
    if loss == "cross_entropy":
        found["log_loss"] = theirs.log_loss(truth, cooled, labels=range(raw.shape[1]))
        found["brier"] = ((cooled - onehot) ** 2).sum(1).mean()
    else:
        found["log_loss"] = np.mean([theirs.log_loss(onehot[:, k], cooled[:, k], labels=[0, 1]) for k in range(raw.shape[1])])
        found["brier"] = np.mean([theirs.brier_score_loss(onehot[:, k], cooled[:, k]) for k in range(raw.shape[1])])
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_are_scikit_learns(loss):
    """To 1e-6, with equal scores, a class that is not there, and images without a label, at a temperature."""
    logits, labels = made(loss)
    temperature = 1.7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that is predicted and not there
        wanted = expected(loss, logits, labels, temperature)
    given = (temperature, THRESHOLDS.tolist())
    found = measure(recipe_of(loss), logits, labels, fitted=given)
    assert found.keys() - {"intervals", "calibration", "ece", "thresholds"} == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    gone = torch.full_like(labels[:3], UNREADABLE)
    more = measure(recipe_of(loss), torch.cat([logits, logits[:3]]), torch.cat([labels, gone]), fitted=given)
    assert more == found


@pytest.mark.parametrize("loss", LOSSES)
def test_the_calibration_error_is_torchmetrics(loss):
    """Of the likeliest class in 15 bins, or of each class by itself."""
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = made(loss)
    probs = probabilities(loss, logits).float()
    confidence, truth = probs.max(1).values, (probs.argmax(1) == labels).int() if loss != "multi_label" else None
    if loss == "multi_label":
        confidence, truth = probs.flatten(), labels.flatten()
    wanted = functional.binary_calibration_error(confidence, truth, n_bins=15, norm="l1").item()
    assert calibrate(loss, logits, labels)["ece"][0] == pytest.approx(wanted, abs=1e-5)
    assert measure(recipe_of(loss), logits, labels, fitted=(1.0, None))["ece"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_intervals_are_scipys(loss):
    """The percentiles of scipy's bootstrap of the images, within what 1,000 draws of each leave to chance."""
    logits, labels = made(loss, images=200)
    found = measure(recipe_of(loss), logits, labels)
    names = ("macro_f1", "log_loss", "auroc")
    metrics = metrics_of(loss, logits, labels, found["calibration"]["temperature"])

    def of_images(drawn):
        weights = torch.bincount(torch.tensor(drawn), minlength=200).float()
        return [metrics[name](weights[None]).item() for name in names]

    wanted = bootstrap(
        (np.arange(200),), of_images, n_resamples=1000, method="percentile", vectorized=False, rng=np.random.default_rng(1)
    )
    for i, name in enumerate(names):
        low, high = found["intervals"][name]
        width = high - low
        assert low < found[name] < high
        ends = wanted.confidence_interval.low[i], wanted.confidence_interval.high[i]
        assert [low, high] == pytest.approx(ends, abs=0.15 * width), name
    if loss != "multi_label":  # Wilson's
        share, z = found["top1"], 1.96
        middle, half = share + z * z / 400, z * math.sqrt(share * (1 - share) / 200 + z * z / 160_000)
        assert found["intervals"]["top1"] == pytest.approx(
            [(middle - half) / (1 + z * z / 200), (middle + half) / (1 + z * z / 200)]
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_some_images_at_a_time_give_the_same(loss, monkeypatch):
    """As all at once, to the last digits of the sums."""
    logits, labels = made(loss)
    recipe = recipe_of(loss)
    whole = measure(recipe, logits, labels) | compute_metrics(recipe, logits, labels)
    monkeypatch.setattr("finetune.metrics.calibration.AT_ONCE", 7 * 11)  # logits: 11 images
    monkeypatch.setattr("finetune.metrics.measure.COLUMNS", 3)
    parts = measure(recipe, logits, labels) | compute_metrics(recipe, logits, labels)
    assert parts.keys() == whole.keys()
    for name in whole:
        assert flat(parts[name]) == pytest.approx(flat(whole[name]), rel=1e-9), name


def flat(value):
    """The numbers in nested lists and dicts."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [number for one in inner for number in flat(one)]


def test_many_classes_take_little_memory_beside_their_logits():
    """4,000 images of 5,000 classes, whose logits have 76 MiB: mostly that of 1,000 draws of as many classes."""
    code = """
import torch
from finetune.metrics.compute import compute_metrics
from finetune.metrics.measure import measure
from finetune.utils.device import peak_memory
from helpers import small_recipe
recipe, labels = small_recipe(), torch.arange(4000) % 5000
logits = torch.randn(4000, 5000)
measure(recipe, logits[:20, :50].clone(), labels[:20])  # what the first call of each function needs
before = peak_memory(torch.device("cpu"))
measure(recipe, logits, labels, fitted=(1.5, None))
compute_metrics(recipe, logits, labels)
print((peak_memory(torch.device("cpu")) - before) * 2**30 / (logits.numel() * 4))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) < 6  # 19 with copies of them all in float64


def test_images_of_a_group_are_drawn_together():
    """Each draw has all of a group as often, and copies of images in groups make no interval narrower."""
    groups = [name for name in "abcdefgh" for _ in range(5)]
    (weights,) = resampled(40, groups)
    assert weights.shape == (1000, 40) and (weights.view(1000, 8, 5) == weights.view(1000, 8, 5)[..., :1]).all()
    assert (weights.view(1000, 8, 5)[..., 0].sum(1) == 8).all()
    logits, labels = made("cross_entropy", images=60)
    alone = measure(recipe_of("cross_entropy"), logits, labels, [str(i) for i in range(60)])
    copies = measure(recipe_of("cross_entropy"), logits.repeat(9, 1), labels.repeat(9), [str(i) for i in range(60)] * 9)
    assert copies["intervals"]["top1"] == pytest.approx(alone["intervals"]["top1"], abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.3, 1.5, 8.0])
def test_the_temperature_is_that_of_an_independent_fit(loss, scale):
    """The log loss is no higher than at scipy's, which minimizes it with its own formula."""
    logits, labels = made(loss, scale=scale)
    truth = labels.numpy() if loss == "multi_label" else np.eye(7)[labels.numpy()]
    truth = truth * (1 - 1 / 302) + 1 / 302 / (7 if loss == "cross_entropy" else 2)  # Platt's targets

    def cost(log_temperature):
        scaled = logits.double().numpy() / np.exp(log_temperature)
        if loss == "cross_entropy":
            top = scaled.max(1, keepdims=True)
            return (np.log(np.exp(scaled - top).sum(1)) + top[:, 0] - (scaled * truth).sum(1)).mean()
        return (np.logaddexp(0, scaled) - scaled * truth).mean()

    best = minimize_scalar(cost, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(loss, logits, labels) == pytest.approx(math.exp(best.x), rel=1e-4)


def test_what_can_not_be_fitted_is_bounded():
    """Logits that are always right, always wrong or no numbers, no image, and one."""
    right = 5.0 * torch.eye(4)
    few, many = (fit_temperature("cross_entropy", right.repeat(n, 1), torch.arange(4).repeat(n)) for n in (1, 10_000))
    assert many < few and probabilities("cross_entropy", right, few).max().item() == pytest.approx(1 - 1 / 6 + 1 / 24)
    assert fit_temperature("cross_entropy", right * 100, torch.arange(4)) == pytest.approx(HOTTEST, rel=1e-4)
    assert fit_temperature("cross_entropy", right, torch.arange(4).flip(0)) == pytest.approx(HOTTEST, rel=1e-4)
    assert fit_temperature("cross_entropy", right * torch.nan, torch.arange(4)) == 1
    assert fit_temperature("cross_entropy", right, torch.full((4,), UNREADABLE)) == 1
    one = measure(recipe_of("cross_entropy"), right[:1], torch.tensor([0]))
    assert one["calibration"]["temperature"] == 1
    assert one["top1"] == 1 and "auroc" not in one and json.loads(json.dumps(one)) == one


def test_after_is_measured_on_images_that_were_not_fitted():
    """By hand, fold by fold; a temperature that does not help there, or was fitted to few images, is 1."""
    logits, labels = made("cross_entropy", images=500, scale=4.0)
    found, folds, cooled = calibrate("cross_entropy", logits, labels), deal(500, None), logits.double().clone()
    assert sorted(folds.bincount().tolist()) == [100] * 5
    for fold in range(5):
        cooled[folds == fold] /= fit_temperature("cross_entropy", logits[folds != fold], labels[folds != fold])
    assert found["temperature"] == fit_temperature("cross_entropy", logits, labels)
    assert found["log_loss"][1] == pytest.approx(theirs.log_loss(labels, cooled.softmax(1), labels=range(7)))
    assert found["log_loss"][1] < found["log_loss"][0] and found["ece"][1] < found["ece"][0]
    once = calibrate("cross_entropy", logits / found["temperature"], labels)
    assert once["temperature"] == 1 and once["log_loss"][0] == once["log_loss"][1]
    assert calibrate("cross_entropy", logits[:9], labels[:9])["temperature"] == 1


def test_images_of_a_group_are_in_one_fold():
    """A temperature is not measured on the patient that it was fitted to."""
    groups = [f"patient {i // 7}" for i in range(140)]
    folds = deal(140, groups)
    assert (folds.view(20, 7) == folds.view(20, 7)[:, :1]).all() and sorted(folds.bincount().tolist()) == [28] * 5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("metric", ["log_loss", "brier", "ece"])
def test_less_of_some_is_better(loss, metric):
    """Of the metrics of probabilities; as the recipe's they are of the logits as they come, in each epoch and at the end."""
    logits, labels = made(loss, scale=4.0)
    recipe = replace(recipe_of(loss), metric=metric)
    each, end = compute_metrics(recipe, logits, labels), measure(recipe, logits, labels)
    assert each[metric] == end[metric] and end["calibration"]["used"] == 1 != end["calibration"]["temperature"]
    if metric != "ece":
        low, high = end["intervals"][metric]
        assert low < end[metric] < high
        assert end[metric] == pytest.approx(expected(loss, logits, labels, 1.0)[metric], abs=1e-6)
    rows = [{metric: value} for value in (0.5, 0.2, 0.4)]
    assert best_row(rows, metric) is rows[1]
    assert not EarlyStop(patience=2).should_stop(rows, metric)
    assert EarlyStop(patience=2).should_stop([*rows, rows[0]], metric)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auroc", "kappa"])
def test_each_can_choose_the_best_epoch(metric):
    """It is computed each epoch, as at the end; where it is not defined, that is an error, not a number."""
    logits, labels = made("cross_entropy")
    recipe = replace(small_recipe(), metric=metric)
    assert compute_metrics(recipe, logits, labels)[metric] == measure(recipe, logits, labels)[metric]
    if metric == "auroc":
        with pytest.raises(RecipeError, match="not defined here"):
            compute_metrics(recipe, logits[:2], torch.tensor([3, 3]))
        assert replace(recipe, loss="multi_label").metric == "auroc"
    else:
        with pytest.raises(RecipeError, match="do not go together"):
            replace(recipe, loss="multi_label")


@pytest.mark.parametrize("metric", ["auroc", "kappa"])
def test_a_subgroup_of_one_class_ends_no_run(metric):
    """Where the recipe's metric is not defined it is left out of that subgroup, which keeps its others."""
    logits, labels = 5.0 * torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2])
    found = subgroup_metrics(replace(small_recipe(), metric=metric), logits, labels, ["a", "a", "b", "b"])
    assert metric not in found["a"] and found["a"]["top1"] == 1 and found["b"][metric] == 1
