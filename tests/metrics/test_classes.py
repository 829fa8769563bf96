"""Precision, recall and F1 of each class, and their intervals, against scikit-learn's and scipy's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import f1_score, precision_recall_fscore_support

from finetune.data.loader import UNREADABLE
from finetune.inference.evaluate import evaluation_as_text
from finetune.metrics.classes import class_metrics
from finetune.metrics.compute import compute_metrics, subgroup_metrics
from finetune.metrics.measure import measure
from helpers import small_recipe

NAMES = [f"class {i}" for i in range(6)]
LOSSES = ("cross_entropy", "multi_label")


def made(loss, images=240, seed=0):
    """Logits and labels of six classes: the last has no image, and the one before is never predicted."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (images, 6))
    if loss == "multi_label":
        labels = (rng.random((images, 6)) < [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]).astype(np.int64)
        logits += 2 * labels
    else:
        labels = rng.choice(5, images, p=[0.4, 0.3, 0.15, 0.1, 0.05])
        logits[np.arange(images), labels] += 1.5
    logits[:, 4] = -9
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_shares_are_scikit_learns_and_their_intervals_scipys(loss):
    """Each share, and Wilson's interval of precision and recall; images without a label change nothing."""
    logits, labels = made(loss)
    guess = (logits > 0).long() if loss == "multi_label" else logits.argmax(1)
    rows = class_metrics(logits, labels, NAMES)
    every = None if loss == "multi_label" else range(6)
    wanted = precision_recall_fscore_support(labels, guess, labels=every, zero_division=0)
    for i, row in enumerate(rows):
        assert [row[key] for key in ("precision", "recall", "f1", "images")] == pytest.approx([column[i] for column in wanted])
        truth, said = (part[:, i] == 1 if part.ndim == 2 else part == i for part in (labels, guess))
        hits, sizes = int((truth & said).sum()), {"precision": int(said.sum()), "recall": int(truth.sum())}
        for key, size in sizes.items():
            assert (key in row["intervals"]) == (size > 0)
            if size:
                ends = binomtest(hits, size).proportion_ci(method="wilson")  # with 1.95996 standard deviations, not 1.96
                assert row["intervals"][key] == pytest.approx([ends.low, ends.high], abs=1e-4)
    gone = torch.full_like(labels[:2], UNREADABLE)
    assert class_metrics(torch.cat([logits, logits[:2]]), torch.cat([labels, gone]), NAMES) == rows


@pytest.mark.parametrize("loss", LOSSES)
def test_the_interval_of_f1_is_nearly_scipys_bootstrap(loss):
    """Of some hundred images, where the bootstrap is sound: within a fifth of its width; of none right, it ends above 0."""
    logits, labels = made(loss, images=600)
    guess = (logits > 0).long() if loss == "multi_label" else logits.argmax(1)
    truth, said = (part[:, 0] if part.ndim == 2 else part == 0 for part in (labels.numpy(), guess.numpy()))
    drawn = bootstrap((truth, said), f1_score, paired=True, vectorized=False, n_resamples=500, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    first, *_, never, _ = class_metrics(logits, labels, NAMES)
    assert first["intervals"]["f1"] == pytest.approx([low, high], abs=0.2 * (high - low))
    assert never["f1"] == 0 and never["intervals"]["f1"][0] == 0 < never["intervals"]["f1"][1] < 0.3


@pytest.mark.parametrize("loss", LOSSES)
def test_copies_of_images_in_a_group_make_no_interval_narrower(loss):
    """Groups are drawn: nine copies of each image, in its group, have the intervals of the images alone, each its group."""
    logits, labels = made(loss, images=60)
    groups = [str(i) for i in range(60)]
    copies = (logits.repeat(9, 1), labels.repeat(9, *[1] * (labels.ndim - 1)))
    alone, many = class_metrics(logits, labels, NAMES, groups), class_metrics(*copies, NAMES, groups * 9)
    for one, other in zip(alone, many, strict=True):
        assert {key: pytest.approx(ends, abs=1e-6) for key, ends in one["intervals"].items()} == other["intervals"]
    assert class_metrics(*copies, NAMES)[0]["intervals"]["recall"] != pytest.approx(many[0]["intervals"]["recall"], abs=0.02)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_subgroup_has_the_intervals_of_its_images_alone(loss, grouped):
    """The metrics of a subgroup and their intervals are what `measure` finds on its images, and are written."""
    logits, labels = made(loss)
    recipe = replace(small_recipe(), loss=loss, metric="mean_average_precision" if loss == "multi_label" else "kappa")
    names, groups = ["left", "right", "right"] * 80, [str(i // 4) for i in range(240)] if grouped else None
    labels[0] = UNREADABLE
    parts = subgroup_metrics(recipe, logits, labels, names, groups)
    assert [part["val_images"] for part in parts.values()] == [79, 160]
    for name, part in parts.items():
        own = [i for i in range(240) if names[i] == name]
        wanted = measure(recipe, logits[own], labels[own], [groups[i] for i in own] if groups else None)["intervals"]
        assert recipe.metric in part["intervals"]
        assert part["intervals"] == {key: pytest.approx(wanted[key]) for key in part["intervals"]}
    rows = {"classes": class_metrics(logits, labels, NAMES, groups), "by_subgroup": parts}
    text = evaluation_as_text(
        {**measure(recipe, logits, labels, groups), **compute_metrics(recipe, logits, labels), "val_images": 239, **rows}
    )
    low, high = rows["classes"][0]["intervals"]["recall"]
    assert f"{100 * low:.0f}-{100 * high:.0f}" in next(line for line in text.splitlines() if line.startswith("class 0"))
    assert max(map(len, text.splitlines())) <= 80
