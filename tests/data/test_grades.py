"""Labels that are grades: classes in their order, numbers that are whole, and what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from regression import write_numbers

from finetune.data.sources import load_data, whole_data
from finetune.recipe import Data
from finetune.utils.errors import RecipeError
from helpers import prepare, small_recipe


def write_grades(folder, names, images=4):
    """A CSV of so many images of each class, each in a subgroup and a group, and one more to validate."""
    with open(folder / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split", "subgroup", "group"])
        for i, name in enumerate([*names] * (images + 1)):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
            split = "train" if i < images * len(names) else "val"
            table.writerow([f"{i}.png", name, split, f"of {name}", f"group {i}"])
    return folder / "table.csv"


def recipe_of(source, metric="quadratic_kappa", loss="cross_entropy", **data):
    return small_recipe(data=Data(source if callable(source) else str(source), 24, 8, **data), metric=metric, loss=loss)


def named(images, classes):
    """What each image is labelled, in words, by its file."""
    return {item.name: classes[label] for item, label in zip(images.items, images.labels, strict=True)}


def test_classes_are_in_the_order_of_grades(tmp_path):
    """10 comes after 9 and -1 before 0 where kappa asks, and nowhere else; each image keeps its label, subgroup and group."""
    names = ["9", "10", "7", "8.0", "11", "6", "5", "4", "3", "2", "1", "0", "-1"]
    table = write_grades(tmp_path, names)
    graded, plain = (load_data(recipe_of(table, metric)) for metric in ("quadratic_kappa", "top1"))
    assert graded.classes == ("-1", "0", "1", "2", "3", "4", "5", "6", "7", "8.0", "9", "10", "11")
    assert plain.classes == tuple(sorted(names))
    for ours, theirs in ((graded.train, plain.train), (graded.val, plain.val)):
        assert named(ours, graded.classes) == named(theirs, plain.classes)
        assert [f"of {graded.classes[label]}" for label in ours.labels] == ours.subgroups and ours.groups == theirs.groups
    held = load_data(recipe_of(table, holdout=0.25))
    assert held.classes == graded.classes and {*named(held.val, held.classes).items()} <= {
        *named(graded.train, graded.classes).items()
    }
    assert whole_data(recipe_of("digits")).classes == tuple("0123456789")
    assert load_data(recipe_of("generated")).classes[0] == "patch 0"  # of --smoke, in order already


def test_folders_of_grades(tmp_path):
    """Class folders named by whole numbers come in their order, too; a fifth of each is drawn to validate."""
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        for j in range(5):
            Image.fromarray(np.full((8, 8, 3), 20 * i + j, np.uint8)).save(tmp_path / str(i) / f"{j}.png")
    data = load_data(recipe_of(tmp_path))
    assert data.classes == tuple(map(str, range(12)))
    for part in (data.train, data.val):
        assert [Path(item).parent.name for item in part.items] == [data.classes[label] for label in part.labels]
    numbers = load_data(recipe_of(tmp_path, loss="huber"))
    assert numbers.classes == ("label",) and {*map(str, numbers.train.items)} | {*map(str, numbers.val.items)} == {
        *map(str, tmp_path.glob("*/*.png"))
    }
    for part in (numbers.train, numbers.val):
        assert [float(Path(item).parent.name) for item in part.items] == part.labels[:, 0].tolist()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "mild", "2"], "the class 'mild' is named by none"),
        (["0", "1.5", "3"], "the class '1.5' is named by none"),
        (["0", "3", "03"], "the classes '03' and '3' are the same grade"),
        (["0", "1", "2", "4"], "there is none between '2' and '4'"),
    ],
)
def test_classes_that_are_no_grades_are_refused(tmp_path, names, said):
    """The first class that is no whole number, two of one grade and a gap are named; another metric takes them all."""
    table = write_grades(tmp_path, names)
    with pytest.raises(RecipeError, match=said):
        load_data(recipe_of(table))
    assert len(load_data(recipe_of(table, "top1")).classes) == len(names)
    assert load_data(recipe_of(write_grades(tmp_path, ["30", "10", "20"]))).classes == ("10", "20", "30")  # even steps


def test_numbers_must_be_whole(tmp_path):
    """A number that is no grade is named, in training and in validation; whole ones keep their values and their ends."""
    values = np.array([[0, 10], [4, 30], [2, 20], [1, 10], [3, 10]] * 3)
    splits = ["train", "train", "train", "val", "val"] * 3
    table = write_numbers(tmp_path, values, ("label_a", "label_b"), splits)
    recipe = recipe_of(table, loss="mse")
    net, _, (train, _) = prepare(recipe)
    assert np.unique(train.images.labels[:, 1]).tolist() == [10, 20, 30]
    hook = next(iter(net.fc._forward_hooks.values()))
    assert (hook.units.lowest, hook.units.highest) == ((0, 10), (4, 30))
    for row in (0, 3):
        changed = values.astype(float)
        changed[row, 1] = 2.5
        table = write_numbers(tmp_path, changed, ("label_a", "label_b"), splits)
        with pytest.raises(RecipeError, match="'b' is 2.5 in one image"):
            load_data(recipe)
    write_numbers(tmp_path, np.where(np.arange(15)[:, None] % 5 > 2, 1, values), ("label_a", "label_b"), splits)
    with pytest.raises(RecipeError, match="all validation images have the same label"):
        prepare(recipe)


class Graded(list):
    """A set of a function, which knows its labels."""

    def __init__(self, classes):
        super().__init__((Image.new("RGB", (8, 8), (i, i, i)), i % len(classes)) for i in range(9))
        self.classes, self.targets = classes, [label for _, label in self]


def in_order():
    return Graded(["8", "9", "10"]), Graded(["8", "9", "10"])


def in_disorder():
    return Graded(["10", "8", "9"]), Graded(["10", "8", "9"])


def test_a_functions_classes_must_be_in_order():
    """The labels of a function's sets can't be renumbered: it says which order is wanted."""
    assert load_data(recipe_of(in_order)).classes == ("8", "9", "10")
    with pytest.raises(RecipeError, match="in order: of .*in_disorder `classes` must be 8, 9, 10"):
        load_data(recipe_of(in_disorder))
