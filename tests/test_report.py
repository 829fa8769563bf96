"""What is shown before, during and after a run: plan, pictures, drift, trackers."""

import json
import struct
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from sklearn.metrics import confusion_matrix as theirs
from test_interruptions import Cut, cut_before

from conftest import ROOT, SmallNet, prepare, run_here, small_recipe
from finetune import image_data, plots, run_record
from finetune.__main__ import main as verb
from finetune.batches import UNREADABLE
from finetune.lr_schedule import Step
from finetune.plan import group_tables, planned_rates
from finetune.recipe import SGD, Frozen, Group, Switch
from finetune.recipe_file import load_recipe
from finetune.report import drift
from finetune.run import main
from finetune.scores import confusion_matrix

ROWS = (
    Group("head", "fc", lr=1e-2, schedule=Step(every=1, factor=0.5)),
    Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
    Group("norm", "norm", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9)),
    Frozen("stem", "."),
)


def drawn(monkeypatch, draw):
    """The lines of the rate panel of the picture that `draw` makes: {group: (epochs, rates)}, and the marked epochs."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(plots, "tidy", lambda figure, axes, file: found.append((figure, axes[-1])))
        draw()
    figure, axes = found[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    marks = sorted(line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_"))
    texts = [text.get_text() for text in axes.texts]
    plt.close(figure)
    return lines, marks, texts


@pytest.mark.parametrize("changes", [{}, {"switch": Switch(at=2, optimizer=SGD(), lr_factor=10.0)}, {"groups": ROWS}], ids=str)
def test_the_runs_picture_is_the_plans(tmp_path, monkeypatch, changes):
    """Every group's rate and every stage's mark in the run's picture are those of the plan drawn before it."""
    recipe = small_recipe(**changes)
    before, marks, names = drawn(monkeypatch, lambda: plots.planned(tmp_path / "plan.png", recipe, SmallNet(), 22))
    run_here(recipe, tmp_path)
    after, same_marks, same_names = drawn(monkeypatch, lambda: plots.curves(tmp_path, recipe.score))
    assert before.keys() == after.keys() and marks == same_marks == [1, 2] and names == same_names
    for name, line in before.items():
        np.testing.assert_array_equal(line, after[name])
        assert np.isfinite(line[-1, 1])
    assert ("stem" in before) == ("groups" not in changes)


def test_the_planned_rates_are_the_runs(tmp_path):
    """The plan's rate of every update is the one the run logs."""
    recipe = small_recipe(groups=ROWS)
    rows = [row["lr"] for row in run_here(recipe, tmp_path)[1] if "lr" in row]
    planned = planned_rates(recipe, SmallNet(), range(12), 3)
    assert [{name: rates[i] for name, rates in planned.items()} for i in range(12)] == rows


def test_the_group_table_has_first_peak_and_last_rate():
    """A late group's first and highest rate are those it really gets; a frozen row has none; a switch has its own table."""
    recipe = small_recipe(groups=ROWS, switch=Switch(at=2, optimizer=SGD(momentum=0.5), lr_factor=2.0))
    first, second = (text.splitlines() for text in group_tables(recipe, SmallNet(), 22).split("\n\nfrom epoch 2:\n"))
    cells = {line.split()[0]: line.split() for line in first}
    rates = planned_rates(recipe, SmallNet(), range(12), 3)
    assert cells["body"][3:6] == [f"{rate:.2g}" for rate in (rates["body"][3], max(rates["body"][3:6]), rates["body"][5])]
    assert cells["stem"][-2:] == ["frozen", "never"] and cells["head"][-2:] == ["AdamW", "0"]
    later = {line.split()[0]: line.split() for line in second}
    assert later["body"][4] == f"{max(rates['body'][6:]):.2g}" and later["body"][-2:] == ["SGD", "1"]
    assert later["norm"][-2:] == ["SGD", "2"]


def test_plan_shows_everything_and_trains_nothing(tmp_path, monkeypatch, capsys):
    """Without weights, data or network: groups, rates, updates, stages with memory, layers, and a picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.weights.pretrained_state", lambda *args: pytest.fail("weights were asked for"))
    assert verb(["plan", "resnet18_cifar", "--set", "epochs=5", "--output", "plans"]) == 0
    out = capsys.readouterr().out
    for text in (
        "5 epochs of 196 updates of 256 images",
        "layer4 ",
        "rate at the start of each epoch",
        "stages",
        "activations",
        "layers, for one image",
        "512 x 7 x 7",
        "11,181,642",
    ):
        assert text in out
    with Image.open(tmp_path / "plans" / "resnet18_cifar-plan.png") as picture:
        assert picture.size[0] > 600
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]


def test_a_dry_run_is_the_plan(tmp_path, monkeypatch, capsys):
    """--dry-run prints what the plan prints."""
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "vit_small_cifar100", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert verb(["plan", "vit_small_cifar100"]) == 0
    assert capsys.readouterr().out == dry and not list(tmp_path.iterdir())


def test_find_lr_says_what_to_paste(tmp_path, monkeypatch, capsys):
    """The verb prints two suggestions as overrides of every group's rate, draws the picture, and writes nothing else."""
    monkeypatch.chdir(tmp_path)
    assert (
        verb(
            [
                "find-lr",
                "efficientnet_lite0_digits",
                "--weights",
                "none",
                "--set",
                "data.image_size=32",
                "--set",
                "augment.randaugment=None",
                "--output",
                "out",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["steepest", "valley", "picture"]
    assert all(line.count("--set groups.") == 4 for line in out[:2])
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "efficientnet_lite0_digits-lr.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "resnet81_cifar"],
        ["plan", "resnet18_cifar", "--set", "groups.head.pattern=x"],
        ["find-lr", "resnet18_cifar", "--data", "nowhere"],
    ],
)
def test_a_verb_that_fails_says_one_message(capsys, arguments):
    """Exit code 2 and one message, as with a run."""
    assert verb(arguments) == 2
    assert capsys.readouterr().err.startswith("finetune: ")


def test_drift_is_the_norm_of_the_change(tmp_path):
    """Each group's drift equals numpy's norms; what was frozen has moved by exactly 0."""
    recipe = small_recipe(groups=ROWS)
    start = {name: p.detach().clone() for name, p in prepare(recipe)[0].named_parameters()}
    net, _ = run_here(recipe, tmp_path)
    found = drift(recipe, net, start)
    assert list(found) == ["head", "body", "norm", "stem"] and found["stem"] == 0.0
    before, after = (
        np.concatenate([tensors[f"fc.{kind}"].detach().double().numpy().ravel() for kind in ("weight", "bias")])
        for tensors in (start, dict(net.named_parameters()))
    )
    assert found["head"] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)
    assert found["head"] > 0


def test_the_confusion_matrix_is_scikit_learns():
    """Rows are labels, columns predictions, in scikit-learn's counts."""
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    np.testing.assert_array_equal(confusion_matrix(logits, labels), theirs(labels, logits.argmax(1), labels=range(7)))


def test_the_worst_mistakes_come_first(tmp_path, monkeypatch):
    """The sheet has the wrong images only, by falling loss, with label, guess and chance; unreadable ones are left out."""
    recipe = small_recipe()
    _, _, (_, images) = prepare(recipe)
    labels = torch.tensor([images.images[i][1] for i in range(len(images))])
    logits = torch.nn.functional.one_hot(labels, 10) * 4.0
    for i, strength in ((2, 6.0), (5, 9.0), (7, 7.0)):
        logits[i, (labels[i] + 1) % 10] = strength
    labels[7] = UNREADABLE
    titles, shown = [], []
    monkeypatch.setattr(plt.Axes, "set_title", lambda self, text, **kwargs: titles.append(text))
    monkeypatch.setattr(plt.Axes, "imshow", lambda self, image, **kwargs: shown.append(np.asarray(image)))
    assert plots.mistakes(tmp_path, logits, labels, images) == tmp_path / "mistakes.png"
    assert [title.splitlines()[0] for title in titles] == [f"patch {labels[5]}", f"patch {labels[2]}"]
    assert titles[0].splitlines()[1] == f"as patch {(labels[5] + 1) % 10}, {logits[5].softmax(0).max():.0%}"
    np.testing.assert_array_equal(shown[0], np.asarray(images.images[5][0]))
    assert plots.mistakes(tmp_path, torch.nn.functional.one_hot(labels.clamp(min=0), 10) * 4.0, labels, images) is None


def test_a_quiet_run_says_its_last_words_only(tmp_path, monkeypatch, capsys):
    """--quiet leaves the lines that say what was reached and where it lies."""
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "resnet18_cifar", "--smoke", "--quiet", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    words = ["reached", "promised", "head", "moved", "best", "model", "all"]
    assert [line.split()[0] for line in out.split("\n") if line] == words
    assert err == ""


def test_tensorboard_reads_back_what_was_logged(tmp_path, monkeypatch, image_folder):
    """TensorBoard's own reader finds each update's loss and rates and each epoch's scores once, though the run was cut."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    arguments = [
        "--recipe",
        "resnet18_cifar",
        "--data",
        str(image_folder),
        "--weights",
        "none",
        "--track",
        "tensorboard",
        "--output",
        "out",
        *(
            word
            for field in ("data.image_size=32", "data.batch_size=8", "mixed_precision=no", "epochs=4")
            for word in ("--set", field)
        ),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(run_record, "FLUSH_EVERY", 1)
        cut_before(patched, "set_rates", 11)  # two updates after the checkpoint of epoch 1
        with pytest.raises(Cut):
            main(arguments)
    assert main([*arguments, "--resume"]) == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(Path("out/finetune"))).Reload()
    updates, epochs = [row for row in rows if "grad_norm" in row], [row for row in rows if "val_images" in row]
    for tag, key, kind, last in (
        ("train/loss", "loss", updates, 0),
        ("train/grad_norm", "grad_norm", updates, 0),
        ("val/top1", "top1", epochs, 1),
    ):
        expected = [(max(0, row["step"] - last), pytest.approx(row[key], rel=1e-6)) for row in kind]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    assert [e.value for e in events.Scalars("lr/stem")] == pytest.approx([row["lr"]["stem"] for row in updates])


def test_wandb_is_told_offline(tmp_path, monkeypatch):
    """Weights & Biases, offline, writes a file whose records, by its own protocol, have the recipe and every update's loss."""
    from wandb.proto import wandb_internal_pb2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["--recipe", "resnet18_cifar", "--smoke", "--track", "wandb", "--output", "out"]) == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    (file,) = Path("out").rglob("*.wandb")
    losses, config = [], {}
    for data in log_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        losses += [
            float(item.value_json)
            for item in record.history.item
            if "/".join(item.nested_key) == "train/loss" or item.key == "train/loss"
        ]
        config |= {item.key: item.value_json for update in (record.run.config, record.config) for item in update.update}
    assert losses == pytest.approx([row["loss"] for row in rows if "grad_norm" in row])
    assert config["optimizer.name"] == '"AdamW"'


def log_records(file):
    """The records of a file in LevelDB's log format: blocks of 32 KiB, chunks headed by checksum, length and kind."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_a_tracker_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    """An unknown tracker, or one whose package is missing, ends in one message before training."""
    monkeypatch.chdir(tmp_path)
    for name, fault in (("tensorbord", "Unsupported logging capability: tensorbord"), ("comet_ml", "pip install comet_ml")):
        assert main(["--recipe", "resnet18_cifar", "--smoke", "--track", name, "--output", "out"]) == 2
        assert fault in capsys.readouterr().err


def test_every_recipe_has_a_plan():
    """Each shipped recipe's table and rates can be had for any number of images."""
    from finetune.backbone import outline

    for file in sorted((ROOT / "recipes").glob("*.py")):
        recipe, _ = load_recipe(str(file))
        text = group_tables(recipe, outline(recipe), 1000)
        assert text.splitlines()[-1].startswith("all")


def test_each_kind_of_image_has_its_scores(tmp_path, monkeypatch, capsys):
    """Where images have kinds, the result has the scores of each, which are scikit-learn's on that kind's predictions."""
    data = image_data.generated()
    data.val.kinds = ["mono", "poly", "poly", "mono", "poly"] * 2
    monkeypatch.setitem(image_data.NAMED, "generated", lambda: data)
    assert main(["--recipe", "efficientnet_lite0_digits", "--smoke", "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    kept = safetensors.torch.load_file(tmp_path / "run" / "predictions.safetensors")
    out = capsys.readouterr().out
    for kind, count in (("mono", 4), ("poly", 6)):
        of_it = torch.tensor([one == kind for one in data.val.kinds])
        labels, guesses = kept["labels"][of_it], kept["logits"][of_it].argmax(1)
        found = result["by_kind"][kind]
        assert found["val_images"] == count and found["top1"] == accuracy_score(labels, guesses)
        assert found["macro_f1"] == pytest.approx(f1_score(labels, guesses, average="macro", labels=range(10), zero_division=0))
        assert f"{kind}: top-1 {found['top1']:.2%} of {count} images" in out


def test_the_solar_cells_have_their_kinds():
    """ELPV's validation cells are mono- or polycrystalline, as its list says, a quarter of each."""
    data = image_data.elpv()
    shares = {kind: data.val.kinds.count(kind) / (data.val.kinds + data.train.kinds).count(kind) for kind in ("mono", "poly")}
    assert set(data.val.kinds) == {"mono", "poly"} and all(abs(share - 0.25) < 0.002 for share in shares.values())
    listed = (data.val.items[0].parent.parent / "labels.csv").read_text().splitlines()
    kind_of = {line.split()[0]: line.split()[2] for line in listed}
    assert all(kind_of[f"images/{item.name}"] == kind for item, kind in zip(data.val.items, data.val.kinds, strict=True))
