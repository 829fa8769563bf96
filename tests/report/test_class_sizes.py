"""How many images each class has, as a picture."""

from collections import Counter

import numpy as np
import pytest

from figures import assert_readable, figure_of
from finetune.data.dataset import ImageData, ImageList
from finetune.report import class_sizes
from finetune.utils.errors import RecipeError

LONG = "a_name_that_is_as_long_as_names_may_be_" * 2


def images_of(labels):
    return ImageList([*labels], labels, None)


def drawn(monkeypatch, tmp_path, data):
    return figure_of(monkeypatch, class_sizes, lambda: class_sizes.plot_class_sizes(tmp_path / "out.png", "my recipe", data))


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_each_class_has_a_bar(tmp_path, monkeypatch, classes):
    """Bars are as long as there are images, the longest above, with both numbers behind them; all of it can be read."""
    draw = np.random.RandomState(0)
    train, val = ([*range(classes), *draw.randint(0, classes, 9 * classes).tolist()] for _ in range(2))
    names = tuple(f"{LONG}{i}" if i % 3 else f"class {i}" for i in range(classes))
    figure = drawn(monkeypatch, tmp_path, ImageData(images_of(train), images_of(val), names))
    assert_readable(figure)
    (axes,) = figure.axes
    wanted = Counter(train).most_common()
    assert [bar.get_width() for bar in axes.containers[0]] == [number for _, number in wanted]
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == sorted(f"{number} + {Counter(val)[one]}" for one, number in wanted)
    ends = wanted[0][1] / wanted[-1][1]
    assert f"{ends:.1f} times" in figure.get_suptitle() or f"{ends:.0f} times" in figure.get_suptitle()


@pytest.mark.parametrize("classes", [41, 100, 1000])
def test_of_many_classes_the_ends_are_named(tmp_path, monkeypatch, classes):
    """The curve falls from the largest class to the smallest, and the ten at each end stand below it with their numbers."""
    train = np.repeat(np.arange(classes), np.arange(classes) + 1)
    names = tuple(f"{LONG}{i}" if i % 3 else f"class {i}" for i in range(classes))
    figure = drawn(monkeypatch, tmp_path, ImageData(images_of(train.tolist()), images_of([0, 0]), names))
    assert_readable(figure)
    curve, below = figure.axes
    np.testing.assert_array_equal(curve.lines[0].get_ydata(), np.sort(np.bincount(train))[::-1])
    rows = below.texts[0].get_text().splitlines()
    assert len(rows) == 11 and all(f"({i})" in row for i, row in enumerate(rows[1:]))
    assert f"({classes - 1})" in rows[1] and f"{classes:,} + 0" in rows[1]
    assert rows[1].endswith("1 + 2") and f"{classes:,} times" in figure.get_suptitle()


def test_several_labels_an_image_are_each_counted(tmp_path, monkeypatch):
    """An image with two classes counts for both; of a set that knows no labels the error says what is missing."""
    labels = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0]])
    figure = drawn(monkeypatch, tmp_path, ImageData(images_of(labels), images_of(labels[:1]), ("red", "round", "small")))
    assert [bar.get_width() for bar in figure.axes[0].containers[0]] == [3, 1, 1]
    assert "3 training and 1 validation images of 3 classes" in figure.get_suptitle()
    with pytest.raises(RecipeError, match="need to know every label"):
        drawn(monkeypatch, tmp_path, ImageData([(None, 0)], [(None, 1)], ("a", "b")))
