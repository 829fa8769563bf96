"""Whatever happens to the machine, what was good stays, and the run goes on to the same end."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from conftest import ROOT, SmallNet, prepare, run_here, small_recipe
from finetune import checkpoint, run_record, train_loop
from finetune.batches import plan_epoch
from finetune.lr_schedule import Plateau
from finetune.memory import fitting_accumulation
from finetune.processes import Stopped, StopRequest
from finetune.recipe import SGD, AdamW, Augment, Data, EarlyStop, Frozen, Group, LinearProbe, Optimizer, RecipeError, Switch
from finetune.recipe_file import as_dict
from finetune.run import STOPPED, main
from finetune.run_folder import changes, check_same_recipe, lock, new_folder, newest_checkpoint

ALL = (Group("all", ".", lr=1e-2),)


class DroppingNet(SmallNet):
    """With dropout and batch norm: random numbers and running statistics must go on, too."""

    def __init__(self):
        super().__init__()
        self.drop.p = 0.5
        self.norm = nn.BatchNorm2d(8)


class Cut(Exception):
    pass


def cut_before(monkeypatch, function, call):
    """Let train() die as it calls one of its functions for the call-th time."""
    real, calls = getattr(train_loop, function), []

    def cutting(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Cut
        return real(*args, **options)

    monkeypatch.setattr(train_loop, function, cutting)


def everything(folder):
    """All that a run's last checkpoint holds, and its metrics."""
    last = newest_checkpoint(folder)
    moments = torch.load(last / "optimizer.pt", weights_only=True)
    flat = {
        f"{name} {key} {i}": torch.as_tensor(item)
        for name, state in moments.items()
        for key, value in state.items()
        for i, item in enumerate(value if isinstance(value, list) else [value])
        if item is not None
    }
    average = last / "average.safetensors"
    weights = safetensors.torch.load_file(last / "model.safetensors")
    weights |= {f"average {name}": t for name, t in (safetensors.torch.load_file(average) if average.exists() else {}).items()}
    return weights, flat, (folder / "metrics.jsonl").read_text()


def assert_same_bits(a, b):
    for ours, theirs in zip(a[:2], b[:2], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert a[2] == b[2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Everything after an unbroken run, for 1 and 2 micro-batches an update."""
    folder = tmp_path_factory.mktemp("unbroken")
    found = {}
    for accumulate in (1, 2):
        run_here(interrupted_recipe(), folder / str(accumulate), accumulate)
        found[accumulate] = everything(folder / str(accumulate))
    return found


def interrupted_recipe():
    return small_recipe(backbone=DroppingNet, norm_stats="train", optimizer=AdamW(weight_decay=0.05))


@pytest.mark.parametrize(
    "before,call,accumulate,every,workers",
    [
        ("set_rates", 5, 1, 0, (0, 0)),  # in an epoch, with the checkpoint at its start
        ("set_rates", 6, 1, 1, (0, 2)),  # in an epoch, with a checkpoint after each update
        ("set_rates", 6, 2, 2, (2, 0)),  # with fewer workers than before
        ("seed_all", 9, 2, 1, (0, 0)),  # in the middle of an accumulation
        ("unfreeze", 2, 1, 1, (2, 2)),  # at an unfreezing boundary
        ("evaluate", 3, 1, 1, (0, 0)),  # after an epoch's last update, before its scores
        ("save_checkpoint", 8, 1, 1, (0, 0)),  # with the scores of an epoch written and no checkpoint of them
    ],
)
def test_a_resumed_run_is_an_unbroken_one(tmp_path, monkeypatch, unbroken, before, call, accumulate, every, workers):
    """Parameters, buffers, optimizer state and the metrics file are the same, to the bit, wherever the run was cut."""
    monkeypatch.setattr(run_record, "FLUSH_EVERY", 1)  # so that lines are written after the checkpoint
    with monkeypatch.context() as patched:
        cut_before(patched, before, call)
        with pytest.raises(Cut):
            run_here(interrupted_recipe(), tmp_path, accumulate, workers[0], checkpoint_every=every)
    run_here(interrupted_recipe(), tmp_path, accumulate, workers[1], checkpoint_every=every)
    assert_same_bits(everything(tmp_path), unbroken[accumulate])


HEAD, REST = Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=2)
LEVERS = {
    "average": {"ema_decay": 0.6},
    "linear probe": {"linear_probe": LinearProbe(views=2), "early_stop": EarlyStop(patience=9)},
    "several optimizers": {"groups": (HEAD, Group("rest", ".", lr=1e-3, optimizer=SGD(momentum=0.9), unfreeze_at=1))},
    "switch": {"groups": (HEAD, REST), "switch": Switch(at=2, optimizer=SGD(momentum=0.9), lr_factor=3.0)},
    "lbfgs": {"groups": (HEAD, Frozen("rest", ".")), "optimizer": Optimizer("LBFGS", max_iter=3)},
    "mixing": {"augment": Augment(mixup=0.4, cutmix=1.0), "l2_sp": 0.1, "data": Data("generated", 24, 8, sampling="balanced")},
    "own columns": {
        "groups": (
            Group("head", "fc", lr=1e-2, schedule=Plateau(patience=0)),
            Group("rest", ".", lr=1e-3, unfreeze_at=1, warmup_epochs=1.0, weight_decay=0.3),
        )
    },
}


@pytest.mark.parametrize("call", [4, 6, 7, 9])
@pytest.mark.parametrize("lever", LEVERS)
def test_every_lever_survives_a_cut(tmp_path, monkeypatch, lever, call):
    """With any lever a resumed run is an unbroken one, to the bit, cut in an epoch, at its end, or at a change of optimizer."""
    recipe = small_recipe(**{"backbone": DroppingNet, "norm_stats": "train", **LEVERS[lever]})
    run_here(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_rates", call)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path / "cut", checkpoint_every=1)
    run_here(recipe, tmp_path / "cut")
    whole = everything(tmp_path / "whole")
    assert_same_bits(everything(tmp_path / "cut"), whole)
    assert len(whole[1]) > 1 and any(name.startswith("average") for name in whole[0]) == (lever == "average")


def scaling_accelerator():
    """An Accelerator that scales losses as for fp16, by so much that the first gradients overflow.

    Accelerate gives a CPU neither scaler nor fp16, so torch's own for the CPU are put in.
    """
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
    return accelerator


def test_a_skipped_fp16_step_costs_no_step_of_the_schedule(tmp_path, monkeypatch):
    """Updates that overflow change no weight and no rate; the scaler's state goes on through a resumed run, to the bit."""
    recipe = small_recipe(groups=ALL)
    plain = [row["lr"] for row in run_here(recipe, tmp_path / "plain")[1] if "lr" in row]
    net, rows = run_here(recipe, tmp_path / "scaled", accelerator=scaling_accelerator())
    updates = [row for row in rows if "lr" in row]
    assert [row["lr"] for row in updates] == plain
    skipped = [row["step"] for row in updates if not math.isfinite(row["grad_norm"])]
    assert skipped and len(skipped) < len(updates) and all(math.isfinite(row["loss"]) for row in updates)
    with monkeypatch.context() as patched:
        cut_before(patched, "set_rates", 6)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path / "cut", checkpoint_every=1, accelerator=scaling_accelerator())
    run_here(recipe, tmp_path / "cut", accelerator=scaling_accelerator())
    assert_same_bits(everything(tmp_path / "cut"), everything(tmp_path / "scaled"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_and_writes_a_checkpoint(tmp_path, monkeypatch, unbroken, number):
    """SIGTERM and Ctrl-C stop after the running update with a checkpoint of it; handlers come back; resuming is exact."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    real = train_loop.backward

    def signalled(recipe, objective, model, update, batches, step, accelerator):
        if step == 4:
            os.kill(os.getpid(), number)
        return real(recipe, objective, model, update, batches, step, accelerator)

    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "backward", signalled)
        with pytest.raises(Stopped, match="after update 4"):
            run_here(interrupted_recipe(), tmp_path)
    assert newest_checkpoint(tmp_path).name == "step-00000005-epochs-00001"
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    run_here(interrupted_recipe(), tmp_path)
    assert_same_bits(everything(tmp_path), unbroken[1])


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    """Pressed again a while later, Ctrl-C does not wait for the update."""

    def stuck(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher passing the same one on
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(train_loop, "backward", stuck)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_here(small_recipe(), tmp_path)
    assert time.monotonic() - started < 4


def test_a_stopped_command_exits_with_75_and_resumes(tmp_path, image_folder):
    """A scheduler's SIGTERM ends the command with exit code 75 and the line that goes on; --resume auto then finishes."""
    command = [
        sys.executable,
        str(ROOT / "finetune" / "run.py"),
        "--recipe",
        "resnet18_cifar",
        "--data",
        str(image_folder),
        "--weights",
        "none",
        "--set",
        "backbone=test_resnet",
        "--set",
        "mixed_precision=no",
        "--set",
        "data.image_size=32",
        "--set",
        "data.batch_size=4",
        "--set",
        "epochs=40",
        "--output",
        str(tmp_path / "out"),
        "--resume",
        "auto",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list((tmp_path / "out" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    refused = subprocess.run([*command[:-1], str(tmp_path / "out")], capture_output=True, text=True)
    assert refused.returncode == 2 and f"process {process.pid} is alive and writes its run to" in refused.stderr
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED == 75, out
    assert f"to go on: the same command with --resume {tmp_path / 'out'}" in out
    assert not (tmp_path / "out" / "result.json").exists()
    command[command.index("epochs=40")] = "epochs=41"
    assert main(command[2:]) == 2  # another recipe
    command[command.index("epochs=41")] = "epochs=40"
    assert main(command[2:]) == 0 and main(command[2:]) == 0  # finished, and nothing left to do
    assert json.loads((tmp_path / "out" / "result.json").read_text())["epochs"] == 40


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    """The message has the update, its images and its rates; the last good checkpoint stays, and nothing bad is saved."""
    real = train_loop.backward

    def spoilt(recipe, objective, model, update, batches, step, accelerator):
        return real(recipe, objective, model, update, batches, step, accelerator) * (float("nan") if step == 7 else 1.0)

    monkeypatch.setattr(train_loop, "backward", spoilt)
    recipe = small_recipe()
    with pytest.raises(RecipeError) as caught:
        run_here(recipe, tmp_path)
    images = plan_epoch(22, 8, recipe.seed, 2)[1].images
    assert "the loss of update 7 (epoch 2) is nan, at rates head " in str(caught.value)
    assert ", ".join(map(str, images)) in str(caught.value) and str(tmp_path) in str(caught.value)
    assert newest_checkpoint(tmp_path).name == "step-00000006-epochs-00002"


@pytest.mark.parametrize("stop", [False, True])
def test_no_checkpoint_is_taken_away_before_the_next_is_there(tmp_path, monkeypatch, stop):
    """At an epoch's last update a checkpoint may come before the scores and one after: neither replaces the other in place."""
    real, replaced = checkpoint.write_folder, []

    def watched(folder, write):
        replaced.append(folder.exists())
        real(folder, write)

    monkeypatch.setattr(checkpoint, "write_folder", watched)
    if stop:  # after the third of an epoch's three updates
        with monkeypatch.context() as patched:
            calls = []
            patched.setattr(StopRequest, "agreed", lambda self: calls.append(1) or len(calls) == 3)
            with pytest.raises(Stopped, match="after update 2"):
                run_here(small_recipe(), tmp_path)
    run_here(small_recipe(), tmp_path, checkpoint_every=3)
    assert len(replaced) >= 7 and not any(replaced)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_loses_nothing(tmp_path, monkeypatch, image_folder, capsys, fault):
    """A write that fails ends in one message; the checkpoint before it is whole, and the run goes on from it."""
    arguments = [
        "--recipe",
        "resnet18_cifar",
        "--data",
        str(image_folder),
        "--weights",
        "none",
        "--set",
        "backbone=test_resnet",
        "--set",
        "data.image_size=32",
        "--set",
        "data.batch_size=8",
        "--set",
        "epochs=4",
        "--output",
        str(tmp_path / "out"),
    ]
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


def test_a_changed_recipe_is_refused_unless_told_otherwise(tmp_path):
    """Resuming names every changed field; fields younger than the run count as having had their defaults."""
    recipe = small_recipe()
    resolved = as_dict(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(resolved))
    check_same_recipe(tmp_path, recipe)
    with pytest.raises(RecipeError) as caught:
        check_same_recipe(tmp_path, small_recipe(epochs=5, seed=1))
    assert "epochs: 4 before, 5 now" in str(caught.value) and "seed: 0 before, 1 now" in str(caught.value)
    assert "--resume-anyway" in str(caught.value)
    del resolved["data"]["on_bad_image"], resolved["label_smoothing"]
    assert changes(resolved, recipe) == []
    assert len(changes(resolved, small_recipe(label_smoothing=0.1, data=Data("generated", 24, 8, on_bad_image="skip")))) == 2


def test_two_runs_do_not_share_a_folder(tmp_path):
    """A folder is locked while a run in it is alive, and only then: a loader's worker that outlives its run holds nothing."""
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
        f"from finetune.run_folder import lock; held = lock(Path({str(tmp_path)!r})); "
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
    assert new_folder("x", tmp_path) == tmp_path  # a lock alone is no run


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


class Hungry(SmallNet):
    """Runs out of memory with more than 3 images at once."""

    def forward(self, images):
        if len(images) > 3:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(images)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_update(tmp_path, capsys, monkeypatch):
    """The batch stays, one line says what is done, and the weights are those of a run with memory enough."""
    recipe = small_recipe(groups=ALL, epochs=2, optimizer=SGD(momentum=0.9), backbone=Hungry)
    monkeypatch.setattr(train_loop, "evaluate", lambda *args: (torch.zeros(4, 10), torch.zeros(4).long()))
    net, _ = run_here(recipe, tmp_path / "hungry")
    out = capsys.readouterr().out
    assert out.count("out of memory with 8 images at once: now 4, 2 times an update; the batch stays 8") == 1
    assert out.count("now 2, 4 times an update") == 1
    other, _ = run_here(small_recipe(groups=ALL, epochs=2, optimizer=SGD(momentum=0.9)), tmp_path / "plenty")
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_try_for_memory_leaves_no_trace():
    """Trying a micro-batch changes no parameter, gradient or statistic; one image too many is refused."""
    net, groups, _ = prepare(small_recipe(backbone=DroppingNet, norm_stats="train"))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net.train()
    assert fitting_accumulation(small_recipe(), net, Accelerator(cpu=True), 1, print) == 1
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net.forward = lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError())
    with pytest.raises(RecipeError, match="out of memory with 1 images of 24 px"):
        fitting_accumulation(small_recipe(), net, Accelerator(cpu=True), 1, print)
