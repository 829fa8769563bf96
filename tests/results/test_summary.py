"""What is shown of a run."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib.axes import Axes
from sklearn.metrics import accuracy_score, f1_score
from sklearn.metrics import confusion_matrix as theirs

from finetune.data import builtin, sources
from finetune.data.loader import UNREADABLE
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, Group, Step, Switch
from finetune.results import plots
from finetune.results.summary import copy_params, drift
from finetune.run import main
from finetune.training.evaluate import confusion_matrix
from helpers import SmallNet, prepare, run_here, small_recipe

ROWS = (
    Group("head", "fc", lr=1e-2, schedule=Step(every=1, factor=0.5)),
    Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
    Group("norm", "norm", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9)),
    Group("stem", ".", lr=0),
)


def drawn(monkeypatch, draw):
    """The lines of the learning-rate panel of the picture that `draw` makes, {group: (epochs, lrs)}, and the marked epochs."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(plots, "save_figure", lambda figure, axes, file: found.append((figure, axes[-1])))
        draw()
    _, axes = found[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    marks = sorted(line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_"))
    texts = [text.get_text() for text in axes.texts]
    return lines, marks, texts


@pytest.mark.parametrize("changes", [{}, {"switch": Switch(at=2, optimizer=SGD(), lr_factor=10.0)}, {"groups": ROWS}], ids=str)
def test_the_runs_picture_is_the_plans(tmp_path, monkeypatch, changes):
    """Every group's learning rate and every stage's mark in the run's picture are those of the plan drawn before it."""
    recipe = small_recipe(**changes)
    groups = build_param_groups(recipe, SmallNet())
    before, marks, names = drawn(monkeypatch, lambda: plots.plot_plan(tmp_path / "plan.png", groups, 3, recipe.epochs))
    run_here(recipe, tmp_path)
    after, same_marks, same_names = drawn(monkeypatch, lambda: plots.plot_curves(tmp_path, recipe.metric))
    assert before.keys() == after.keys() and marks == same_marks == [1, 2] and names == same_names
    for name, line in before.items():
        np.testing.assert_array_equal(line, after[name])
        assert np.isfinite(line[-1, 1])
    assert ("stem" in before) == ("groups" not in changes)


def test_drift_is_the_norm_of_the_change(tmp_path):
    """Each group's drift equals numpy's norms; what was frozen has moved by exactly 0."""
    recipe = small_recipe(groups=ROWS)
    start = copy_params(prepare(recipe)[1])
    net, _ = run_here(recipe, tmp_path)
    found = drift(net, start)
    assert list(found) == ["head", "body", "norm", "stem"] and found["stem"] == 0.0
    before, after = (
        np.concatenate([tensors[f"fc.{kind}"].detach().double().numpy().ravel() for kind in ("weight", "bias")])
        for tensors in (start["head"], dict(net.named_parameters()))
    )
    assert found["head"] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)
    assert found["head"] > 0


def test_the_confusion_matrix_is_scikit_learns():
    """Rows are labels, columns predictions, in scikit-learn's counts."""
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    np.testing.assert_array_equal(confusion_matrix(logits, labels), theirs(labels, logits.argmax(1), labels=range(7)))


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
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **kwargs: titles.append(text))
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **kwargs: shown.append(np.asarray(image)))
    assert plots.plot_mistakes(tmp_path, logits, labels, images) == tmp_path / "mistakes.png"
    assert [title.splitlines()[0] for title in titles] == [f"patch {labels[5]}", f"patch {labels[2]}"]
    assert titles[0].splitlines()[1] == f"as patch {(labels[5] + 1) % 10}, {logits[5].softmax(0).max():.0%}"
    np.testing.assert_array_equal(shown[0], np.asarray(images.images[5][0]))
    assert plots.plot_mistakes(tmp_path, torch.nn.functional.one_hot(labels.clamp(min=0), 10) * 4.0, labels, images) is None


def test_a_quiet_run_says_its_last_words_only(here, capsys):
    """--quiet leaves the lines that say what was reached and where it lies."""
    assert main(["--recipe", "resnet18_cifar", "--smoke", "--quiet", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    words = ["result", "baseline", "probe", "moved", "best", "model", "all"]
    assert [line.split()[0] for line in out.split("\n") if line] == words
    assert err == ""


def test_each_subgroup_of_images_has_its_metrics(tmp_path, monkeypatch, capsys):
    """Where images have subgroups, the result has the metrics of each, which are scikit-learn's on its predictions."""
    data = builtin.generated()
    data.val.subgroups = ["mono", "poly", "poly", "mono", "poly"] * 2
    monkeypatch.setitem(sources.NAMED, "generated", lambda: data)
    assert main(["--recipe", "efficientnet_lite0_digits", "--smoke", "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    kept = safetensors.torch.load_file(tmp_path / "run" / "predictions.safetensors")
    out = capsys.readouterr().out
    for name, count in (("mono", 4), ("poly", 6)):
        of_it = torch.tensor([one == name for one in data.val.subgroups])
        labels, guesses = kept["labels"][of_it], kept["logits"][of_it].argmax(1)
        found = result["by_subgroup"][name]
        assert found["val_images"] == count and found["top1"] == accuracy_score(labels, guesses)
        assert found["macro_f1"] == pytest.approx(f1_score(labels, guesses, average="macro", labels=range(10), zero_division=0))
        assert f"{name}: top-1 {found['top1']:.2%} of {count} images" in out


def test_the_solar_cells_have_their_subgroups():
    """ELPV's validation cells are mono- or polycrystalline, as its list says, a quarter of each."""
    data = builtin.elpv()
    kept, every = data.val.subgroups, data.val.subgroups + data.train.subgroups
    shares = {name: kept.count(name) / every.count(name) for name in ("mono", "poly")}
    assert set(kept) == {"mono", "poly"} and all(abs(share - 0.25) < 0.002 for share in shares.values())
    listed = (data.val.items[0].parent.parent / "labels.csv").read_text().splitlines()
    cell_type = {line.split()[0]: line.split()[2] for line in listed}
    assert all(cell_type[f"images/{item.name}"] == name for item, name in zip(data.val.items, kept, strict=True))
