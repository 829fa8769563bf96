"""Quadratic weighted kappa against scikit-learn: of classes in the order of grades, and of numbers that are rounded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from torch.nn.functional import one_hot

from finetune.metrics.compute import compute_metrics, subgroup_metrics
from finetune.metrics.measure import measure, metrics_of, resampled
from finetune.metrics.numbers import number_metrics, to_grades
from finetune.models.linear_probe import Units
from finetune.recipe.metrics import direction, fits, write_value
from finetune.results.paired import compare
from helpers import small_recipe

OF_CLASSES = small_recipe(metric="quadratic_kappa")
OF_NUMBERS = small_recipe(loss="huber", metric="quadratic_kappa")
UNITS = Units((2.0,) * 3, (1.0,) * 3, (0.0, 1.0, -30.0), (4.0, 10.0, 30.0))


def grades(images=80, seed=0):
    """(outputs, labels) of three grades: 0 to 4 without a label of 3, 1 to 10, and tens; outputs go beyond them."""
    random = np.random.RandomState(seed)
    labels = np.stack(
        [random.choice([0, 1, 2, 4], images), random.randint(1, 11, images), 10 * random.randint(-3, 4, images)], 1
    )
    outputs = labels + random.normal(size=labels.shape) * [1, 2, 20]
    return torch.tensor(outputs), torch.tensor(labels, dtype=torch.float64)


def kappa(labels, said, weights=None):
    """scikit-learn's, with a class for each grade there may be."""
    low, high = int(min(labels.min(), said.min())), int(max(labels.max(), said.max()))
    known = {"labels": range(low, high + 1), "weights": "quadratic", "sample_weight": weights}
    return cohen_kappa_score(labels.long(), said.long(), **known)


def test_it_is_scikit_learns_of_weighted_images():
    """Of numbers, rounded and clipped, and of classes, one of them without a label, it is the reference's to 1e-9."""
    outputs, labels = grades()
    weights = torch.rand(4, len(labels), generator=torch.Generator().manual_seed(1)).double()
    said = to_grades(outputs, UNITS)
    assert said.min(0).values.tolist() == [0, 1, -30] and said.max(0).values.tolist() == [4, 10, 30]
    found = number_metrics(outputs, labels, said)["quadratic_kappa"](weights)
    logits = one_hot(said[:, 0].long(), 5).float()
    for loss in ("cross_entropy", "binary"):
        of_classes = metrics_of(loss, logits, labels[:, 0].long())["quadratic_kappa"](weights)
        np.testing.assert_allclose(of_classes, found[:, 0], rtol=0, atol=1e-12)
    for row, values in zip(weights, found, strict=True):
        wanted = [kappa(labels[:, i], said[:, i], row.numpy()) for i in range(3)]
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_one_grade_alone_has_no_agreement():
    """Where all labels are the same it is 0, as scikit-learn's; where all predictions are that grade, too, it is left out."""
    labels, whole = torch.full((20, 1), 2.0), torch.ones(1, 20)
    said = torch.arange(20)[:, None] % 3
    assert number_metrics(said, labels, said)["quadratic_kappa"](whole).item() == kappa(labels[:, 0], said[:, 0]) == 0
    assert number_metrics(labels, labels, labels)["quadratic_kappa"](whole).isnan().item()
    found = measure(replace(OF_NUMBERS, metric="mae"), labels, labels, names="a", units=Units(*[(2.0,)] * 4))
    assert "quadratic_kappa" not in found and found["mae"] == 0


def test_each_part_of_a_result_has_it():
    """Each epoch's metrics, the result with its intervals, each number and each subgroup have the same value."""
    outputs, labels = grades()
    names, owners = ["a", "b"] * 40, [str(i // 4) for i in range(80)]
    each, end = (
        compute_metrics(OF_NUMBERS, outputs, labels, UNITS),
        measure(OF_NUMBERS, outputs, labels, owners, names="abc", units=UNITS),
    )
    said = to_grades(outputs, UNITS)
    wanted = [kappa(labels[:, i], said[:, i]) for i in range(3)]
    assert each["number_quadratic_kappa"] == pytest.approx(wanted, abs=1e-9)
    assert each["quadratic_kappa"] == pytest.approx(np.mean(wanted)) == end["quadratic_kappa"]
    assert [row["quadratic_kappa"] for row in end["numbers"]] == pytest.approx(wanted)
    draws = torch.cat([*resampled(80, owners)]).long()[:100]
    copies = [torch.arange(80).repeat_interleave(row) for row in draws]
    drawn = [kappa(labels[row, 0], said[row, 0]) for row in copies]
    np.testing.assert_allclose(number_metrics(outputs, labels, said)["quadratic_kappa"](draws.double())[:, 0], drawn, atol=1e-9)
    low, high = end["numbers"][0]["intervals"]["quadratic_kappa"]
    assert low < wanted[0] < high
    parts = subgroup_metrics(OF_NUMBERS, outputs, labels, names, owners, UNITS)
    logits = one_hot(said[:, 0].long(), 5).float()
    of_classes = subgroup_metrics(OF_CLASSES, logits, labels[:, 0].long(), names)
    assert measure(OF_CLASSES, logits, labels[:, 0].long())["quadratic_kappa"] == pytest.approx(wanted[0])
    for i, name in enumerate("ab"):
        expected = [kappa(labels[i::2, j], said[i::2, j]) for j in range(3)]
        assert parts[name]["quadratic_kappa"] == pytest.approx(np.mean(expected))
        assert of_classes[name]["quadratic_kappa"] == pytest.approx(expected[0])
        assert {*parts[name]["intervals"]} >= {"quadratic_kappa", "mae"} and "quadratic_kappa" in of_classes[name]["intervals"]


def test_who_did_not_ask_has_none():
    """Only a recipe with this metric has it: other classes and numbers are no grades. More is better, and it is no share."""
    logits, labels = torch.eye(3), torch.arange(3)
    assert "quadratic_kappa" not in measure(small_recipe(), logits, labels)
    assert "quadratic_kappa" not in compute_metrics(replace(OF_NUMBERS, metric="mae"), *grades(), Units((0.0,) * 3, (1.0,) * 3))
    assert direction("quadratic_kappa") == 1 and write_value("quadratic_kappa", 0.8123) == "0.8123"
    assert fits("binary", "quadratic_kappa") and fits("l1", "quadratic_kappa") and not fits("multi_label", "quadratic_kappa")


def test_two_networks_are_compared_by_it():
    """The difference of two networks' predicted grades is that of scikit-learn's kappas."""
    (ours, labels), others = grades(), grades(seed=1)[0]
    said = [to_grades(one, UNITS) for one in (ours, others)]
    found = compare(OF_NUMBERS, said[0], [said[1]], labels)
    one, other = (np.mean([kappa(labels[:, i], part[:, i]) for i in range(3)]) for part in said)
    assert found["difference"] == pytest.approx(one - other, abs=1e-9) and found["verdict"] == "gain"
