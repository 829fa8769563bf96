"""Splits: which images validate, by their names, in groups, in folds."""

import csv
import json
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from finetune.data.sources import load_data
from finetune.data.split import deal, place
from finetune.inference.evaluate import load_labelled_images
from finetune.recipe import Data
from finetune.recipe.load import recipe_of_run
from finetune.run import main
from finetune.utils.errors import RecipeError
from helpers import on_folder, small_recipe
from image_files import put_image, write_csv

SEVERAL = {"loss": "multi_label", "metric": "mean_average_precision"}


def load(where, other=(), **fields):
    return load_data(small_recipe(data=Data(str(where), 24, 8, **fields), **dict(other)))


def photographs(root, a=40, b=20):
    """Class folders whose files are named by one of 12 patients: a/p3_17.png."""
    for name, number in (("a", a), ("b", b)):
        for i in range(number):
            put_image(root / name / f"p{i % 12}_{i}.png", i)
    return root


def below(root, images):
    return {str(path).removeprefix(str(root)) for path in images.items}


def test_added_images_move_none_across(tmp_path):
    """Images that are added, and a folder that is moved, leave each image on the side where it was."""
    train, val = set(), set()
    for number in (10, 20, 40, 80, 160):
        root = photographs(tmp_path / f"{number}", number, number)
        data = load(root)
        assert train <= below(root, data.train) and val <= below(root, data.val)
        train, val = below(root, data.train), below(root, data.val)
    assert 35 <= len(val) <= 93  # of 320: a fifth, and four times the binomial standard deviation


def test_names_count_in_any_form_of_unicode():
    """A name that macOS has taken apart is drawn as Linux's is; another is drawn otherwise, and all evenly."""
    assert place("é.jpg") == place(unicodedata.normalize("NFD", "é.jpg")) != place("e.jpg")
    counts = np.histogram([place(str(i)) for i in range(10_000)], 10, (0, 1))[0]
    assert abs(counts - 1000).max() < 120  # 4 standard deviations


def test_every_class_is_on_both_sides(tmp_path):
    """However small the share and the class, each has an image on either side, from two images on; one is refused."""
    root = photographs(tmp_path / "data", 40, 2)
    for share in (0.001, 0.5, 0.999):
        data = load(root, val_share=share)
        assert set(data.train.labels) == set(data.val.labels) == {0, 1} and len(data.train) + len(data.val) == 42
    (root / "b" / "p1_1.png").unlink()
    with pytest.raises(RecipeError, match="by its images: class 'b' has 1, and each of 2 parts needs one; add some, or"):
        load(root)


@pytest.mark.parametrize("pattern,number", [(r"(p\d+)_", 12), (r"p\d+", 12), (r"_(\d)", 10), (r"^(a|b)/p\d", 2)])
def test_no_group_is_on_both_sides(tmp_path, pattern, number):
    """What the first ( ) of group_pattern finds in a path, or all of it, stays together, in folds and in a holdout, too."""
    root = photographs(tmp_path / "data")
    if number == 2:  # as many groups as classes
        with pytest.raises(RecipeError, match="by its groups: class 'a' has 1, and each of 2 parts needs one"):
            load(root, group_pattern=pattern)
        return
    found = set()
    for options in ({}, {"val_share": 0.4}, {"folds": 3, "fold": 1}, {"holdout": 0.3}, {"folds": 3, "holdout": 0.3}):
        data = load(root, group_pattern=pattern, **options)
        assert not set(data.train.groups) & set(data.val.groups)
        assert set(data.train.labels) == set(data.val.labels) == {0, 1}
        found |= {*data.train.groups, *data.val.groups}
    assert len(found) == number


def test_folds_are_as_balanced_as_scikit_learns():
    """Each group is in exactly one fold, and classes are as even as by StratifiedGroupKFold, but for the luck of the draw.

    That one chooses groups to be even. Ours are drawn by name: a class's share of a fold then differs by as much as it would
    by chance, four standard deviations of a fifth of 300 groups, which is 9 points.
    """
    random = np.random.RandomState(0)
    groups = np.repeat(np.arange(300), random.randint(1, 8, 300))
    labels = random.choice(3, len(groups), p=(0.6, 0.3, 0.1))
    folds = deal([f"patient {i}" for i in groups], labels, "abc", [0.2] * 5)
    theirs = np.empty_like(folds)
    for fold, (_, val) in enumerate(StratifiedGroupKFold(5).split(labels, labels, groups)):
        theirs[val] = fold
    assert all(len(set(folds[groups == group])) == 1 for group in range(300)) and set(folds) == set(range(5))

    def unevenness(parts):
        counts = np.array([np.bincount(labels[parts == fold], minlength=3) for fold in range(5)])
        return abs(counts / counts.sum(0) - 0.2).max()

    assert unevenness(folds) <= unevenness(theirs) + 4 * np.sqrt(0.2 * 0.8 / 300)


def test_folds_make_up_the_set(tmp_path):
    """The folds' validation images are all images, once; of a class with fewer images than folds none is made."""
    root = photographs(tmp_path / "data", 40, 6)
    parts = [load(root, folds=4, fold=fold) for fold in range(4)]
    assert Counter(path for data in parts for path in data.val.items) == Counter([*parts[0].train.items, *parts[0].val.items])
    assert all(set(data.val.labels) == {0, 1} for data in parts)
    with pytest.raises(RecipeError, match="class 'b' has 6, and each of 7 parts needs one"):
        load(root, folds=7)


@pytest.mark.parametrize("pattern", [None, r"(p\d+)_"])
def test_folds_of_the_training_images(tmp_path, pattern):
    """Parts of the size of a holdout make up the training images, once; none validates, and no group is on both sides."""
    photographs(tmp_path / "data" / "train", 40, 24)
    photographs(tmp_path / "data" / "val", 12, 12)
    root, own = tmp_path / "data", load(tmp_path / "data", group_pattern=pattern)
    parts = [load(root, holdout=0.25, holdout_fold=fold, group_pattern=pattern) for fold in range(4)]
    assert Counter(path for data in parts for path in data.val.items) == Counter(own.train.items)
    for data in parts:
        assert set(data.train.items) | set(data.val.items) == set(own.train.items) and set(data.val.labels) == {0, 1}
        assert not pattern or not set(data.train.groups) & set(data.val.groups)


@pytest.mark.parametrize(
    "options", [{"holdout_fold": 0}, {"holdout": 0.3, "holdout_fold": 0}, {"holdout": 0.25, "holdout_fold": 4}]
)
def test_a_fold_of_the_training_images_that_is_none_is_refused(options):
    """Without a holdout, with one that is no equal part, and past the last part."""
    with pytest.raises(RecipeError, match="holdout_fold=. is not among the parts of holdout=.*, counted from 0"):
        small_recipe(data=Data("digits", 24, 8, **options))


def table(tmp_path, split=False, group=True, several=False):
    """A CSV of 48 images of 12 patients; where a split is asked for, patient 0 is on both sides."""
    labels = ("a", "b", "a;b", "c") if several else ("a", "b")
    rows = []
    for i in range(48):
        put_image(tmp_path / f"p{i // 4}_{i}.png", i)
        cells = [f"p{i // 4}_{i}.png", labels[i % len(labels)]]
        cells += ["val" if i < 2 or i > 43 else "train"] * split + [f" p{i // 4}"] * group
        rows.append(",".join(cells))
    return write_csv(tmp_path, rows, "path,label" + ",split" * split + ",group" * group)


@pytest.mark.parametrize("several", [False, True])
def test_a_column_group(tmp_path, several):
    """A table's groups stay together, as those of a pattern do; with several labels an image, in a holdout, too."""
    other = SEVERAL if several else {}
    for options in ({}, {"holdout": 0.3}, {"folds": 3, "fold": 2}):
        data = load(table(tmp_path, several=several), other, **options)
        by_pattern = load(table(tmp_path, group=False, several=several), other, group_pattern=r"^(p\d+)_", **options)
        assert not set(data.train.groups) & set(data.val.groups) and len({*data.train.groups, *data.val.groups}) <= 12
        assert data.val.items == by_pattern.val.items and np.array_equal(data.val.labels, by_pattern.val.labels)
        if several:
            assert all(np.asarray(part.labels).any(0).all() for part in (data.train, data.val))


@pytest.mark.parametrize(
    "options,fault",
    [
        ({"val_share": 0.3}, "val_share has no effect on .* which has a split of its own"),
        ({"folds": 3}, "folds has no effect on .* which has a split of its own"),
        ({"group_pattern": "p"}, "a column group, and the recipe a group_pattern: leave one of them"),
    ],
)
def test_what_has_no_effect_on_a_split_is_refused(tmp_path, capsys, options, fault):
    """A source with a split of its own takes no other, and says which groups it has on both sides; so with a val folder."""
    file = table(tmp_path, split=True)
    with pytest.raises(RecipeError, match=fault):
        load(file, **options)
    load(file)
    assert f"1 groups of {file} are in training and in validation (p0)" in capsys.readouterr().err
    for part in ("train", "val"):
        photographs(tmp_path / "data" / part)
    if "group_pattern" in options:
        load(tmp_path / "data", group_pattern=r"/(p\d+)_")
        assert "12 groups of" in capsys.readouterr().err
    else:
        with pytest.raises(RecipeError, match=fault):
            load(tmp_path / "data", **options)


@pytest.mark.parametrize("where", ["digits", "torchvision"])
def test_sets_without_files_have_neither_groups_nor_another_split(where, monkeypatch):
    """A named set, and images in memory, refuse what would have no effect on them."""
    for options in ({"group_pattern": "x"}, {"folds": 3}, {"val_share": 0.5}):
        with pytest.raises(RecipeError, match="needs files|has a split of its own"):
            load("digits", **options)


def test_images_without_a_group_are_named(tmp_path):
    """A path in which the pattern finds nothing, or an empty cell, is no group."""
    root = photographs(tmp_path / "data")
    put_image(root / "a" / "other.png", 0)
    with pytest.raises(RecipeError, match="finds nothing in 1 of 61 paths, such as a/other.png"):
        load(root, group_pattern=r"p\d+_")
    rows = [f"a/p0_{i}.png,{'ab'[i % 2]},{i}" for i in (0, 12, 24)] + ["a/p1_1.png,a, "]
    with pytest.raises(RecipeError, match="1 rows have no group, first row 5"):
        load(write_csv(root, rows, "path,label,group"))


@pytest.mark.parametrize(
    "options,fault",
    [
        ({"folds": 5, "val_share": 0.2}, "folds and val_share exclude each other"),
        ({"fold": 1}, "fold=1 is not among folds=None"),
        ({"folds": 3, "fold": 3}, "fold=3 is not among folds=3"),
        ({"group_pattern": "("}, "group_pattern is no regular expression"),
    ],
)
def test_fields_that_do_not_go_together(options, fault):
    """Each pair of fields that can't be obeyed together is refused before any image is read."""
    with pytest.raises(RecipeError, match=fault):
        small_recipe(data=Data("photos", 24, 8, **options))


def test_a_run_keeps_its_split(tmp_path, capsys):
    """A run's images.csv has the split and the groups; evaluate takes the same images, also where others were added."""
    root, run = photographs(tmp_path / "data"), tmp_path / "run"
    fields = ("data.folds=3", "data.fold=2", r"data.group_pattern=(p\d+)_", "epochs=1")
    assert main(on_folder(root, run, *fields)) == 0
    out = " ".join(capsys.readouterr().out.split())
    rows = list(csv.DictReader((run / "images.csv").open()))
    sides = {part: {row["group"] for row in rows if row["split"] == part} for part in ("train", "val")}
    kept = {row["file"] for row in rows if row["split"] == "val"}
    assert not sides["train"] & sides["val"] and len(rows) == 60
    assert f"{len(kept)} validation images of {len(sides['val'])} groups (fold 2 of 0 to 2)" in out
    assert json.loads((run / "result.json").read_text())["val_images"] == len(kept)
    recipe = recipe_of_run(run)[0]
    assert {*map(str, load_data(recipe).val.items)} == kept
    put_image(root / "a" / "p99_99.png", 5)
    shutil.copytree(root, tmp_path / "moved")
    for place_now in (root, tmp_path / "moved"):
        found = load_labelled_images(str(place_now), recipe, ("a", "b"), run)
        assert {str(path).removeprefix(str(place_now)) for path in found.items} == {
            path.removeprefix(str(root)) for path in kept
        }
