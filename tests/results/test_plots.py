"""The pictures of a plan and of a run: what they show, and that it can be read."""

import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix as theirs

from finetune.data.loader import UNREADABLE
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, Data, Group, Step, Switch
from finetune.recipe.serialize import to_dict
from finetune.results import plots
from finetune.results.runs import Run
from finetune.training.evaluate import confusion_matrix
from helpers import SmallNet, prepare, run_here, small_recipe

ROWS = (
    Group("head", "fc", lr=1e-2, schedule=Step(every=1, factor=0.5)),
    Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
    Group("norm", "norm", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9)),
    Group("stem", ".", lr=0),
)


def figure_of(monkeypatch, draw) -> Figure:
    """The figure that `draw` would write."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(plots, "save_figure", lambda figure, axes, file: found.append(figure))
        draw()
    return found[0]


def drawn(monkeypatch, draw):
    """The lines of the learning-rate panel of the picture that `draw` makes, {group: (epochs, lrs)}, and the marked epochs."""
    axes = figure_of(monkeypatch, draw).axes[-1]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    marks = sorted(line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_"))
    return lines, marks


@pytest.mark.parametrize("changes", [{}, {"switch": Switch(at=2, optimizer=SGD(), lr_factor=10.0)}, {"groups": ROWS}], ids=str)
def test_the_runs_picture_is_the_plans(tmp_path, monkeypatch, changes):
    """Every group's learning rate and first epoch, and every stage's mark, are in the run's picture as in the plan's before."""
    recipe = small_recipe(**changes)
    groups = build_param_groups(recipe, SmallNet())
    before, marks = drawn(monkeypatch, lambda: plots.plot_plan(tmp_path / "mine-plan.png", groups, 3, recipe.epochs))
    run_here(recipe, tmp_path)
    after, same_marks = drawn(monkeypatch, lambda: plots.plot_curves(tmp_path, recipe.metric))
    assert before.keys() == after.keys() and marks == same_marks == [1, 2]
    for name, line in before.items():
        np.testing.assert_array_equal(line, after[name])
        assert np.isfinite(line[-1, 1])
    third = "norm, from epoch 3" if "groups" in changes else "stem, from epoch 3"
    assert list(before) == ["head", "body, from epoch 2", third]  # epochs count from 1


def test_titles_say_what_it_is(tmp_path, monkeypatch):
    """A run's pictures have its recipe, its images and its result in their titles, the plan's its name."""
    run = write_run(tmp_path)
    title = figure_of(monkeypatch, lambda: plots.plot_curves(run, "top1")).get_suptitle()
    assert title == "resnet18_cifar on photos\ntop-1 70.00 % after epoch 4"
    same = run.rename(tmp_path / "photos-20260101-000000")
    (same / "run.json").write_text('{"name": "photos"}')
    assert plots.run_title(same) == "photos"  # of a recipe that was suggested for its images
    run = same.rename(run)
    (run / "run.json").write_text('{"name": "resnet18_cifar"}')
    logits, labels = predictions_of(3)
    draw = lambda: plots.plot_confusion_matrix(run, logits, labels, "abc", plots.run_title(run))  # noqa: E731
    right = int((logits.argmax(1) == labels).sum())
    assert figure_of(monkeypatch, draw).get_suptitle() == (
        f"resnet18_cifar on photos\n{right} of 30 images predicted as they are labelled"
    )
    groups = build_param_groups(small_recipe(), SmallNet())
    draw = lambda: plots.plot_plan(tmp_path / "mine-plan.png", groups, 3, 4)  # noqa: E731
    assert figure_of(monkeypatch, draw).get_suptitle() == "mine: learning rates as planned"


def test_epochs_count_from_1(tmp_path, monkeypatch):
    """What came after the first epoch stands at 1, the linear probe at 0; the best and the last are named with their epochs."""
    run = write_run(tmp_path)
    validation = figure_of(monkeypatch, lambda: plots.plot_curves(run, "top1")).axes[1]
    np.testing.assert_allclose(validation.lines[0].get_xydata(), [(0, 80), (1, 82), (2, 84), (3, 86), (4, 70)])
    marked = {line.get_label(): tuple(line.get_xydata()[0]) for line in validation.lines[1:]}
    assert marked == {
        "linear probe: 80.00 %": (0, 80),
        "best: 86.00 %, epoch 3": (3, pytest.approx(86)),
        "last: 70.00 %, epoch 4": (4, pytest.approx(70)),
    }


def test_a_notebook_shows_the_curves(tmp_path):
    """Run.plot gives a figure with a PNG of its own: a notebook needs no backend, and none is set."""
    before = matplotlib.get_backend()
    picture = Run(write_run(tmp_path)).plot()
    with Image.open(io.BytesIO(picture._repr_png_())) as shown:
        assert shown.size == (800, 1000) and matplotlib.get_backend() == before


def write_run(folder, groups=("head", "stem"), epochs=4) -> Path:
    """A run's folder, as far as pictures need it."""
    run = folder / "resnet18_cifar-20260102-030405"
    run.mkdir()
    recipe = to_dict(small_recipe(data=Data("/home/someone/photos", 24, 8)))
    (run / "recipe.json").write_text(json.dumps(recipe))
    rows = [{"epoch": -1, "step": 0, "loss": 0.9, "top1": 0.8, "val_images": 30}]
    for epoch in range(epochs):
        for step in (2 * epoch, 2 * epoch + 1):
            lr = {name: 1e-3 * 0.5**i for i, name in enumerate(groups)}
            rows.append({"step": step, "epoch": epoch, "loss": 1 / (step + 1), "grad_norm": 1.0 + step, "lr": lr})
        top1 = 0.7 if epoch == epochs - 1 else 0.82 + 0.02 * epoch
        row = {"epoch": epoch, "step": 2 * epoch + 2, "train_loss": 0.5, "loss": 0.6, "top1": top1, "val_images": 30}
        rows.append(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def predictions_of(classes, each=10):
    """Logits and labels: as many images of each class, most of them right, class 0 often taken for class 1."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    logits = torch.randn(len(labels), classes, generator=random)
    logits[range(len(labels)), labels] += 4
    logits[labels == 0, 1] += 5
    return logits, labels


def assert_readable(figure):
    """Every text lies within the picture, upright or not, at 7 points or more, and none overlaps another of its axes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    whole = figure.bbox.padded(2)
    for axes in figure.axes:
        texts = [axes.xaxis.label, axes.yaxis.label, *tick_labels(axes.xaxis), *tick_labels(axes.yaxis), *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        texts = [text for text in texts if text.get_visible() and text.get_text()]
        boxes = [text.get_window_extent(renderer) for text in texts]
        inside = [box for box, text in zip(boxes, texts, strict=True) if axes.axison or text in axes.texts]
        assert all(whole.fully_containsx(box.x0) and whole.fully_containsx(box.x1) for box in inside)
        assert all(whole.fully_containsy(box.y0) and whole.fully_containsy(box.y1) for box in inside)
        assert all(text.get_fontsize() >= 7 for text in texts)
        for i, box in enumerate(boxes):
            clashes = [texts[j].get_text() for j in range(i) if overlap(box, boxes[j])]
            assert not clashes, (texts[i].get_text(), clashes)
        if axes.get_legend():  # above the diagram: over no line
            assert axes.get_legend().get_window_extent(renderer).y0 >= axes.get_window_extent(renderer).y1 - 1


def tick_labels(axis):
    """Those that are drawn: at ticks within the limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]


def overlap(one, other):
    """Whether two boxes share more than their edges."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    return width > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1


@pytest.mark.parametrize("classes", [2, 10, 20, 21, 100, 1000])
def test_a_confusion_matrix_of_any_size_can_be_read(tmp_path, monkeypatch, classes):
    """Up to 20 classes have names and numbers; of more, the largest confusions are listed by name, and nothing is crowded."""
    logits, labels = predictions_of(classes)
    names = [f"class {i}" if i % 3 else f"a long name with a $ of number {i}" for i in range(classes)]
    counts = theirs(labels, logits.argmax(1), labels=range(classes))
    figure = figure_of(monkeypatch, lambda: plots.plot_confusion_matrix(tmp_path, logits, labels, names, "mine"))
    assert_readable(figure)
    axes, *below = figure.axes
    cells = {text.get_position()[::-1]: int(text.get_text()) for text in axes.texts}
    if classes <= 20:
        assert [text.get_text() for text in axes.get_yticklabels()] == [plots.shorten(name, 24) for name in names]
        assert not below and cells == {(i, j): counts[i, j] for i, j in zip(*counts.nonzero(), strict=True)}
        return
    assert not cells
    listed = below[0].texts[0].get_text().splitlines()[3:]
    wrong = counts - np.diag(counts.diagonal())
    assert f"{plots.shorten(names[0], 32)} (0)" in listed[0] and "class 1 (1)" in listed[0]
    assert f"{wrong[0, 1]} of 10, {wrong[0, 1] / 10:.0%}" in listed[0]
    assert [int(line.split(" of 10")[0].split()[-1]) for line in listed] == sorted(wrong.flatten(), reverse=True)[: len(listed)]


def test_a_confusion_matrix_without_confusions_says_so(tmp_path, monkeypatch):
    """Of many classes, all predicted rightly, there is no list."""
    logits = torch.eye(30)
    figure = figure_of(
        monkeypatch, lambda: plots.plot_confusion_matrix(tmp_path, logits, torch.arange(30), [str(i) for i in range(30)])
    )
    assert figure.axes[1].texts[0].get_text() == "no image was predicted as another class"


@pytest.mark.parametrize("groups,epochs", [(2, 1), (4, 8), (16, 30)])
def test_curves_can_be_read(tmp_path, groups, epochs):
    """Legends stand above their diagrams, nothing is written over a line, and no text is cut or overlaps another."""
    figure = plots.draw_curves(write_run(tmp_path, [f"blocks.{i}" for i in range(groups)], epochs), "top1")
    assert_readable(figure)
    assert not [text for axes in figure.axes for text in axes.texts]


def test_the_confusion_matrix_is_scikit_learns():
    """Rows are labels, columns predictions, in scikit-learn's counts."""
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    np.testing.assert_array_equal(confusion_matrix(logits, labels), theirs(labels, logits.argmax(1), labels=range(7)))


class Sheet(list):
    """Images with the paths that they came from, as a folder's have."""

    def __init__(self, files):
        super().__init__((Image.new("RGB", (30 + 10 * (i % 3), 40), (5 * i, 0, 0)), 0) for i in range(len(files)))
        self.items = files


@pytest.mark.parametrize("number", [1, 3, 30])
def test_mistakes_are_named_by_their_files(tmp_path, monkeypatch, number):
    """Under each image stand its file's name, its label and what it was predicted as; all of it can be read."""
    long, last = "a_name_that_is_as_long_as_names_may_be_" * 2, number - 1
    logits, labels = torch.zeros(number, 4), torch.full((number,), 2)
    guesses = torch.where(torch.arange(number) == last, 1, 3)
    logits[range(number), guesses], labels[last] = 3.0 + torch.arange(number) / 100, 0
    images = prepare(small_recipe())[2][1]
    images.images = Sheet([Path(f"/photos/bees/IMG_{'' if i == last else long}{i}.jpg") for i in range(number)])
    images.classes = ("bees", "ants", long, f"another_{long}")
    figure = figure_of(monkeypatch, lambda: plots.plot_mistakes(tmp_path, logits, labels, images))
    assert_readable(figure)
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.get_xlabel()]
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if overlap(box, other)]
    prob = f"{100 * logits[-1].softmax(0)[1]:.0f} %"
    assert figure.axes[0].get_xlabel() == f"IMG_{number - 1}.jpg\nlabelled bees,\npredicted ants ({prob})"
    shown = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(shown) == min(24, number)
    worst = f"the {len(shown)} worst of {number} mistakes" if number > len(shown) else f"{number} mistake{'s' * (number > 1)}"
    assert figure.get_suptitle().splitlines()[-1] == f"{worst} in {number} images"


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
    assert plots.plot_mistakes(tmp_path, logits, labels, images) == tmp_path / "mistakes.png"
    assert [title.splitlines()[1] for title in titles] == [f"labelled patch {labels[i]}," for i in (5, 2)]
    prob = 100 * logits[5].softmax(0).max()
    assert titles[0].splitlines()[::2] == ["image 5", f"predicted patch {(labels[5] + 1) % 10} ({prob:.0f} %)"]
    np.testing.assert_array_equal(shown[0], np.asarray(images.images[5][0]))
    assert plots.plot_mistakes(tmp_path, torch.nn.functional.one_hot(labels.clamp(min=0), 10) * 4.0, labels, images) is None
