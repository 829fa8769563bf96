"""The loop against a bare PyTorch loop, scikit-learn's metrics and an unbroken run."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score, top_k_accuracy_score
from torch.nn.functional import cross_entropy

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.metrics.compute import compute_metrics
from finetune.recipe import SGD, Constant, Data, Group, Optimizer, Plateau
from finetune.training import loop
from finetune.training.evaluate import predict_logits
from finetune.training.run_dir import newest_checkpoint
from finetune.utils.errors import RecipeError
from helpers import ALL, Cut, SmallNet, prepare, run_here, same_tensors, small_recipe


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_step_is_one_big_batch(tmp_path, accumulate, clip_norm):
    """Any accumulation, short last batch included, takes the steps of a bare loop over whole batches.

    22 images in batches of 8 leave a last one of 6, which 4 micro-batches share unevenly. The bound is float32 rounding
    through 9 steps.
    """
    recipe = small_recipe(
        groups=ALL,
        epochs=3,
        schedule=Constant(),
        clip_norm=clip_norm,
        label_smoothing=0.1,
        optimizer=SGD(momentum=0.9),
        data=Data("generated", 24, 8),
    )
    net, rows = run_here(recipe, tmp_path, accumulate=accumulate)

    reference, _, images = prepare(recipe)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-2, momentum=0.9)
    norms = []
    for epoch in range(3):
        for plan in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images[0], epoch, plan.micro_batches, 0)
            optimizer.zero_grad()
            cross_entropy(reference(batch), labels, label_smoothing=0.1).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(reference.parameters(), clip_norm or float("inf")).item())
            optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=1e-6)
    logged = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert logged == pytest.approx(norms, rel=1e-4) and len(logged) == 9
    if clip_norm:
        assert min(norms) > clip_norm  # every step was clipped, once


def test_metrics_are_scikit_learns():
    """Loss, top-1, top-5, macro F1 and accuracy by class equal scikit-learn's on the same predictions."""
    recipe = small_recipe(data=Data("digits", 24, 64))
    net, _, images = prepare(recipe)
    metrics = compute_metrics(recipe, *predict_logits(recipe, net, images[1], Accelerator(cpu=True)))
    with torch.no_grad():
        logits = torch.cat([net(batch) for batch, _ in load(images[1], 0, [list(range(len(images[1])))], 0)])
    labels, probs, guess = np.array(images[1].images.labels), logits.double().softmax(1).numpy(), logits.argmax(1).numpy()
    assert metrics["top1"] == accuracy_score(labels, guess)
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(labels, probs, k=5))
    assert metrics["loss"] == pytest.approx(log_loss(labels, probs), rel=1e-6)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, guess, average="macro", labels=range(10), zero_division=0))
    assert metrics["class_accuracy"] == pytest.approx(recall_score(labels, guess, average=None, labels=range(10)))
    assert metrics["val_images"] == len(images[1]) == 359 and len(set(guess)) > 1


def test_every_learning_rate_is_the_schedules(tmp_path):
    """Each step's line has each group's peak times the schedule's factor, and 0 for what is frozen."""
    recipe = small_recipe()
    rows = [row for row in run_here(recipe, tmp_path)[1] if "grad_norm" in row]
    assert [row["step"] for row in rows] == list(range(12))
    for row in rows:
        scale = recipe.schedule.scale(row["step"], 3, 4)
        assert row["lr"] == {g.name: g.lr * scale * (row["epoch"] >= g.unfreeze_at) for g in recipe.groups}


def test_plateau_follows_the_validation_metric(tmp_path):
    """The learning rate is what torch's ReduceLROnPlateau makes of the run's own validation losses."""
    recipe = small_recipe(groups=ALL, epochs=6, schedule=Plateau(mode="min", patience=0, factor=0.5, threshold=0.5))
    rows = run_here(recipe, tmp_path)[1]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", patience=0, factor=0.5, threshold=0.5)
    for epoch in range(6):
        lr = {row["lr"]["all"] for row in rows if row["epoch"] == epoch and "grad_norm" in row}
        assert lr == {optimizer.param_groups[0]["lr"]}
        theirs.step(next(row["loss"] for row in rows if row["epoch"] == epoch and "top1" in row))
    assert optimizer.param_groups[0]["lr"] < 1e-2


class OtherNet(SmallNet):
    def __init__(self):
        super().__init__()
        self.more = torch.nn.Linear(1, 1)


class WiderNet(SmallNet):
    def __init__(self):
        super().__init__()
        self.norm, self.body = torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 16, 5, stride=2)


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    """The folder of a run of three epochs."""
    folder = tmp_path_factory.mktemp("three")
    run_here(small_recipe(epochs=3), folder)
    return folder


@pytest.mark.parametrize(
    "changed,fault",
    [
        ({"backbone": OtherNet, "groups": ALL}, "is of another network"),
        ({"backbone": WiderNet}, "is of another network"),
        ({"groups": (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=0))}, "or other groups, than"),
        ({"optimizer": SGD(momentum=0.9)}, "has torch.AdamW's state of fc.weight, not torch.SGD's"),
        ({"optimizer": Optimizer("lamb")}, "has torch.AdamW's state of fc.weight, not timm.Lamb's"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, three_epochs, changed, fault):
    """Going on with another network, groups or optimizer than the checkpoint's ends in one message with the way out."""
    shutil.copytree(three_epochs, tmp_path / "run")
    with pytest.raises(RecipeError, match=f"{fault}.*; to start again .* name another --output"):
        run_here(small_recipe(epochs=4, **changed), tmp_path / "run")


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(file.read_bytes()[:100]), lambda file: torch.save(Cut, file)])
def test_a_damaged_checkpoint_is_refused(tmp_path, three_epochs, spoil):
    """A file that is cut, and one that holds code, each end in one message."""
    shutil.copytree(three_epochs, tmp_path / "run")
    spoil(newest_checkpoint(tmp_path / "run") / "optimizer.pt")
    with pytest.raises(RecipeError, match="can't be read: optimizer.pt"):
        run_here(small_recipe(epochs=4), tmp_path / "run")


def test_a_checkpoint_is_complete_or_absent(tmp_path, monkeypatch, capsys):
    """A process that dies while it writes a checkpoint leaves the one before, and the run goes on from that."""
    recipe = small_recipe()
    net, rows = run_here(recipe, tmp_path / "whole")
    real, saves = torch.save, []

    def dying(*args):
        saves.append(args)
        if len(saves) == 3:
            raise Cut
        real(*args)

    monkeypatch.setattr(torch, "save", dying)
    with pytest.raises(Cut):
        run_here(recipe, tmp_path / "cut")
    monkeypatch.setattr(torch, "save", real)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*")] == ["step-00000006-epochs-00002"]
    again, lines = run_here(recipe, tmp_path / "cut")
    assert "resuming after step 6, 2 epochs done" in capsys.readouterr().out
    assert same_tensors(net.state_dict(), again.state_dict()) and lines == rows
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert left == ["step-00000012-epochs-00004"]  # older ones and what a death left aside are gone
    assert json.loads((tmp_path / "cut" / "checkpoints" / left[0] / "state.json").read_text())["step"] == 12


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path):
    """mixed_precision="bf16" reaches the layers, in training and evaluation; parameters stay float32 and move."""
    seen = set()

    class Watched(SmallNet):
        def __init__(self):
            super().__init__()
            self.body.register_forward_hook(lambda module, inputs, output: seen.add((output.dtype, module.training)))

    recipe = small_recipe(backbone=Watched, groups=ALL, epochs=1, mixed_precision="bf16")
    before = prepare(recipe)[0].state_dict()
    net, _ = run_here(recipe, tmp_path)
    assert seen == {(torch.bfloat16, True), (torch.bfloat16, False)}
    assert {t.dtype for t in net.state_dict().values()} == {torch.float32}
    assert not same_tensors(before, net.state_dict())


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    """model-best is written at each epoch whose top-1 is the highest so far, and only then."""
    kept = []
    monkeypatch.setattr(loop, "save_model", lambda folder, *given: kept.append(folder.name))
    _, rows = run_here(small_recipe(groups=ALL, epochs=6), tmp_path)
    top1 = [row["top1"] for row in rows if "top1" in row]
    assert len(kept) == sum(value > max([-1.0, *top1[:i]]) for i, value in enumerate(top1)) and set(kept) == {"model-best"}
