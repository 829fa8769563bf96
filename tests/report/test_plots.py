"""The pictures of a plan and of a run: what they show, and that it can be read."""

import io
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix as theirs

from figures import assert_readable, figure_of
from finetune.metrics.counts import confusion_matrix, count_pairs
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, Data, Group, Step, Switch
from finetune.recipe.serialize import to_dict
from finetune.report import confusion, curves, drawing
from finetune.results.runs import Run
from helpers import ROOT, SmallNet, run_here, small_recipe

ROWS = (
    Group("head", "fc", lr=1e-2, schedule=Step(every=1, factor=0.5)),
    Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
    Group("norm", "norm", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9)),
    Group("stem", ".", lr=0),
)


def drawn(monkeypatch, draw):
    """The lines of the learning-rate panel of the picture that `draw` makes, {group: (epochs, lrs)}, and the marked epochs."""
    axes = figure_of(monkeypatch, curves, draw).axes[-1]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    marks = sorted(line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_"))
    return lines, marks


@pytest.mark.parametrize("changes", [{}, {"switch": Switch(at=2, optimizer=SGD(), lr_factor=10.0)}, {"groups": ROWS}], ids=str)
def test_the_runs_picture_is_the_plans(tmp_path, monkeypatch, changes):
    """Every group's learning rate and first epoch, and every stage's mark, are in the run's picture as in the plan's before."""
    recipe = small_recipe(**changes)
    groups = build_param_groups(recipe, SmallNet())
    before, marks = drawn(monkeypatch, lambda: curves.plot_plan(tmp_path / "mine-plan.png", groups, 3, recipe.epochs))
    run_here(recipe, tmp_path)
    after, same_marks = drawn(monkeypatch, lambda: curves.plot_curves(tmp_path, recipe.metric))
    assert before.keys() == after.keys() and marks == same_marks == [1, 2]
    for name, line in before.items():
        np.testing.assert_array_equal(line, after[name])
        assert np.isfinite(line[-1, 1])
    third = "norm, from epoch 3" if "groups" in changes else "stem, from epoch 3"
    assert list(before) == ["head", "body, from epoch 2", third]  # epochs count from 1


def test_titles_say_what_it_is(tmp_path, monkeypatch):
    """A run's pictures have its recipe, its images and its result in their titles, the plan's its name."""
    pytest.importorskip("matplotlib", minversion="3.8", reason="get_suptitle")
    run = write_run(tmp_path)
    title = figure_of(monkeypatch, curves, lambda: curves.plot_curves(run, "top1")).get_suptitle()
    assert title == "resnet18_cifar on photos\ntop-1 70.00 % after epoch 4"
    same = run.rename(tmp_path / "photos-20260101-000000")
    (same / "run.json").write_text('{"name": "photos"}')
    assert drawing.run_title(same) == "photos"  # of a recipe that was suggested for its images
    run = same.rename(run)
    (run / "run.json").write_text('{"name": "resnet18_cifar"}')
    logits, labels = predictions_of(3)
    draw = lambda: confusion.plot_confusion_matrix(run, logits, labels, "abc", drawing.run_title(run))  # noqa: E731
    right = int((logits.argmax(1) == labels).sum())
    assert figure_of(monkeypatch, confusion, draw).get_suptitle() == (
        f"resnet18_cifar on photos\n{right} of 30 images predicted as they are labelled"
    )
    groups = build_param_groups(small_recipe(), SmallNet())
    draw = lambda: curves.plot_plan(tmp_path / "mine-plan.png", groups, 3, 4)  # noqa: E731
    assert figure_of(monkeypatch, curves, draw).get_suptitle() == "mine: learning rates as planned"


def test_epochs_count_from_1(tmp_path, monkeypatch):
    """What came after the first epoch stands at 1, the linear probe at 0; the best and the last are named with their epochs."""
    run = write_run(tmp_path)
    validation = figure_of(monkeypatch, curves, lambda: curves.plot_curves(run, "top1")).axes[1]
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


@pytest.mark.parametrize("classes", [2, 10, 20, 21, 100, 1000])
def test_a_confusion_matrix_of_any_size_can_be_read(tmp_path, monkeypatch, classes):
    """Up to 20 classes have names and numbers; of more, the largest confusions are listed by name, and nothing is crowded."""
    logits, labels = predictions_of(classes)
    names = [f"class {i}" if i % 3 else f"a long name with a $ of number {i}" for i in range(classes)]
    counts = theirs(labels, logits.argmax(1), labels=range(classes))
    figure = figure_of(monkeypatch, confusion, lambda: confusion.plot_confusion_matrix(tmp_path, logits, labels, names, "mine"))
    assert_readable(figure)
    axes, *below = figure.axes
    cells = {text.get_position()[::-1]: int(text.get_text()) for text in axes.texts}
    if classes <= 20:
        assert [text.get_text() for text in axes.get_yticklabels()] == [drawing.shorten(name, 24) for name in names]
        assert not below and cells == {(i, j): counts[i, j] for i, j in zip(*counts.nonzero(), strict=True)}
        return
    assert not cells
    listed = below[0].texts[0].get_text().splitlines()[3:]
    wrong = counts - np.diag(counts.diagonal())
    assert f"{drawing.shorten(names[0], 32)} (0)" in listed[0] and "class 1 (1)" in listed[0]
    assert f"{wrong[0, 1]} of 10, {wrong[0, 1] / 10:.0%}" in listed[0]
    assert [int(line.split(" of 10")[0].split()[-1]) for line in listed] == sorted(wrong.flatten(), reverse=True)[: len(listed)]


def test_a_confusion_matrix_without_confusions_says_so(tmp_path, monkeypatch):
    """Of many classes, all predicted rightly, there is no list."""
    logits, names = torch.eye(30), [str(i) for i in range(30)]
    figure = figure_of(
        monkeypatch,
        confusion,
        lambda: confusion.plot_confusion_matrix(tmp_path, logits, torch.arange(30), names),
    )
    assert figure.axes[1].texts[0].get_text() == "no image was predicted as another class"


@pytest.mark.parametrize("groups,epochs", [(2, 1), (4, 8), (16, 30)])
def test_curves_can_be_read(tmp_path, groups, epochs):
    """Legends stand above their diagrams, nothing is written over a line, and no text is cut or overlaps another."""
    figure = curves.draw_curves(write_run(tmp_path, [f"blocks.{i}" for i in range(groups)], epochs), "top1")
    assert_readable(figure)
    assert not [text for axes in figure.axes for text in axes.texts]


def test_the_confusion_matrix_is_scikit_learns():
    """Rows are labels, columns predictions, in scikit-learn's counts."""
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    np.testing.assert_array_equal(confusion_matrix(logits, labels), theirs(labels, logits.argmax(1), labels=range(7)))


GROWTH = """
import sys
import torch
from finetune.inference.evaluate import class_metrics
from finetune.report.confusion import plot_confusion_matrix
from finetune.metrics.compute import single_label_metrics
from finetune.utils.device import peak_memory

def run(classes):
    logits, labels = torch.eye(classes)[:30].roll(1, 0), torch.arange(30)
    names = list(map(str, range(classes)))
    assert single_label_metrics(logits, labels)["top1"] == 0
    assert [row["recall"] for row in class_metrics(logits, labels, names)] == [0] * classes
    plot_confusion_matrix(__import__("pathlib").Path(sys.argv[1]), logits, labels, names)

run(30)
before = peak_memory(torch.device("cpu"))
run(8000)
print(int(1024 * (peak_memory(torch.device("cpu")) - before)))
"""


def test_many_classes_take_no_square_of_memory(tmp_path):
    """Metrics and picture of 8,000 classes, whose matrix alone would have 488 MiB, take less than that beside the logits."""
    done = subprocess.run([sys.executable, "-c", GROWTH, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    logits = 8000 * 8000 * 4 // 2**20  # torch.eye
    assert int(done.stdout) < logits + 100
    assert (tmp_path / "confusion.png").stat().st_size > 10_000


def test_the_pairs_are_the_matrix():
    """Labels and predictions that come together, counted, are scikit-learn's matrix where it is not 0."""
    logits, labels = predictions_of(7)
    rows, columns, counts = count_pairs(logits, labels)
    matrix = np.zeros((7, 7), int)
    matrix[rows, columns] = counts
    assert (matrix == theirs(labels, logits.argmax(1))).all() and (counts > 0).all()
