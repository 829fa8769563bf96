"""Two networks on the same images: intervals and p-values are those of SciPy."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from scipy.stats import bootstrap as reference
from sklearn.metrics import f1_score

from finetune.metrics.intervals import wilson
from finetune.results.paired import bootstrap, compare, interval_of, mcnemar
from helpers import small_recipe


@pytest.mark.parametrize("wins,losses", [(3, 0), (0, 4), (12, 5), (7, 7), (0, 1), (300, 240)])
def test_top1_is_compared_as_scipy_does(wins, losses):
    """The p-value and the interval are those of the exact binomial test of the images that one network alone has right."""
    found, test = mcnemar(wins, losses, 1000), binomtest(wins, wins + losses)
    assert found["p_value"] == pytest.approx(test.pvalue, rel=1e-9)
    ends = test.proportion_ci(method="exact")
    wanted = [(wins + losses) * (2 * end - 1) / 1000 for end in (ends.low, ends.high)]
    assert found["interval"] == pytest.approx(wanted, abs=1e-9) and found["difference"] == (wins - losses) / 1000
    assert (found["interval"][0] > 0 or found["interval"][1] < 0) == (found["p_value"] < 0.05)


def test_networks_that_agree_differ_by_nothing():
    """Where no image tells them apart, the interval is 0 to 0 and the p-value 1."""
    assert mcnemar(0, 0, 50) == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}


def some_logits(images=300, seed=0):
    """Labels, and logits of two networks of which the second is better."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (images,), generator=random)
    noise = [torch.randn(images, 3, generator=random) for _ in range(2)]
    return labels, *(part + scale * torch.eye(3)[labels] for part, scale in zip(noise, (1.0, 2.0), strict=True))


def test_other_metrics_are_bootstrapped_as_scipy_does():
    """The interval of macro F1, and of a difference of two, is the percentile interval of SciPy's bootstrap, to chance."""
    labels, one, other = some_logits()
    guesses = [logits.argmax(1) for logits in (one, other)]

    def difference(at):
        at = at.astype(int)
        scores = [f1_score(labels[at], guess[at], average="macro") for guess in guesses]
        return scores[1] - scores[0]

    recipe = small_recipe(metric="macro_f1")
    found = compare(recipe, other, [one], labels)
    wanted = reference((np.arange(300),), difference, vectorized=False, n_resamples=1000, method="percentile", rng=1)
    assert found["difference"] == pytest.approx(difference(np.arange(300)), abs=1e-9) and found["verdict"] == "gain"
    assert found["interval"] == pytest.approx([*wanted.confidence_interval], abs=0.015)
    low, high = interval_of(recipe, one, labels)
    assert low < f1_score(labels, guesses[0], average="macro") < high


def test_against_several_the_mean_is_compared():
    """The difference is to the mean of the others' metrics; images without a label are left out; top-1's interval is
    Wilson's."""
    labels, one, other = some_logits()
    recipe, right = small_recipe(), [(logits.argmax(1) == labels).double().mean().item() for logits in (one, other)]
    found = compare(recipe, other, [one, other], labels)
    assert found["difference"] == pytest.approx((right[1] - right[0]) / 2) and found["verdict"] == "gain"
    padded = [torch.cat([part, torch.full((5, *part.shape[1:]), -100, dtype=part.dtype)]) for part in (other, one, labels)]
    assert compare(recipe, padded[0], [padded[1]], padded[2]) == compare(recipe, other, [one], labels)
    assert compare(recipe, one, [other], labels)["verdict"] == "loss"
    assert interval_of(recipe, padded[1], padded[2]) == pytest.approx(wilson(right[0], 300))


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    """Of many values' mean, the interval is 1.96 standard errors to each side."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = bootstrap(lambda at: values[at].mean().item(), 2000)
    error = 1.96 * values.std().item() / 2000**0.5
    assert found["interval"] == pytest.approx([found["difference"] - error, found["difference"] + error], abs=0.2 * error)
