"""Splits of several labels an image, against iterative-stratification's, and those of one, against what they were."""

import hashlib
import json

import numpy as np
import pytest

from finetune.data.split import deal
from finetune.training.run_dir import check_same_images
from finetune.utils.errors import RecipeError


def made(images, classes, seed):
    """Labels from common to rare, of which the second mostly comes with the first; some images have none."""
    rng = np.random.default_rng(seed)
    labels = rng.random((images, classes)) < np.geomspace(0.4, max(0.01, 6 / images), classes)
    labels[:, 1] |= labels[:, 0] & (rng.random(images) < 0.5)
    return labels[:, labels.sum(0) >= 5].astype(np.uint8)


def dealt(labels, shares, groups=None):
    """The part of each image, or of its group."""
    return deal(groups or [f"{i}.jpg" for i in range(len(labels))], labels, [*map(str, range(labels.shape[1]))], shares)


def off(parts, labels, shares):
    """How many images each part has too many or too few of each class, and of all."""
    counted = np.insert(labels, 0, 1, axis=1).astype(int)
    return abs(np.array([counted[parts == part].sum(0) for part in range(len(shares))]) - np.outer(shares, counted.sum(0)))


@pytest.mark.parametrize("images,classes", [(60, 4), (300, 10), (1000, 20)])
def test_classes_have_their_shares_as_by_the_library(images, classes):
    """Folds are no further from their shares, and a fifth no more than a tenth of an image, on average over five tables."""
    library = pytest.importorskip("iterstrat.ml_stratifiers")
    errors = []
    for seed in range(5):
        labels, theirs, side = made(images, classes, seed), np.zeros(images, int), np.ones(images, int)
        for fold, (_, val) in enumerate(
            library.MultilabelStratifiedKFold(5, shuffle=True, random_state=seed).split(labels, labels)
        ):
            theirs[val] = fold
        split = library.MultilabelStratifiedShuffleSplit(1, test_size=0.2, random_state=seed).split(labels, labels)
        side[next(split)[1]] = 0
        pairs = ((dealt(labels, [0.2] * 5), theirs, [0.2] * 5), (dealt(labels, [0.2, 0.8]), side, [0.2, 0.8]))
        errors.append([off(parts, labels, shares).mean() for ours, other, shares in pairs for parts in (ours, other)])
    folds, library_folds, fifth, library_fifth = np.mean(errors, 0)
    assert folds <= library_folds + 1e-9 and fifth <= library_fifth + 0.1


def test_shares_are_nearer_than_by_chance():
    """Each class of 300 images has its share of each fold but for one image; drawn by names it would be off by several."""
    labels = made(300, 10, 0)
    assert off(dealt(labels, [0.2] * 5), labels, [0.2] * 5).max() <= 1
    by_name = deal([f"{i}.jpg" for i in range(300)], np.zeros(300, int), ["a"], [0.2] * 5)
    assert off(by_name, labels, [0.2] * 5).max() > 5


@pytest.mark.parametrize("shares", [[0.2, 0.8], [0.01, 0.99], [1 / 3] * 3])
def test_every_class_is_in_every_part(shares):
    """From as many images as parts on, however rare it is and however small the part."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.random((80, 6)) < 0.3
        labels[:, 4:] = False
        for column in (4, 5):
            labels[rng.choice(80, len(shares), replace=False), column] = True
        parts = dealt(labels, shares)
        assert all(labels[parts == part].any(0).all() for part in range(len(shares)))


def test_groups_stay_together():
    """Groups of 1 to 8 images are in one part each, and classes have their shares but for the size of a group."""
    labels, rng = made(400, 8, 1), np.random.default_rng(1)
    owners = [f"patient {i}" for i in np.repeat(np.arange(100), rng.integers(1, 9, 100))[:400]]
    labels = labels[: len(owners)]
    parts = dealt(labels, [0.25] * 4, owners)
    assert len({*zip(owners, parts.tolist(), strict=True)}) == len(set(owners))
    assert off(parts, labels, [0.25] * 4).max() <= 8
    halves = dealt(np.ones((12, 1), int), [0.5, 0.5], ["large"] * 6 + [f"small {i}" for i in range(6)])
    assert sum(halves) == 6  # the large one first


def test_the_order_of_rows_does_not_count():
    """A table in another order splits the same: what is equal is drawn by name."""
    labels, names = made(200, 6, 2), [f"{i}.jpg" for i in range(200)]
    order = np.random.default_rng(0).permutation(200)
    parts, again = dealt(labels, [0.2, 0.8], names), dealt(labels[order], [0.2, 0.8], [names[i] for i in order])
    assert np.array_equal(parts[order], again)
    others = dealt(labels, [0.2, 0.8], [f"x{name}" for name in names])
    assert not np.array_equal(parts, others)


def test_one_label_is_split_as_it_was():
    """A thousand images are in the parts that they were in before several labels were stratified, to the bit."""
    names, labels = [f"{i}.jpg" for i in range(1000)], np.arange(1000) ** 2 % 7
    for shares, digest in (([0.2, 0.8], "5ebca90a7957c878"), ([0.2] * 5, "48b11f23f624a188")):
        parts = deal(names, labels, "abcdefg", shares)
        assert hashlib.blake2b(bytes(parts.tolist()), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize("loss,said", [("multi_label", True), ("binary", False)])
def test_a_run_that_was_split_otherwise_is_not_resumed(tmp_path, loss, said):
    """As many images in all, on other sides, are refused; of several labels an image, that the split is new is said."""
    before, now = {"training": "30 ab", "validation": "10 cd"}, {"training": "32 ef", "validation": "8 gh"}
    (tmp_path / "run.json").write_text(json.dumps({"images": before, "classes": ["a", "b"]}))
    (tmp_path / "recipe.json").write_text(json.dumps({"loss": loss}))
    with pytest.raises(RecipeError, match="training images: 30 before, 32 now") as caught:
        check_same_images(tmp_path, now, ["a", "b"], [], False)
    assert ("an earlier version splits several labels an image otherwise" in str(caught.value)) == said
