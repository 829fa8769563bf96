"""What a run says at its end, and writes into result.json."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

from finetune.__main__ import main as verb
from finetune.data import builtin, sources
from finetune.metrics.intervals import wilson
from finetune.recipe import SGD, Group, Step
from finetune.recipe.load import load_recipe
from finetune.recipe.serialize import to_dict
from finetune.results.baseline import prediction_interval
from finetune.results.summary import copy_params, describe_gain, describe_result, drift
from finetune.run import main
from helpers import on_folder, prepare, run_here, small_recipe

DIGITS = "efficientnet_lite0_digits"
RESULT = {
    "top1": 0.9944,
    "macro_f1": 0.9943,
    "loss": 0.0432,
    "val_images": 360,
    "epochs": 8,
    "seconds": 91.7,
    "images_per_second": 123.4,
    "peak_memory_gib": 1.23,
    "linear_probe_top1": 0.9611,
    "use": "model",
    "use_reason": "the last epoch, and none was better",
    "drift": {"head": 0.5, "stem": 0.0},
    "intervals": {"top1": [*wilson(0.9944, 360)], "macro_f1": [0.9812, 0.9998]},
    "calibration": {"temperature": 1.3, "log_loss": [0.05, 0.04], "ece": [0.0412, 0.0123]},
}


def last_lines(folder=Path("runs/mine"), result=RESULT, verbose=False, **changes):
    """The summary of a run of the digits' recipe, by its label; its commands are under ""."""
    recipe, file = load_recipe(DIGITS)
    recipe = dataclasses.replace(recipe, epochs=max(recipe.epochs, result["epochs"]), **changes)
    text = describe_result(recipe, file, result, folder, verbose)
    found, label = {"": []}, ""
    for line in text.splitlines():
        assert len(line) <= 80 and line == line.rstrip()
        if line.startswith("finetune "):
            found[""].append(line)
        elif line:
            label = line[:10].strip() or label
            found[label] = f"{found.get(label, '')} {line[10:].strip()}".strip()
    return found


ROWS = (
    Group("head", "fc", lr=1e-2, schedule=Step(every=1, factor=0.5)),
    Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
    Group("norm", "norm", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9)),
    Group("stem", ".", lr=0),
)


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


def test_the_baseline_is_read_in_words(here):
    """Inside the 95 % prediction interval of one run, whose ends are named, is as expected; outside it is lower or higher."""
    recipe, values = small_recipe(), [0.90, 0.92, 0.91]
    runs = [{"seed": seed, "top1": value, "val_images": 360} for seed, value in enumerate(values)]
    (here / "baselines").mkdir()
    (here / "baselines" / "mine.json").write_text(json.dumps({"recipe": to_dict(recipe), "runs": runs}))
    low, high = prediction_interval({"recipe": {}, "runs": runs}, 1)
    for value, words in (
        (low - 1e-9, "lower than expected"),
        (low, "as expected"),
        (0.91, "as expected"),
        (high, "as expected"),
        (high + 1e-9, "higher than expected"),
    ):
        text = describe_result(dataclasses.replace(recipe, seed=7), here / "mine.py", RESULT | {"top1": value}, here)
        allowed = f"{100 * low:.1f} to {100 * high:.1f} % is what chance allows"
        assert f"baseline  {words}: {allowed} (91.0 % in 3 seeds)" in re.sub(r"\n {10}", " ", text)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"epochs": 99}, "not measured with your epochs"),
        ({"epochs": 99, "seed": 7, "lr_scale": 2.0}, "not measured with your lr_scale and epochs"),
        (
            {"label_smoothing": 0.3, "epochs": 99, "flip_test": True},
            "not measured with your epochs, label_smoothing and flip_test",
        ),
    ],
)
def test_what_is_not_measured_is_said_without_a_reproach(here, changes, words):
    """A few words name the fields that are the person's own; a recipe without a record is not measured; nor is a smoke run."""
    recipe, file = load_recipe(DIGITS)
    text = describe_result(dataclasses.replace(recipe, **changes), file, RESULT, here)
    assert f"baseline  {words}\n" in text
    assert "baseline  not measured\n" in describe_result(small_recipe(), None, RESULT, here)
    assert "baseline  none: a smoke run\n" in describe_result(recipe, file, RESULT | {"smoke": True}, here)


WANTED = (
    "top-1 99.44 % (95 % interval 98.0 to 99.8) of 360 images macro F1 99.43 %, loss 0.0432 "
    "probabilities off by 4.1 % on average, by 1.2 % at the model's temperature, 1.30"
)


def test_a_share_comes_with_its_interval():
    """The recipe's metric has its 95 % interval, of top-1 Wilson's, as scipy has it, and the number of images."""
    assert last_lines()["result"] == WANTED
    interval = binomtest(358, 360).proportion_ci(0.95, "wilson")
    assert wilson(358 / 360, 360) == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert wilson(1.0, 360)[1] == pytest.approx(1) and wilson(0.0, 5)[0] == pytest.approx(0)
    assert last_lines(metric="macro_f1", result=RESULT | {"linear_probe_macro_f1": 0.9})["result"].startswith(
        "macro F1 99.43 % (95 % interval 98.1 to 100.0) of 360 images top-1 99.44 %, loss"
    )


def test_the_linear_probe_is_what_fine_tuning_is_measured_by():
    """What it added, whether that may be chance, that it added nothing, or that it did not pay; nothing without a probe."""
    for before, after, words in (
        (0.80, 0.95, "linear probe 80.00 %; fine-tuning added 15.00 points"),
        (0.94, 0.95, "linear probe 94.00 %; fine-tuning added 1.00 points, which may be chance"),
        (0.95, 0.95, "linear probe 95.00 %; fine-tuning added nothing"),
        (0.80, 0.50, "linear probe 80.00 %; fine-tuning did not pay; lower learning rates may: --lr-scale 0.3"),
    ):
        assert describe_gain("top1", {"linear_probe_top1": before, "top1": after, "val_images": 400}) == words
    worse = {"linear_probe_top1": 0.8, "top1": 0.5, "val_images": 400}
    assert describe_gain("top1", worse, 0.3).endswith("--lr-scale 0.09")  # lower than the run's
    assert describe_gain("top1", {"top1": 0.9, "val_images": 400}) == ""


def test_three_commands_lead_on(here):
    """The last three lines are commands with the run's path, quoted where it must be, in a format that the network has."""
    assert last_lines(Path("my run"))[""] == [
        "finetune predict 'my run' PHOTO",
        "finetune evaluate 'my run' --data DIR",
        "finetune export 'my run' --to timm",
    ]
    text = describe_result(small_recipe(), None, RESULT, here)  # a function's network
    assert text.splitlines()[-1] == f"finetune export {here} --to torch"
    assert last_lines()["use"] == "model: the last epoch, and none was better"


def test_more_is_said_when_asked(here):
    """How far each group moved, and the files: with --verbose alone. An early stop is always said."""
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/curves.png").touch()
    less, more = last_lines(), last_lines(verbose=True)
    assert {"moved", "files"}.isdisjoint(less) and less.items() <= more.items()
    assert more["moved"] == "head 50.00 %, stem 0.00 %" and more["files"] == "in runs/mine: curves.png"
    assert last_lines(result=RESULT | {"epochs": 3})["cost"].endswith("; stopped early, after 3 of 8 epochs")


def test_a_run_ends_with_words_that_fit_and_commands_that_work(here, image_folder, capsys):
    """--quiet leaves the last lines, 80 columns wide; what they say is in result.json, and their commands run as they stand."""
    typed = ["train", *on_folder(image_folder, "out", "backbone=test_resnet")[1:], "--quiet", "--processes", "1"]
    assert verb(typed) == 0
    out, err = capsys.readouterr()
    labels = [line[:10].strip() for line in out.splitlines() if line[:1].strip() and not line.startswith("finetune ")]
    assert labels == ["result", "cost", "baseline", "probe", "use", "report"] and not err
    assert max(map(len, out.splitlines())) <= 80
    result = json.loads((here / "out" / "result.json").read_text())
    assert f"use       {result['use']}: {result['use_reason'].split()[0]}" in out
    commands = [line for line in out.splitlines() if line.startswith("finetune ")]
    assert out.strip().splitlines()[-3:] == commands
    photo = next(image_folder.rglob("*.png"))
    for line in commands:
        words = line.replace("PHOTO", str(photo)).replace("DIR", str(image_folder)).split()
        assert verb(words[1:]) == 0, line
    assert re.search(r"using model", capsys.readouterr().err)


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
        assert f"{name}: top-1 {100 * found['top1']:.2f} % of {count} images" in out


def test_the_solar_cells_have_their_subgroups():
    """ELPV's validation cells are mono- or polycrystalline, as its list says, a quarter of each."""
    pytest.importorskip("elpv_dataset")
    data = builtin.elpv()
    kept, every = data.val.subgroups, data.val.subgroups + data.train.subgroups
    shares = {name: kept.count(name) / every.count(name) for name in ("mono", "poly")}
    assert set(kept) == {"mono", "poly"} and all(abs(share - 0.25) < 0.002 for share in shares.values())
    listed = (data.val.items[0].parent.parent / "labels.csv").read_text().splitlines()
    cell_type = {line.split()[0]: line.split()[2] for line in listed}
    assert all(cell_type[f"images/{item.name}"] == name for item, name in zip(data.val.items, kept, strict=True))
