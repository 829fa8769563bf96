"""The sheets of images of a run: what they show, and that it can be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from PIL import Image
from sklearn.metrics import accuracy_score
from torch import nn

from figures import assert_readable, figure_of, overlap
from finetune.data.loader import UNREADABLE, epoch_batches, load_batches
from finetune.recipe import Augment
from finetune.report import sheets
from finetune.report.heat_maps import heat_maps, overlay
from helpers import prepare, small_recipe
from image_files import put_image, source


class Sheet(list):
    """Images with the paths that they came from, as a folder's have."""

    def __init__(self, files):
        super().__init__((Image.new("RGB", (30 + 10 * (i % 3), 40), (5 * i, 0, 0)), 0) for i in range(len(files)))
        self.items = files


@pytest.mark.parametrize("number,with_heat", [(1, False), (3, True), (30, True)])
def test_mistakes_are_named_by_their_files(tmp_path, monkeypatch, number, with_heat):
    """Under each image stand its file's name, its label and what it was predicted as; all of it can be read."""
    long, last = "a_name_that_is_as_long_as_names_may_be_" * 2, number - 1
    logits, labels = torch.zeros(number, 4), torch.full((number,), 2)
    guesses = torch.where(torch.arange(number) == last, 1, 3)
    logits[range(number), guesses], labels[last] = 3.0 + torch.arange(number) / 100, 0
    net, _, (_, images) = prepare(small_recipe())
    images.images = Sheet([Path(f"/photos/bees/IMG_{'' if i == last else long}{i}.jpg") for i in range(number)])
    images.classes = ("bees", "ants", long, f"another_{long}")
    net = net if with_heat else None
    figure = figure_of(monkeypatch, sheets, lambda: sheets.plot_mistakes(tmp_path, logits, labels, images, net))
    assert_readable(figure)
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.get_xlabel()]
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if overlap(box, other)]
    prob = f"{100 * logits[-1].softmax(0)[1]:.0f} %"
    assert figure.axes[0].get_xlabel() == f"IMG_{number - 1}.jpg\nlabelled bees,\npredicted ants ({prob})"
    shown = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(shown) == min(24, number)
    worst = f"the {len(shown)} worst of {number} mistakes" if number > len(shown) else f"{number} mistake{'s' * (number > 1)}"
    assert figure.get_suptitle().splitlines()[1] == f"{worst} in {number} images"


def test_the_worst_mistakes_come_first(tmp_path, monkeypatch):
    """The sheet has the wrong images only, by falling loss, with label, guess and probability; unreadable ones are left out."""
    recipe = small_recipe()
    _, _, (_, images) = prepare(recipe)
    labels = torch.tensor([images.images[i][1] for i in range(len(images))])
    logits = torch.nn.functional.one_hot(labels, 10) * 4.0
    for i, strength in ((2, 6.0), (5, 9.0), (7, 7.0)):
        logits[i, (labels[i] + 1) % 10] = strength
    labels[7] = UNREADABLE
    titles, shown = [], []
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text, **kwargs: titles.append(text))
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **kwargs: shown.append(np.asarray(image)))
    assert sheets.plot_mistakes(tmp_path, logits, labels, images) == tmp_path / "mistakes.png"
    assert [title.splitlines()[1] for title in titles] == [f"labelled patch {labels[i]}," for i in (5, 2)]
    prob = 100 * logits[5].softmax(0).max()
    assert titles[0].splitlines()[::2] == ["image 5", f"predicted patch {(labels[5] + 1) % 10} ({prob:.0f} %)"]
    np.testing.assert_array_equal(shown[0], np.asarray(images.images[5][0]))
    assert sheets.plot_mistakes(tmp_path, torch.nn.functional.one_hot(labels.clamp(min=0), 10) * 4.0, labels, images) is None


def test_mistakes_stand_beside_what_speaks_for_their_classes(tmp_path, monkeypatch, capsys):
    """Right of each image is the heat for the predicted class, then for the labelled one; if that fails, the images alone."""
    net, _, (_, images) = prepare(small_recipe())
    labels = torch.tensor([images.images[i][1] for i in range(len(images))])
    logits = torch.nn.functional.one_hot((labels + torch.tensor([1, 1, *[0] * (len(labels) - 2)])) % 10, 10) * 4.0
    logits[1] *= 2
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **kwargs: shown.append(np.asarray(image)))
    sheets.plot_mistakes(tmp_path, logits, labels, images, net)
    assert len(shown) == 2
    pixels = images.transform.batch(torch.stack([images[0, 1][0]]))
    for i, classes in enumerate((logits[1:2].argmax(1), labels[1:2])):
        wanted = overlay(images.images[1][0], heat_maps(net, pixels, classes)[0], images.transform.preprocessing)
        side = wanted.width
        found = shown[0][:, (i + 1) * (side + 4) :][:, :side]
        assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 2
    capsys.readouterr()
    for net, words in ((DoesNotRun(), "no heat maps of the mistakes: RuntimeError: not today"), (nn.Flatten(), "")):
        assert sheets.plot_mistakes(tmp_path, logits, labels, images, net)
        assert words in (said := capsys.readouterr().err) and bool(words) == bool(said)
        assert shown[-1].shape == shown[-2].shape == np.asarray(images.images[0][0]).shape


class DoesNotRun(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, images):
        raise RuntimeError("not today")


def darker(image, rng):
    """An augmentation of a recipe's own."""
    return image.point(lambda value: value * rng.uniform(0.2, 0.8))


SHOWN = {
    "pixels": Augment(),
    "timm": Augment(auto_augment="rand-m9", erasing=1.0),
    "own": Augment(function=darker, rot90=1.0, gaussian_blur_prob=1.0),
}


@pytest.mark.parametrize("augment", SHOWN.values(), ids=SHOWN)
def test_the_sheet_of_augmented_images_shows_what_is_trained_on(tmp_path, monkeypatch, augment):
    """Beside each image stand its name and label, and then, epoch by epoch, the pixels of the run's own batches."""
    recipe = small_recipe(augment=augment)
    _, _, (images, _) = prepare(recipe)
    shown = []
    with monkeypatch.context() as patched:
        patched.setattr(Axes, "imshow", lambda self, image, **kwargs: shown.append(np.asarray(image)))
        figure = figure_of(monkeypatch, sheets, lambda: sheets.plot_augmented(tmp_path, images, 2))
    texts = [axes.get_xlabel() for axes in figure.axes]
    assert texts[0] == f"image 0\n{images.classes[images.images[0][1]]}"
    assert texts[1:3] == ["epoch 1\n", "epoch 2\n"] and len(shown) == 18
    np.testing.assert_array_equal(shown[0], np.asarray(images.images[0][0]))
    assert "as augmented in epochs 1 to 2" in figure.get_suptitle()
    mean, std = (np.array(images.transform.preprocessing[name]) for name in ("mean", "std"))
    for epoch in (0, 1):
        plans = epoch_batches(recipe, images, epoch)
        for plan, batch in zip(plans, load_batches(images, epoch, plans, 0), strict=True):
            if 0 in plan.images:
                trained = batch.micro_batches[0][0][plan.images.index(0)].permute(1, 2, 0).numpy() * std + mean
                np.testing.assert_allclose(shown[1 + epoch] / 255, trained.clip(0, 1), atol=1 / 255)  # shown in 8 bits


def test_unreadable_images_are_not_on_the_sheet(tmp_path, monkeypatch):
    """Where they are to be skipped the sheet leaves them out, and of none there is no sheet; else the run stops there."""
    for i in range(12):
        put_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    recipe = source(tmp_path / "photos")
    _, _, (images, _) = prepare(recipe)
    first = Path(images.images.items[0])
    first.write_bytes(first.read_bytes()[:60])
    with pytest.raises(Exception, match="can't read the image"):
        sheets.plot_augmented(tmp_path, images, 3)
    images.on_bad_image = "skip"
    figure = figure_of(monkeypatch, sheets, lambda: sheets.plot_augmented(tmp_path, images, 3))
    assert len([axes for axes in figure.axes if axes.get_xlabel().startswith("epoch 1")]) == 5
    images.cache = None
    for file in images.images.items:
        Path(file).write_bytes(b"")
    assert sheets.plot_augmented(tmp_path, images, 3) is None


@pytest.mark.parametrize("classes,each", [(2, 1), (10, 10), (100, 2)])
def test_the_sheet_of_predictions_is_of_all_kinds(tmp_path, monkeypatch, classes, each):
    """Images drawn evenly, right ones green and wrong ones red, with how many are right of all as scikit-learn counts them."""
    labels = torch.arange(classes).repeat_interleave(each)
    logits = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(0))
    logits[range(len(labels)), labels] += 1
    images = prepare(small_recipe())[2][1]
    images.images = Sheet([Path(f"IMG_{i}.jpg") for i in range(len(labels))])
    images.classes = [f"class {i}" for i in range(classes)]
    figure = figure_of(monkeypatch, sheets, lambda: sheets.plot_predictions(tmp_path, logits, labels, images))
    assert_readable(figure)
    shown = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(shown) == min(24, len(labels))
    for axes in shown:
        name, label, guess = axes.get_xlabel().splitlines()
        i = int(name.removeprefix("IMG_").removesuffix(".jpg"))
        assert label == f"labelled class {labels[i]}," and guess.startswith(f"predicted class {logits[i].argmax()} (")
        assert same_color(axes.xaxis.label.get_color(), "C2" if logits[i].argmax() == labels[i] else "C3")
    right = accuracy_score(labels, logits.argmax(1), normalize=False)
    assert f"of all, {right:.0f} are predicted as labelled" in figure.get_suptitle()


def test_predictions_of_several_labels_name_them_all(tmp_path, monkeypatch):
    """With several labels an image, it is right if all are; classes above 0.5 are predicted."""
    images = prepare(small_recipe())[2][1]
    images.images, images.classes = Sheet([Path(f"{i}.jpg") for i in range(2)]), ("red", "round", "small")
    labels, logits = torch.tensor([[1.0, 1, 0], [0, 0, 1]]), torch.tensor([[2.0, 1, -3], [2, -1, -1]])
    figure = figure_of(monkeypatch, sheets, lambda: sheets.plot_predictions(tmp_path, logits, labels, images))
    assert figure.axes[0].get_xlabel().splitlines()[1:] == ["labelled red, round,", "predicted red, round"]
    assert figure.axes[1].get_xlabel().splitlines()[1:] == ["labelled small,", "predicted red (88 %)"]
    right, wrong = (axes.xaxis.label.get_color() for axes in figure.axes[:2])
    assert same_color(right, "C2") and same_color(wrong, "C3")
