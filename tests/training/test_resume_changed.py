"""A run that goes on after something changed: it is refused, or trains what is left of it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from finetune.__main__ import main as cli
from finetune.data.dataset import ImageList, fingerprint
from finetune.recipe import AdamW, Data
from finetune.run import main
from finetune.training import loop as train_loop
from finetune.training.run_dir import check_same_recipe, newest_checkpoint, start_run_dir
from finetune.utils.errors import RecipeError
from helpers import ALL, Coloured, Cut, cut_before, on_folder, run_here, same_tensors, small_recipe


def coloured(num_images, batch_size=8):
    """Four epochs on so many images."""
    labels = [i % 2 for i in range(num_images)]
    source = lambda: (Coloured(labels), Coloured(labels[:6]))  # noqa: E731
    return small_recipe(data=Data(source, image_size=24, batch_size=batch_size), groups=ALL, optimizer=AdamW())


@pytest.mark.parametrize("call,done", [(7, 6), (9, 8)], ids=["in an epoch", "between two"])
@pytest.mark.parametrize("num_images,batch_size", [(16, 8), (64, 8), (32, 16), (32, 4), (32, 5)])
def test_with_other_images_or_another_batch_the_steps_that_are_left_are_taken(
    tmp_path, monkeypatch, capsys, num_images, batch_size, call, done
):
    """Every whole epoch that is left has all its steps, the running one the share that is left, and a sentence says so."""
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", call)
        with pytest.raises(Cut):
            run_here(coloured(32), tmp_path, checkpoint_every=1)
    recipe = coloured(num_images, batch_size)
    steps = recipe.data.steps_per_epoch(num_images)
    taken, real = Counter(), train_loop.train_step

    def counting(recipe, model, criterion, optimizer, batch, accelerator):
        taken[batch.plan.step // steps] += 1
        return real(recipe, model, criterion, optimizer, batch, accelerator)

    monkeypatch.setattr(train_loop, "train_step", counting)
    _, rows = run_here(recipe, tmp_path)
    left = -(-steps * (4 - done % 4) // 4)
    assert taken == Counter({1 + done // 8: left, 2 + done // 8: steps, 3: steps})
    assert [row["epoch"] for row in rows if "train_loss" in row] == [0, 1, 2, 3]
    assert f"an epoch now has {steps} steps, not 4" in capsys.readouterr().out


def test_a_fingerprint_tells_sets_of_images_apart(tmp_path):
    """Names, labels, classes, order and pixels in memory count; the folder that the files lie in does not."""
    paths, classes = [tmp_path / "a" / f"{i}.png" for i in range(4)], ("ant", "bee")
    moved = [str(tmp_path / "b" / path.name) for path in paths]
    pixels = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)

    def found(items, labels=(0, 1, 0, 1), classes=classes):
        return fingerprint(ImageList(items, labels, None), classes)

    assert found(moved) == found(paths) and found(paths).startswith("4 ")
    others = [found(paths[::-1]), found(paths, (0, 1, 1, 0)), found(paths, classes=("ant", "wasp")), found(paths[:2], (0, 1))]
    others += [found(pixels), found(255 - pixels), found([*paths[:3], paths[0]]), found(range(4)), found(range(1, 5))]
    assert len({found(paths), *others}) == len(others) + 1
    assert fingerprint(Coloured([0, 1]), classes) != fingerprint(Coloured([1, 1]), classes)


@pytest.mark.parametrize(
    "change,fault",
    [
        (lambda root: (root / "train" / "red" / "0.png").unlink(), "training images: 30 before, 29 now"),
        (lambda root: (root / "val" / "red" / "0.png").rename(root / "val" / "red" / "x.png"), "15 before, 15 now: others"),
        (
            lambda root: shutil.copy(root / "train" / "red" / "1.png", root / "train" / "blue" / "1.png"),
            "1 files have another content than before, such as ",
        ),
    ],
)
def test_other_images_are_refused_unless_told_otherwise(tmp_path, monkeypatch, capsys, image_folder, change, fault):
    """A run goes on with the images that it was started on; with --resume-anyway with those that there are."""
    root, output = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, root)
    words = on_folder(root, output, "epochs=2")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 6)
        with pytest.raises(Cut):
            main(words)
    change(root)
    assert main([*words, "--resume"]) == 2
    assert fault in capsys.readouterr().err and not (output / "result.json").exists()
    assert main([*words, "--resume", "--resume-anyway"]) == 0


def state_of(folder):
    """The content of every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_refused_resume_leaves_the_run_as_it_was(here, monkeypatch, capsys, image_folder):
    """Other classes, another network, fewer epochs than begun: refused, even with --resume-anyway, and nothing is written."""
    root, output = here / "images", here / "run"
    shutil.copytree(image_folder, root)
    words = on_folder(root, output, "epochs=4", "linear_probe=none")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 6)
        with pytest.raises(Cut):
            main([*words, "--checkpoint-every", "1"])
    before = state_of(output)
    anyway = [*words, "--resume", "--resume-anyway"]
    assert cli(["resume", str(output), "--epochs", "1"]) == 2
    assert "has begun epoch 2: it can't end after 1" in capsys.readouterr().err and state_of(output) == before
    assert main([*anyway, "--set", "backbone=resnet10t"]) == 2
    assert "is of another network" in capsys.readouterr().err and state_of(output) == before
    assert main([*anyway, "--set", "optimizer=SGD"]) == 2
    assert "torch.AdamW's state of" in capsys.readouterr().err and state_of(output) == before
    for part in ("train", "val"):
        (root / part / "red").rename(root / part / "rot")
    for arguments in (words + ["--resume"], anyway):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "started with other classes: only before: red; only now: rot" in said and "--resume-anyway" not in said
        assert state_of(output) == before
    for part in ("train", "val"):
        (root / part / "rot").rename(root / part / "red")
    root.rename(here / "moved")
    assert cli(["resume", str(output)]) == 2 and "Yours: --data DIR" in capsys.readouterr().err
    assert cli(["resume", str(output), "--data", str(here / "moved")]) == 0
    assert json.loads((output / "recipe.json").read_text())["data"]["source"] == str(here / "moved")


def test_other_weights_to_pull_towards_are_another_recipe(tmp_path):
    """With l2_sp the file of pretrained weights is part of the run, as its content."""
    file = tmp_path / "w.pth"
    file.write_bytes(b"one")
    recipe = small_recipe(weights=str(file), l2_sp=0.1)
    start_run_dir(tmp_path, None, "run", recipe, "", {})
    check_same_recipe(tmp_path, recipe)
    file.write_bytes(b"two")
    with pytest.raises(RecipeError, match="w.pth: another content than before, towards which l2_sp pulls"):
        check_same_recipe(tmp_path, recipe)


NETWORK = '''"""A recipe of one's own."""
from finetune import *
from torch import nn

# a comment
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 10)
    def forward(self, images):
        return self.fc(self.stem(images).relu().mean((2, 3)))

def net():
    return Net()

recipe = Recipe(
    backbone=net, head="fc", weights="none", data=Data("generated", image_size=24, batch_size=8), epochs=2, batch_norm="frozen",
    groups=(Group("all", ".", lr=1e-2),), optimizer=SGD(), schedule=Lambda(function=lambda epoch: 1.0),
)
'''


@pytest.mark.parametrize(
    "old,new,refused",
    [
        ("relu()", "tanh()", True),
        ("lambda epoch: 1.0", "lambda epoch: 0.5", True),
        ("return Net()", "return Net().train()", True),
        ("# a comment", "# another", False),
        ("one's own", "mine", False),
    ],
)
@pytest.mark.parametrize("noted", [True, False])
def test_a_function_whose_code_was_changed_is_another_recipe(tmp_path, monkeypatch, capsys, old, new, refused, noted):
    """Of the network or a schedule, in the recipe's file or in the run's copy of it; comments may change."""
    file, output = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(NETWORK)
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 5)
        with pytest.raises(Cut):
            main(["--recipe", str(file), "--output", str(output)])
    if not noted:  # by an earlier version
        (output / "run.json").write_text('{"name": "mine"}')
    file.write_text(NETWORK.replace(old, new))
    resume = ["--recipe", str(file), "--resume", str(output)]
    if refused:
        assert main(resume) == 2
        assert f"{file}: its code was changed, of which the recipe has function net, " in capsys.readouterr().err
        (output / "recipe.py").write_text(NETWORK.replace(old, new))
        assert main(["--resume", str(output)]) == (2 if noted else 0)
    assert refused and not noted or main([*resume, "--resume-anyway"] if refused else resume) == 0


def test_a_finished_run_goes_on_for_more_epochs(here, capsys, image_folder):
    """With --epochs it ends as the run of so many whose first ones had the same learning rates; unasked it stays finished."""
    words = [*on_folder(image_folder, "runs/run", "schedule=Constant", "epochs=2", "linear_probe=none")]
    assert main(words) == 0
    assert cli(["resume", "run"]) == 2 and "no unfinished run 'run'" in capsys.readouterr().err
    for arguments in (["runs/run"], ["runs/run", "--epochs", "2"], ["run", "--epochs", "1"]):
        assert cli(["resume", *arguments]) == 2
        assert "is finished: nothing to resume; for more than its 2 epochs: finetune resume" in capsys.readouterr().err
    assert cli(["resume", "run", "--epochs", "3"]) == 0
    assert "resuming after step 8, 2 epochs done" in capsys.readouterr().out
    whole = [word.replace("runs/run", "runs/whole").replace("epochs=2", "epochs=3") for word in words]
    assert main(whole) == 0
    runs = [Path("runs") / name for name in ("run", "whole")]
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()
    assert len({(run / "model" / "model.safetensors").read_bytes() for run in runs}) == 1
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert results[0]["epochs"] == results[1]["epochs"] == 3
    shutil.rmtree("runs/run/checkpoints")
    assert cli(["resume", "run", "--epochs", "4"]) == 2
    assert "has no checkpoint any more to go on from" in capsys.readouterr().err


def test_fewer_epochs_than_are_done_are_refused(tmp_path, monkeypatch):
    """What is done can't be taken back: one sentence, and the metrics stay."""
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 8)
        with pytest.raises(Cut):
            run_here(small_recipe(), tmp_path)
    with pytest.raises(RecipeError, match=f"^2 epochs of the run in {tmp_path} are done, and epochs=1$"):
        run_here(small_recipe(epochs=1, groups=ALL), tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: os.truncate(file, 0),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:700] + bytes(file.stat().st_size - 700)),
    ],
    ids=["half", "empty", "away", "zeros"],
)
def test_metrics_that_were_cut_are_whole_again(tmp_path, monkeypatch, capsys, spoil):
    """After a power failure each epoch's line is the unbroken run's, whatever became of the file; the run ends as that one."""
    whole, rows = run_here(small_recipe(), tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 9)
        with pytest.raises(Cut):
            run_here(small_recipe(), tmp_path / "cut", checkpoint_every=1)
    spoil(tmp_path / "cut" / "metrics.jsonl")
    net, found = run_here(small_recipe(), tmp_path / "cut")
    assert [row for row in found if "val_images" in row] == [row for row in rows if "val_images" in row]
    assert found[-4:] == rows[-4:] and same_tensors(net.state_dict(), whole.state_dict())
    assert "metrics.jsonl had been cut" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["recipe.json", "run.json"])
def test_a_cut_file_of_a_run_gets_one_sentence(here, monkeypatch, capsys, image_folder, name):
    """Without its recipe a run can't go on, and says so; what was noted of its start is no condition."""
    words = on_folder(image_folder, "runs/run", "epochs=1")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 3)
        with pytest.raises(Cut):
            main(words)
    os.truncate(here / "runs" / "run" / name, 20)
    assert cli(["runs"]) == 0
    for again in ([*words, "--resume"], ["--resume", "run"]):
        assert main(again) == (2 if name == "recipe.json" else 0)
        if name == "recipe.json":
            assert "finetune: can't read runs/run/recipe.json: " in capsys.readouterr().err
        else:
            (here / "runs" / "run" / "result.json").unlink()


def test_what_the_run_did_not_write_stays(tmp_path, monkeypatch):
    """One's own copies and notes among checkpoints are neither taken for the newest nor removed."""
    recipe = small_recipe()
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 6)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path, checkpoint_every=1)
    checkpoint = newest_checkpoint(tmp_path)
    own = [checkpoint.with_name(name) for name in ("my-backup", f"{checkpoint.name}-good", "step-99999999", ".hidden")]
    for folder in own:
        shutil.copytree(checkpoint, folder)
    left = checkpoint.with_name(".step-00000009-epochs-00002.tmp")
    left.mkdir()
    assert newest_checkpoint(tmp_path) == checkpoint
    run_here(recipe, tmp_path)
    assert all(len(list(folder.iterdir())) == 3 for folder in own) and not left.exists() and not checkpoint.exists()
