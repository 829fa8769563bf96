"""What the command refuses, and what it leaves alone."""

import json
import shutil
import subprocess

import pytest
import torch

from finetune.run import main


@pytest.mark.parametrize(
    "arguments,fault",
    [
        (["--recipe", "resnet81_cifar"], "no recipe 'resnet81_cifar'. Did you mean resnet18_cifar?"),
        (["--recipe", "mine.py"], "no recipe file mine.py"),
        (["--recipe", "resnet18_cifar", "--set", "epoch=3"], "no 'epoch'. Did you mean epochs?"),
        (["--recipe", "resnet18_cifar", "--set", "groups.head.lr=0"], "group 'head': lr must be a finite number above 0"),
        (
            ["--recipe", "resnet18_cifar", "--set", "data.batch_size=10", "--accumulate", "4"],
            "can't be divided by 1 processes x 4",
        ),
        (["--recipe", "resnet18_cifar", "--data", "nowhere"], "no data set or folder 'nowhere'"),
        (["--recipe", "resnet18_cifar", "--weights", "none", "--set", "mixed_precision=fp16"], "needs a GPU"),
        (["--recipe", "efficientnet_lite0_digits", "--weights", "nowhere.pth"], "no weights file nowhere.pth"),
        (["--recipe", "efficientnet_lite0_digits", "--set", "augment.randaugment=rand-x9"], "can't read randaugment='rand-x9'"),
        (["--recipe", "resnet18_cifar", "--output", "used"], "output folder used already holds files"),
        (["--recipe", "resnet18_cifar", "--resume"], "no run to resume in runs/"),
        (["--recipe", "resnet18_cifar", "--resume", "used"], "no run to resume in used"),
    ],
)
def test_what_is_wrong_ends_in_one_message(here, capsys, arguments, fault):
    """Exit code 2, one message, no traceback, and nothing written."""
    (here / "used").mkdir()
    (here / "used" / "notes.txt").write_text("mine")
    if torch.accelerator.is_available() and "fp16" in arguments[-1]:
        pytest.skip("fp16 works here")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("finetune: ") and fault in err and "Traceback" not in err
    assert sorted(path.name for path in here.rglob("*")) == ["notes.txt", "used"]


@pytest.mark.parametrize(
    "variable,value,fault",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision belongs to the recipe"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "asked for with --accumulate"),
    ],
)
def test_the_launcher_may_not_change_the_recipe(here, capsys, monkeypatch, variable, value, fault):
    """What Accelerate's flags would change, or would seem to, is refused."""
    monkeypatch.setenv(variable, value)
    assert main(["--recipe", "efficientnet_lite0_digits"]) == 2
    assert fault in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_or_resumed(finished, capsys):
    """A folder that holds a run is refused; a finished one can't be resumed."""
    folder, _, _ = finished
    before = (folder / "result.json").stat().st_mtime_ns
    assert main(["--recipe", "resnet18_cifar", "--output", str(folder)]) == 2
    assert f"output folder {folder} already holds a run" in capsys.readouterr().err
    assert main(["--recipe", "resnet18_cifar", "--resume", str(folder)]) == 2
    assert "is finished: nothing to resume" in capsys.readouterr().err
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_resume_goes_on_and_refuses_another_recipe(finished, image_folder, tmp_path, capsys):
    """A run cut short before its end goes on to the same result; with another recipe it names what differs."""
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    (folder / "result.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99}\n')  # a line written after the checkpoint
    arguments = [
        "--recipe",
        "resnet18_cifar",
        "--data",
        str(image_folder),
        "--weights",
        "none",
        "--set",
        "data.image_size=32",
        "--set",
        "data.batch_size=8",
        "--set",
        "mixed_precision=no",
        "--seed",
        "3",
        "--resume",
        str(folder),
    ]
    assert main([*arguments, "--set", "epochs=5"]) == 2
    assert "was started with another recipe:\n  epochs: 4 before, 5 now" in capsys.readouterr().err
    assert main([*arguments, "--set", "epochs=4"]) == 0
    assert "going on after update 16, 4 epochs done" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
    results = [json.loads((path / "result.json").read_text())["top1"] for path in (folder, finished[0])]
    assert results[0] == results[1]


def test_dry_run_needs_neither_data_nor_weights(here, capsys):
    """--dry-run shows the table and the rates of a recipe whose data and weights are elsewhere, and writes nothing."""
    assert main(["--recipe", "resnet50_cifar100", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "50000 images of 100 classes at 224 px; 20 epochs of 391 updates of 128 images" in out
    assert "layer4       30  14,964,736" in out
    rates = next(line for line in out.splitlines() if line.startswith("stem ") and "e-03" in line and "-  " in line).split()
    assert rates[1:4] == ["-", "-", "-"] and rates[4] == "3.0e-03"
    assert not list(here.iterdir())


def test_an_unknown_recipe_fails_before_torch_is_loaded(command):
    """A misspelt name is answered by the script itself with exit code 2, without importing torch."""
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:], "--recipe", "resnet81_cifar"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "finetune: no recipe" in done.stderr and "torch" not in done.stderr
