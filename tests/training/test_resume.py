"""A run that goes on is the unbroken one, to the bit."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import safetensors.torch
import torch

from finetune.recipe import (
    SGD,
    AdamW,
    Augment,
    Data,
    EarlyStop,
    Group,
    LayerDecay,
    LinearProbe,
    Optimizer,
    Plateau,
    Switch,
)
from finetune.recipe.serialize import diff, from_dict, to_dict
from finetune.training import logger
from finetune.training import loop as train_loop
from finetune.training.distributed import Stopped
from finetune.training.run_dir import check_same_recipe, newest_checkpoint
from finetune.utils.errors import RecipeError
from helpers import ALL, Cut, DroppingNet, cut_before, run_here, scaling_accelerator, small_recipe


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


def go_on(monkeypatch, recipe, folder, **options):
    """Resume a run, which takes the steps that its checkpoint lacks, and no other."""
    done, real, calls = int(newest_checkpoint(folder).name.split("-")[1]), train_loop.train_step, []
    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "train_step", lambda *args: calls.append(1) or real(*args))
        run_here(recipe, folder, **options)
    assert done and done + len(calls) == 12


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Everything after an unbroken run, for 1 and 2 micro-batches a step."""
    folder = tmp_path_factory.mktemp("unbroken")
    found = {}
    for accumulate in (1, 2):
        run_here(interrupted_recipe(), folder / str(accumulate), accumulate=accumulate)
        found[accumulate] = everything(folder / str(accumulate))
    return found


def interrupted_recipe():
    return small_recipe(backbone=DroppingNet, batch_norm="train", optimizer=AdamW(weight_decay=0.05))


@pytest.mark.parametrize(
    "before,call,accumulate,every,workers",
    [
        ("set_lrs", 5, 1, 0, (0, 0)),  # in an epoch, with the checkpoint at its start
        ("set_lrs", 6, 1, 1, (0, 2)),  # in an epoch, with a checkpoint after each step
        ("set_lrs", 6, 2, 2, (2, 0)),  # with fewer workers than before
        ("seed_all", 9, 2, 1, (0, 0)),  # in the middle of an accumulation
        ("start_stage", 2, 1, 1, (2, 2)),  # at an unfreezing boundary
        ("predict_logits", 3, 1, 1, (0, 0)),  # after an epoch's last step, before its metrics
        ("save_checkpoint", 8, 1, 1, (0, 0)),  # with the metrics of an epoch written and no checkpoint of them
    ],
)
def test_a_resumed_run_is_an_unbroken_one(tmp_path, monkeypatch, unbroken, before, call, accumulate, every, workers):
    """Parameters, buffers, optimizer state and the metrics file are the same, to the bit, wherever the run was cut."""
    monkeypatch.setattr(logger, "FLUSH_EVERY", 1)  # so that lines are written after the checkpoint
    with monkeypatch.context() as patched:
        cut_before(patched, before, call)
        with pytest.raises(Cut):
            run_here(interrupted_recipe(), tmp_path, accumulate=accumulate, workers=workers[0], checkpoint_every=every)
    go_on(monkeypatch, interrupted_recipe(), tmp_path, accumulate=accumulate, workers=workers[1], checkpoint_every=every)
    assert_same_bits(everything(tmp_path), unbroken[accumulate])


def noise(image, rng):
    """An augmentation of a recipe's own, which draws from its generator and from torch's."""
    return (np.asarray(image) * rng.uniform(0.5, 1, 3) * torch.rand(1).item()).astype(np.uint8)


HEAD, REST = Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=2)


OPTIONS = {
    "average": {"ema_decay": 0.6},
    "linear probe": {"linear_probe": LinearProbe(views=2), "early_stop": EarlyStop(patience=9)},
    "several optimizers": {"groups": (HEAD, Group("rest", ".", lr=1e-3, optimizer=SGD(momentum=0.9), unfreeze_at=1))},
    "switch": {"groups": (HEAD, REST), "switch": Switch(at=2, optimizer=SGD(momentum=0.9), lr_factor=3.0)},
    "lbfgs": {"groups": (HEAD, Group("rest", ".", lr=0)), "optimizer": Optimizer("LBFGS", max_iter=3)},
    "steps counted in a row": {"groups": (HEAD, REST), "optimizer": Optimizer("lamb")},
    "mixing": {"augment": Augment(mixup=0.4, cutmix=1.0), "l2_sp": 0.1, "data": Data("generated", 24, 8, sampling="balanced")},
    "a function of its own": {"augment": Augment(function=noise, vflip=0.5, rot90=0.5, rotation=20, grayscale_prob=0.5)},
    "another shape": {"data": Data("generated", (24, 40), 8, resize="pad")},
    "sizes that grow": {"data": Data("generated", 32, 8, start_size=8, test_size=40), "augment": Augment(erasing=0.5)},
    "kept images": {"groups": (HEAD, dataclasses.replace(REST, unfreeze_at=3)), "augment": Augment(frozen_views=1)},
    "bf16": {"mixed_precision": "bf16", "groups": (HEAD, REST)},
    "own columns": {
        "groups": (
            Group("head", "fc", lr=1e-2, schedule=Plateau(patience=0)),
            Group("rest", ".", lr=1e-3, unfreeze_at=1, warmup_epochs=1.0, weight_decay=0.3),
        )
    },
}


@pytest.mark.parametrize("call", [4, 6, 7, 9])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_survives_a_cut(tmp_path, monkeypatch, option, call):
    """With any option a resumed run is an unbroken one, to the bit, cut in an epoch, at its end, or at a switch."""
    recipe = small_recipe(**{"backbone": DroppingNet, "batch_norm": "train", **OPTIONS[option]})
    run_here(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", call)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path / "cut", checkpoint_every=1)
    go_on(monkeypatch, recipe, tmp_path / "cut")
    whole = everything(tmp_path / "whole")
    assert_same_bits(everything(tmp_path / "cut"), whole)
    assert len(whole[1]) > 1 and any(name.startswith("average") for name in whole[0]) == (option == "average")


def test_a_skipped_fp16_step_costs_no_step_of_the_schedule(tmp_path, monkeypatch, capsys):
    """Steps that overflow change no weight and no learning rate, and are counted; a resumed scaler goes on to the bit."""
    recipe = small_recipe(groups=ALL)
    plain = [row["lr"] for row in run_here(recipe, tmp_path / "plain")[1] if "lr" in row]
    net, rows = run_here(recipe, tmp_path / "scaled", accelerator=scaling_accelerator())
    steps = [row for row in rows if "lr" in row]
    assert [row["lr"] for row in steps] == plain
    skipped = [row["step"] for row in steps if not math.isfinite(row["grad_norm"])]
    assert skipped and len(skipped) < len(steps) and all(math.isfinite(row["loss"]) for row in steps)
    counted = [row["skipped_steps"] for row in rows if "skipped_steps" in row]
    assert sum(counted) == len(skipped) and f"epoch 1: {counted[0]} of 3 steps were left out" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 6)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path / "cut", checkpoint_every=1, accelerator=scaling_accelerator())
    go_on(monkeypatch, recipe, tmp_path / "cut", accelerator=scaling_accelerator())
    assert_same_bits(everything(tmp_path / "cut"), everything(tmp_path / "scaled"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, monkeypatch, unbroken, number):
    """SIGTERM and Ctrl-C stop after the running step with a checkpoint of it; handlers come back; resuming is exact."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    real = train_loop.backward

    def signalled(recipe, model, criterion, batch, accelerator):
        if batch.plan.step == 4:
            os.kill(os.getpid(), number)
        return real(recipe, model, criterion, batch, accelerator)

    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "backward", signalled)
        with pytest.raises(Stopped, match="after step 5"):
            run_here(interrupted_recipe(), tmp_path)
    assert newest_checkpoint(tmp_path).name == "step-00000005-epochs-00001"
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    go_on(monkeypatch, interrupted_recipe(), tmp_path)
    assert_same_bits(everything(tmp_path), unbroken[1])


def test_a_changed_recipe_is_refused_unless_told_otherwise(tmp_path):
    """Resuming names every changed field; fields younger than the run count as having had their defaults."""
    recipe = small_recipe()
    resolved = to_dict(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(resolved))
    check_same_recipe(tmp_path, recipe)
    with pytest.raises(RecipeError) as caught:
        check_same_recipe(tmp_path, small_recipe(epochs=5, seed=1))
    assert str(caught.value).splitlines() == [
        f"the run in {tmp_path} was started with another recipe:",
        "  epochs: 4 before, 5 now",
        "  seed: 0 before, 1 now",
        f"  to go on as it was started: finetune resume {tmp_path}; with this recipe all the same: --resume-anyway",
    ]
    del resolved["data"]["on_bad_image"], resolved["label_smoothing"]
    assert diff(from_dict(resolved), recipe) == []
    changed = small_recipe(label_smoothing=0.1, data=Data("generated", 24, 8, on_bad_image="skip"))
    assert {path for path, _, _ in diff(from_dict(resolved), changed)} == {"label_smoothing", "data.on_bad_image"}


ROWS = small_recipe().groups


@pytest.mark.parametrize(
    "before,now",
    [(LayerDecay(head_lr=1e-2, stem_ratio=0.1), (*ROWS, Group("x", "x", lr=0))[:n]) for n in (1, 2, 3, 4)]
    + [(ROWS[:n], LayerDecay(head_lr=1e-2, stem_ratio=0.1)) for n in (1, 3)]
    + [(ROWS, ROWS[:2]), (ROWS, (*ROWS[:2], Group("stem", "stem|norm", lr=0)))],
)
def test_groups_of_another_kind_are_named(before, now):
    """Whatever stood in place of the groups, with as many rows or fields or with others, they alone are named."""
    old = from_dict(json.loads(json.dumps(to_dict(small_recipe(groups=before)))))
    changed = diff(old, small_recipe(groups=now))
    assert changed and all(path.split(".")[0] == "groups" for path, _, _ in changed)


def test_fields_younger_than_the_run_had_their_defaults():
    """In rows and parts as well."""
    recipe = small_recipe(switch=Switch(at=2, optimizer=SGD()))
    resolved = json.loads(json.dumps(to_dict(recipe)))
    del resolved["groups"][1]["warmup_epochs"], resolved["schedule"]["floor"], resolved["switch"]["lr_factor"]
    assert diff(from_dict(resolved), recipe) == []
    changed = diff(from_dict(resolved), small_recipe(switch=Switch(at=2, optimizer=SGD(), lr_factor=2.0)))
    assert changed == [("switch.lr_factor", 1.0, 2.0)]
