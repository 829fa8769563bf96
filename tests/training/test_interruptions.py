"""Whatever happens to the machine, what was good stays."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.data.batches import plan_epoch
from finetune.recipe import Data
from finetune.run import STOPPED, main
from finetune.training import checkpoint, distributed
from finetune.training import loop as train_loop
from finetune.training.distributed import Stopped, StopRequest
from finetune.training.run_dir import lock, new_run_dir, newest_checkpoint
from finetune.utils.errors import RecipeError
from helpers import ROOT, on_folder, run_here, small_recipe


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    """Pressed again a while later, Ctrl-C does not wait for the step; the launcher's echo of the first is no second one."""
    clock, got_past = [0.0], []
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def stuck(*args):
        for clock[0] in (100.0, 101.0, 101.1):
            signal.raise_signal(signal.SIGINT)
            got_past.append(clock[0])

    monkeypatch.setattr(train_loop, "backward", stuck)
    with pytest.raises(KeyboardInterrupt):
        run_here(small_recipe(), tmp_path)
    assert got_past == [100.0, 101.0]


def test_a_stopped_command_exits_with_75_and_resumes(tmp_path, image_folder, capsys):
    """A scheduler's SIGTERM ends the command with exit code 75 and the line that goes on; --resume auto then finishes."""
    arguments = on_folder(image_folder, tmp_path / "out", "backbone=test_resnet", "data.batch_size=4", "epochs=20")
    command = [sys.executable, str(ROOT / "finetune" / "run.py"), *arguments, "--resume", "auto"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list((tmp_path / "out" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)  # alive, and sure not to be done before it is asked to stop
    assert main(command[2:]) == 2
    assert f"process {process.pid} is alive and writes its run to {tmp_path / 'out'}" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED == 75, out
    assert f"to go on:\nfinetune resume {tmp_path / 'out'}" in out
    assert not (tmp_path / "out" / "result.json").exists()
    command[command.index("epochs=20")] = "epochs=21"
    assert main(command[2:]) == 2  # another recipe
    command[command.index("epochs=21")] = "epochs=20"
    assert main(command[2:]) == 0 and "resuming after step" in capsys.readouterr().out
    assert main(command[2:]) == 0 and "is finished" in capsys.readouterr().out  # nothing left to do
    assert json.loads((tmp_path / "out" / "result.json").read_text())["epochs"] == 20


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    """The message has the step, its images and its learning rates; the last good checkpoint stays, and nothing bad is saved."""
    real = train_loop.backward

    def spoilt(recipe, model, criterion, batch, accelerator):
        return real(recipe, model, criterion, batch, accelerator) * (float("nan") if batch.plan.step == 7 else 1.0)

    monkeypatch.setattr(train_loop, "backward", spoilt)
    recipe = small_recipe()
    with pytest.raises(RecipeError) as caught:
        run_here(recipe, tmp_path)
    images = plan_epoch(22, 8, recipe.seed, 2)[1].images
    assert re.search(
        r"the loss of step 8 \(epoch 3\) is nan, the norm of its gradient .*, at learning rates head ", str(caught.value)
    )
    assert ", ".join(map(str, images)) in str(caught.value) and str(tmp_path) in str(caught.value)
    assert newest_checkpoint(tmp_path).name == "step-00000006-epochs-00002"


@pytest.mark.parametrize("every,kept", [(0, "step-00000006-epochs-00002"), (1, "step-00000007-epochs-00002")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, every, kept, value):
    """Under a finite loss, too: the message has the step and its images, and nothing that came of it is saved."""
    real = train_loop.backward

    def spoilt(recipe, model, criterion, batch, accelerator):
        loss = real(recipe, model, criterion, batch, accelerator)
        if batch.plan.step == 7:
            model.fc.weight.grad[0, 0] = value
        return loss

    monkeypatch.setattr(train_loop, "backward", spoilt)
    for _ in range(2):  # and again when it is resumed
        with pytest.raises(RecipeError) as caught:
            run_here(small_recipe(), tmp_path, checkpoint_every=every)
        images = plan_epoch(22, 8, 0, 2)[1].images
        assert "the loss of step 8 (epoch 3) is " in str(caught.value) and f"its gradient {value}, " in str(caught.value)
        assert ", ".join(map(str, images)) in str(caught.value) and str(caught.value).endswith(kept)
        assert newest_checkpoint(tmp_path).name == kept


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """What a finite step makes infinite reaches no checkpoint: the one before stays."""
    real = train_loop.train_step

    def spoilt(recipe, model, *rest):
        found = real(recipe, model, *rest)
        with torch.no_grad():
            model.stem.bias[0] = float("inf") if rest[2].plan.step == 7 else 0.0
        return found

    monkeypatch.setattr(train_loop, "train_step", spoilt)
    with pytest.raises(RecipeError, match="after step 8 stem.bias is not finite: .*step-00000007-epochs-00002$"):
        run_here(small_recipe(), tmp_path, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007-epochs-00002"]


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    """The message has the epoch and the folder; that epoch is in no metrics and no checkpoint."""
    real, calls = train_loop.predict_logits, []

    def spoilt(*args, **options):
        logits, labels = real(*args, **options)
        return logits * (float("nan") if len(calls) == 2 else 1.0), calls.append(1) or labels

    monkeypatch.setattr(train_loop, "predict_logits", spoilt)
    with pytest.raises(RecipeError) as caught:
        run_here(small_recipe(), tmp_path)
    assert "the validation loss after epoch 3 is nan: lower the learning rates" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "top1" in row] == [0, 1]
    assert newest_checkpoint(tmp_path).name == "step-00000006-epochs-00002"


@pytest.mark.parametrize("stop", [False, True])
def test_no_checkpoint_is_taken_away_before_the_next_is_there(tmp_path, monkeypatch, stop):
    """At an epoch's last step a checkpoint may come before the metrics and one after: neither replaces the other in place."""
    real, replaced = checkpoint.write_folder, []

    def watched(folder, write):
        replaced.append(folder.exists())
        real(folder, write)

    monkeypatch.setattr(checkpoint, "write_folder", watched)
    if stop:  # after the third of an epoch's three steps
        with monkeypatch.context() as patched:
            calls = []
            patched.setattr(StopRequest, "agreed", lambda self: calls.append(1) or len(calls) == 3)
            with pytest.raises(Stopped, match="after step 3"):
                run_here(small_recipe(), tmp_path)
    run_here(small_recipe(), tmp_path, checkpoint_every=3)
    assert len(replaced) >= 7 and not any(replaced)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_loses_nothing(tmp_path, monkeypatch, image_folder, capsys, fault):
    """A write that fails ends in one message; the checkpoint before it is whole, and the run goes on from it."""
    arguments = on_folder(image_folder, tmp_path / "out", "backbone=test_resnet")
    real, calls = Path.write_bytes, []

    def full(path, data):
        if path.name == "optimizer.pt":
            calls.append(path)
            if len(calls) == 3:
                real(path, b"half")
                raise OSError(fault, os.strerror(fault))
        return real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert main(arguments) == 2
    err = capsys.readouterr().err
    checkpoints = tmp_path / "out" / "checkpoints"
    assert f"finetune: {checkpoints / 'step-00000012-epochs-00003'}: {os.strerror(fault)}" in err and "Traceback" not in err
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000008-epochs-00002"]
    assert main([*arguments, "--resume"]) == 0
    assert "resuming after step 8, 2 epochs done" in capsys.readouterr().out


def test_two_runs_do_not_share_a_folder(tmp_path):
    """A folder is locked while a run in it is alive, and only then: a loader's worker that outlives its run holds nothing."""
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
        f"from finetune.training.run_dir import lock; held = lock(Path({str(tmp_path)!r})); "
        "worker = os.fork() or time.sleep(60); print(worker, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    with pytest.raises(RecipeError, match=f"process {holder.pid} is alive"):
        lock(tmp_path)
    holder.kill()
    holder.wait()
    os.kill(worker, 0)  # the worker lives on
    lock(tmp_path).close()
    os.kill(worker, signal.SIGKILL)
    assert new_run_dir("x", tmp_path) == tmp_path  # a lock alone is no run


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_can_be_skipped(tmp_path, image_folder, capfd, workers):
    """With on_bad_image="skip" they are named and counted, in training and validation, and all others count once."""
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    bad = [root / "train" / "red" / "3.png", root / "train" / "blue" / "0.png", root / "val" / "red" / "1.png"]
    for file in bad:
        file.write_bytes(b"no image")
    recipe = small_recipe(epochs=3, data=Data(str(root), 24, 8, on_bad_image="skip"))
    _, rows = run_here(recipe, tmp_path / "out", workers=workers)
    epochs = [row for row in rows if "top1" in row]
    assert [(row["skipped_images"], row["val_images"]) for row in epochs] == [(2, 14)] * 3
    err = capfd.readouterr().err
    assert all(f"finetune: skipped: can't read the image {file}" in err for file in bad)
