"""What the command refuses, and what it leaves alone."""

import filecmp
import importlib
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.recipe.serialize import from_dict, to_dict
from finetune.run import main
from finetune.training import logger
from finetune.training.run_dir import check_same_recipe, lock, new_run_dir, start_run_dir, unfinished_run_dir
from finetune.utils.errors import RecipeError
from helpers import ROOT, Cut, SmallNet, cut_before, on_folder, small_recipe


@pytest.mark.parametrize(
    "arguments,fault",
    [
        (["--recipe", "resnet81_cifar"], "no recipe 'resnet81_cifar'. Did you mean resnet18_cifar?"),
        (["--recipe", "mine.py"], "no recipe file mine.py"),
        (["--recipe", "resnet18_cifar", "--set", "epoch=3"], "no 'epoch'. Did you mean epochs?"),
        (["--recipe", "resnet18_cifar", "--set", "groups.head.lr=-1"], "groups.head.lr must be 0 or more, not -1"),
        (
            ["--recipe", "resnet18_cifar", "--set", "data.batch_size=10", "--accumulate", "4"],
            "can't be divided by 1 processes x 4",
        ),
        (["--recipe", "resnet18_cifar", "--data", "nowhere"], "no data set or folder 'nowhere'"),
        (["--recipe", "resnet18_cifar", "--weights", "none", "--set", "mixed_precision=fp16"], "needs a GPU"),
        (["--recipe", "efficientnet_lite0_digits", "--weights", "nowhere.pth"], "no weights file nowhere.pth"),
        (["--recipe", "efficientnet_lite0_digits", "--set", "augment.auto_augment=rand-x9"], "read auto_augment='rand-x9'"),
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


def test_a_finished_run_is_not_overwritten_or_resumed(finished, capsys):
    """A folder that holds a run is refused; a finished one can't be resumed."""
    folder, _, _ = finished
    before = (folder / "result.json").stat().st_mtime_ns
    assert main(["--recipe", "resnet18_cifar", "--output", str(folder)]) == 2
    assert f"output folder {folder} already holds a run" in capsys.readouterr().err
    assert main(["--recipe", "resnet18_cifar", "--resume", str(folder)]) == 2
    assert "is finished: nothing to resume" in capsys.readouterr().err
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_resume_goes_on_and_refuses_another_recipe(image_folder, tmp_path, monkeypatch, capsys):
    """A run cut short before its end goes on to the same result; with another recipe it names what differs."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = on_folder(image_folder, cut, "backbone=test_resnet")
    assert main(on_folder(image_folder, whole, "backbone=test_resnet")) == 0
    monkeypatch.setattr(logger, "FLUSH_EVERY", 1)  # so that lines are written after the checkpoint
    with monkeypatch.context() as patched, pytest.raises(Cut):
        cut_before(patched, "set_lrs", 11)
        main(arguments)
    assert main([*arguments, "--set", "epochs=5", "--resume", str(cut)]) == 2
    assert "was started with another recipe:\n  epochs: 4 before, 5 now" in capsys.readouterr().err
    assert main([*arguments, "--resume", str(cut)]) == 0
    assert "resuming after step 8, 2 epochs done" in capsys.readouterr().out
    for file in ("metrics.jsonl", "predictions.safetensors", "model/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    "there,refused",
    [
        ([], None),
        ([".lock", "recipe.py", "run.json", "groups.txt", ".recipe.json"], None),
        (["notes.txt"], "files"),
        (["recipe.py"], "files"),  # somebody's own: a run makes its lock first
        ([".lock", "recipe.py", "groups.txt", "recipe.json"], "a run"),
    ],
)
def test_a_folder_with_something_in_it_is_not_used(tmp_path, there, refused):
    """What a run that died before it started has left is nothing; a run, or anything else, is kept."""
    folder = tmp_path / "out"
    assert new_run_dir("x", folder) == folder and not folder.exists()
    folder.mkdir()
    for name in there:
        (folder / name).touch()
    if not refused:
        assert new_run_dir("x", folder) == folder
        return
    with pytest.raises(RecipeError) as caught:
        new_run_dir("x", folder)
    remedy = "name another --output, or go on with the run in it: --resume"
    assert str(caught.value) == f"output folder {folder} already holds {refused}; {remedy}"


def test_a_file_is_no_folder(tmp_path):
    """A file where the output should go is refused, and kept."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RecipeError, match="out is a file, not a folder"):
        new_run_dir("x", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_without_output_has_its_name_and_time(here):
    """Without --output a run goes to runs/NAME-DATE-TIME, which later sorts later."""
    folder = new_run_dir("x", None)
    assert folder.parent.name == "runs" and not folder.parent.exists()
    time.strptime(folder.name, "x-%Y%m%d-%H%M%S")


def test_a_bare_resume_takes_the_recipes_newest_unfinished_run(here):
    """The one started last; a finished one, a folder of another recipe or without a run in it is none."""
    ours, other = [f"x-20260101-00000{i}" for i in range(5)], "x-y-20260101-000005"
    for name in (*ours, other):
        (here / "runs" / name).mkdir(parents=True)
    with pytest.raises(RecipeError) as caught:
        unfinished_run_dir("x", None)
    assert str(caught.value) == "no run to resume in runs/; name its folder: --resume DIR"
    for age, name in enumerate((other, ours[4], ours[2], ours[1], ours[3])):
        file = here / "runs" / name / "recipe.json"
        file.touch()
        os.utime(file, (1e9, 1e9 - age))
    (here / "runs" / ours[4] / "result.json").write_text('{"epochs": 2}')
    assert unfinished_run_dir("x", None) == Path("runs") / ours[2]
    (here / "runs" / ours[2] / "run.json").write_text('{"name": "x-20260101"}')
    assert unfinished_run_dir("x", None) == Path("runs") / ours[1]
    recipe = small_recipe()
    start_run_dir(here / "runs" / ours[0], None, "x", recipe, "", {})
    os.utime(here / "runs" / ours[0] / "recipe.json", (1e9, 1e8))
    assert unfinished_run_dir("x", None, recipe=recipe) == Path("runs") / ours[0]  # of this very recipe, though older
    (here / "runs" / ours[0] / "recipe.json").unlink()
    assert unfinished_run_dir("x-y", None) == Path("runs") / other
    assert unfinished_run_dir("x", here / "runs" / other) == here / "runs" / other
    with pytest.raises(RecipeError, match=f"^no run to resume in {here / 'runs' / ours[0]}; name its folder: --resume DIR$"):
        unfinished_run_dir("x", here / "runs" / ours[0])
    with pytest.raises(RecipeError, match=f"^the run in runs/{ours[4]} is finished: nothing to resume; for more than its 2 "):
        unfinished_run_dir("x", Path("runs") / ours[4])


@pytest.mark.parametrize("call", range(8))
def test_a_run_that_dies_as_it_starts_can_be_started_again(tmp_path, monkeypatch, call):
    """recipe.json is the last of a run's first files: cut anywhere before it, the folder counts as unused."""
    folder, file, calls = tmp_path / "out", ROOT / "recipes" / "resnet18_cifar.py", []

    def cutting(real):
        def called(*args, **options):
            calls.append(1)
            if len(calls) == call + 1:
                raise Cut
            return real(*args, **options)

        return called

    lock(folder).close()
    with monkeypatch.context() as patched, pytest.raises(Cut):
        for owner, name in ((Path, "write_bytes"), (Path, "replace")):
            patched.setattr(owner, name, cutting(getattr(owner, name)))
        start_run_dir(folder, file, "again", small_recipe(), "the groups", {})
    assert new_run_dir("x", folder) == folder
    start_run_dir(folder, file, "again", small_recipe(), "the groups", {})
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "groups.txt", "recipe.json", "recipe.py", "run.json"]
    assert (folder / "groups.txt").read_text() == "the groups\n" and filecmp.cmp(folder / "recipe.py", file, shallow=False)
    check_same_recipe(folder, small_recipe())
    assert len((folder / "recipe.json").read_text().splitlines()) > 50  # a field on each line, for people


def test_a_locked_folder_names_its_holder(tmp_path):
    """Another process is refused while the lock is held, with the holder's number, the latest if there were several."""

    def tried():
        answer, question = os.pipe()
        if os.fork() == 0:
            try:
                lock(tmp_path / "a" / "run").close()
                os.write(question, b"free")
            except RecipeError as error:
                os.write(question, str(error).encode())
            finally:
                os._exit(0)
        os.close(question)  # so that a child that dies without a word is no wait for ever
        os.wait()
        return os.read(answer, 1000).decode()

    assert tried() == "free"
    (tmp_path / "a" / "run" / ".lock").write_text("123456789012345")
    with lock(tmp_path / "a" / "run"):
        holder = f"process {os.getpid()} is alive"
        assert tried() == f"{holder} and writes its run to {tmp_path / 'a' / 'run'}; name another --output"
    assert tried() == "free"


def test_dry_run_needs_neither_data_nor_weights(here, capsys):
    """--dry-run shows the table and the learning rates of a recipe whose data and weights are elsewhere, and writes nothing."""
    assert main(["--recipe", "resnet50_cifar100", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "50000 images of 100 classes at 224 px; 20 epochs of 391 steps of 128 images" in " ".join(out.split())
    assert "layer4  14,964,736" in out
    lrs = next(line for line in out.splitlines() if line.startswith("stem ") and "e-03" in line and "-  " in line).split()
    assert lrs[1:4] == ["-", "-", "-"] and lrs[4] == "3.0e-03"
    assert not list(here.iterdir())


def test_an_unknown_recipe_fails_before_torch_is_loaded(command):
    """A misspelt name is answered by the script itself with exit code 2, without importing torch."""
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:], "--recipe", "resnet81_cifar"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "finetune: no recipe" in done.stderr and "torch" not in done.stderr


def test_a_recipes_own_modules_are_part_of_it(here, monkeypatch):
    """A change of the code in a module or package of one's own is named; comments, and installed packages, may change."""
    monkeypatch.syspath_prepend(here)
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("from pack.inner import make\n")
    inner, file = here / "pack" / "inner.py", here / "mine.py"
    inner.write_text("def make():\n    return 1\n")
    file.write_text("import json\nimport numpy\nimport torch\nfrom pack import make\n")
    importlib.import_module("pack")
    recipe = small_recipe(backbone=SmallNet)
    (here / "run").mkdir()
    start_run_dir(here / "run", file, "x", recipe, "", {})
    assert list(json.loads((here / "run" / "run.json").read_text())["modules"]) == ["pack", "pack.inner"]
    inner.write_text("def make():\n    # the same\n    return 1\n")
    check_same_recipe(here / "run", recipe, file)
    inner.write_text("def make():\n    return 2\n")
    with pytest.raises(RecipeError, match="module pack.inner, which .*mine.py imports: its code was changed"):
        check_same_recipe(here / "run", recipe, file)


def test_rare_classes_are_made_up_for_once(here, capsys):
    """Balanced weights and balanced sampling are refused together, each alone is not; a run that has both can be loaded."""
    words = ["--recipe", "efficientnet_lite0_digits", "--weights", "none", "--dry-run", "--set", "class_weights=balanced"]
    assert main(words) == 0 and main([*words[:-2], "--set", "data.sampling=balanced"]) == 0
    assert main([*words, "--set", "data.sampling=balanced"]) == 2
    assert "would make up for rare classes twice" in capsys.readouterr().err
    both = small_recipe(class_weights="balanced", data=replace(small_recipe().data, sampling="balanced"))
    assert from_dict(to_dict(both)).class_weights == "balanced"
