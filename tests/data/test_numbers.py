"""Tables and functions of numbers: what is read, and what is refused with its first row."""

import numpy as np
import pytest
from PIL import Image
from regression import write_numbers

from finetune.data.dataset import file_rows, fingerprint
from finetune.data.loader import load
from finetune.data.sources import load_data
from finetune.recipe import Data
from finetune.tools.check import check
from finetune.tools.image_stats import compute_image_stats, recipe_for
from finetune.utils.errors import RecipeError
from helpers import Coloured, prepare, small_recipe


def recipe_of(source, **changes):
    return small_recipe(data=Data(source if callable(source) else str(source), 24, 8, **changes), loss="mse", metric="mae")


def rewrite(table, *changes):
    """The table with texts in it replaced."""
    text = table.read_text()
    for old, new in changes:
        text = text.replace(old, new, 1)
    table.write_text(text)
    return table


def test_columns_of_numbers_are_read_as_they_are_called(tmp_path):
    """label_NAME and target_NAME are numbers of these names, in any unit; -100 and exponents are numbers."""
    values = np.array([[-100, 2.5e-7], [1e6, 3], [0.25, -4]] * 4)
    data = load_data(recipe_of(write_numbers(tmp_path, values, ("Target_Blood pressure", "label_Größe"), ["train", "val"] * 6)))
    assert data.classes == ("Blood pressure", "Größe")
    assert data.train.labels.tolist() == values[::2].tolist() and data.val.labels.tolist() == values[1::2].tolist()
    rows = file_rows(data.train, data.val, data.classes)
    assert rows[0][1] == "-100.0;2.5e-07" and {row[0] for row in rows} == {"train", "val"}


def test_a_split_is_drawn_by_names_alone(tmp_path):
    """Without a column split a fifth or so is drawn, whatever the numbers; groups stay whole."""
    values = np.random.RandomState(0).normal(size=60)
    table = write_numbers(tmp_path, values)
    drawn = load_data(recipe_of(table))
    assert 5 <= len(drawn.val) <= 20 and len(drawn.train) + len(drawn.val) == 60
    rewritten = load_data(recipe_of(write_numbers(tmp_path, values * 7)))
    assert rewritten.val.items == drawn.val.items
    assert len(load_data(recipe_of(table, holdout=0.25)).train) < len(drawn.train)


def test_other_numbers_are_other_images(tmp_path):
    """The fingerprint, by which a resumed run knows its images, tells numbers apart that differ behind the point."""
    found = []
    for value in (0.25, 0.75, 0.25):
        data = load_data(recipe_of(write_numbers(tmp_path, [value, *range(9)], splits=["train", "val"] * 5)))
        found.append(fingerprint(data.train, data.classes))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    "changes,words",
    [
        ([("2.0", "large")], "1 rows have no number in label, first row 4 ('large')"),
        ([("2.0", "")], "1 rows have no number in label, first row 4 ('')"),
        ([("2.0", "nan"), ("3.0", "inf")], "2 rows have no number in label, first row 4 ('nan')"),
        ([("2.0", "1e39")], "first row 4 ('1e39')"),
        ([("2.0", "2;3")], "('2;3'); several numbers an image: a column label_NAME for each"),
        ([("label", "weight")], "no column label or target, nor any label_NAME; its columns: path, weight"),
        ([("label", "label,label_age")], "there are numbers in the column label, and in label_age: leave one"),
        ([("3.png,3.0", "2.png,3.0")], "1 rows give a file another label, such as 2.png: '2.0' in row 4 and '3.0' in row 5"),
    ],
)
def test_what_is_no_number_is_named_with_its_row(tmp_path, changes, words):
    """A cell that is no finite number, a missing column and a file with two numbers are each one sentence."""
    table = rewrite(write_numbers(tmp_path, np.arange(12.0)), *changes)
    with pytest.raises(RecipeError) as caught:
        load_data(recipe_of(table))
    assert words in str(caught.value)


class Numbered(Coloured):
    """A recipe's own set, of numbers."""

    def __getitem__(self, index):
        return Image.new("RGB", (20, 20), (40 * (index % 6), 90, 90)), self.targets[index]


def test_a_function_may_return_numbers(tmp_path):
    """Labels of a function's sets are numbers, alone or in rows; another number of them, and NaN, are refused."""
    names = ("age",)
    parts = [Numbered([1.5, -100.0, 3.25, 7.0], names), Numbered([2.0, 3.0], names)]
    _, _, (train, _) = prepare(recipe_of(lambda: parts))
    ((_, labels),) = load(train, 0, [[0, 1, 2]], 0)
    assert labels.tolist() == [[1.5], [-100.0], [3.25]]
    with pytest.raises(RecipeError, match="a label has the shape"):
        load_data(recipe_of(lambda: [Numbered([1.5, 2.5], ("age", "size"))] * 2))
    parts[0].targets[1] = float("nan")
    train.images.targets = parts[0].targets
    with pytest.raises(RecipeError, match="image 1 has the label nan, and not a number"):
        list(load(train, 0, [[1]], 0))


def test_labels_are_what_a_table_leaves_no_doubt_of(tmp_path, capsys):
    """Columns label_NAME and decimals are numbers, whole ones classes; of more than 50 and of decimals it says what it took."""
    random = np.random.RandomState(0)
    for names, values, loss, said in (
        (("label_a", "label_b"), random.normal(size=(12, 2)), "huber", ""),
        (
            ("label",),
            random.normal(size=12),
            "huber",
            "12 different numbers, taken as numbers",
        ),
        (("label",), np.arange(24.0) % 2, "cross_entropy", ""),
        (
            ("label",),
            np.arange(120.0) % 60,
            "cross_entropy",
            "60 different whole numbers, taken as classes; as",
        ),
        (("label",), np.arange(61.0), "huber", "61 different whole numbers, taken as numbers"),
    ):
        table = write_numbers(tmp_path, values, names)
        assert recipe_for(str(table)).loss == loss
        err = " ".join(capsys.readouterr().err.split())
        assert said in err if said else not err
        assert recipe_for(str(table), "l1").loss == "l1" and not capsys.readouterr().err  # as asked for
    rewrite(table, ("0.0", "a;b"))
    assert recipe_for(str(table)).loss == "multi_label"


def test_statistics_of_numbers(tmp_path):
    """suggest's statistics have the ends of each number; check is for classes, and says so."""
    values = np.stack([np.arange(12.0) / 4, -np.arange(12.0)], 1)
    table = write_numbers(tmp_path, values, ("label_a", "label_b"))
    stats = compute_image_stats(str(table))
    assert (stats.classes, stats.loss, stats.train + stats.val) == (("a", "b"), "huber", 12)
    assert stats.ranges == ((0, 2.75), (-11, 0)) and stats.smallest == stats.largest
    with pytest.raises(RecipeError, match="are numbers, and check is for classes"):
        check(str(table), None, "none")
    whole = write_numbers(tmp_path, np.arange(24.0) % 2)
    assert compute_image_stats(str(rewrite(whole))).classes == ("0.0", "1.0")
