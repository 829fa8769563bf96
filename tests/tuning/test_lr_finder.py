"""The range test: what it computes is torch's, and it leaves no trace."""

import copy
import dataclasses
import math
import random
import threading
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, Group, LayerDecay, Step
from finetune.recipe.load import FLAGS, override
from finetune.training.logger import Logger
from finetune.training.loop import train
from finetune.tuning import lr_finder
from finetune.tuning.lr_finder import compare_factors, line_to_paste, plot_range_test, range_test, smooth, suggest_factors
from finetune.utils.errors import RecipeError
from helpers import SmallNet, prepare, same_tensors, small_recipe


class DropNet(SmallNet):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)


RECIPES = {
    "dropout": small_recipe(backbone=DropNet),
    "norms": small_recipe(
        backbone="test_resnet",
        head=None,
        batch_norm="train",
        groups=(Group("head", "fc", lr=1e-2), Group("late", r"layer[34]", lr=1e-2, unfreeze_at=1), Group("early", ".", lr=0)),
    ),
}


def state(net):
    """All but tensors that a range test might leave behind."""
    return {
        "flags": [parameter.requires_grad for parameter in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "gradients": [parameter.grad for parameter in net.parameters()],
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_it_leaves_no_trace(recipe):
    """Tensors, flags, modes, gradients, random states and the accelerator's own optimizer are, bit for bit, what they were."""
    net, _, (images, _) = prepare(recipe)
    next(net.parameters()).requires_grad_(False)
    list(net.children())[1].eval()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=1.0))
    tensors, before = {name: tensor.clone() for name, tensor in net.state_dict().items()}, state(net)
    assert len(range_test(recipe, net, images, accelerator, num_steps=10)[0]) == 10
    assert same_tensors(net.state_dict(), tensors) and state(net) == before
    assert accelerator._optimizers == [optimizer] and optimizer.param_groups[0]["lr"] == 1.0


def test_a_network_that_can_not_be_copied_is_tested():
    """Weight norm by hook and a lock, which Python can't copy, are no obstacle, and tensors come back."""

    class Uncopied(SmallNet):
        def __init__(self):
            super().__init__()
            self.stem, self.lock = nn.utils.weight_norm(self.stem), threading.Lock()

    recipe = small_recipe(backbone=Uncopied)
    net, _, (images, _) = prepare(recipe)
    with pytest.raises((TypeError, RuntimeError)):
        copy.deepcopy(net)
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert len(range_test(recipe, net, images, Accelerator(cpu=True), num_steps=10)[0]) == 10
    assert same_tensors(net.state_dict(), tensors)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_run_afterwards_is_the_run_without(tmp_path, recipe):
    """Training ends with the same bits, and writes the same metrics, whether or not a range test came first."""
    ends = []
    for tested in (True, False):
        net, _, datasets = prepare(recipe)
        accelerator = Accelerator(cpu=True)
        if tested:
            range_test(recipe, net, datasets[0], accelerator, num_steps=10)
        (folder := tmp_path / str(tested)).mkdir()
        net = train(recipe, net, datasets, Logger(folder, accelerator, recipe), accelerator)
        ends.append((net.state_dict(), (folder / "metrics.jsonl").read_text()))
    assert same_tensors(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_every_learning_rate_rises_by_the_same_progression(monkeypatch):
    """Each step's learning rates are the peaks times numpy's geomspace, whatever a row says; a frozen row has none."""
    recipe = small_recipe(
        groups=(
            Group("head", "fc", lr=1e-2, optimizer=SGD(momentum=0.9)),
            Group("body", "body", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5, schedule=Step(every=1, factor=0.5)),
            Group("stem", "stem|norm", lr=0),
        )
    )
    net, _, (images, _) = prepare(recipe)
    seen, networks, step = [], [], lr_finder.train_step

    def watched(recipe, model, criterion, optimizer, *rest):
        seen.append({row["name"]: row["lr"] for row in optimizer.param_groups})
        done = step(recipe, model, criterion, optimizer, *rest)
        networks.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return done

    monkeypatch.setattr(lr_finder, "train_step", watched)
    factors, _ = range_test(recipe, net, images, Accelerator(cpu=True), 1e-2, 1e1, num_steps=12)
    assert factors == pytest.approx(np.geomspace(1e-2, 1e1, 12), rel=1e-12) and len(seen) == 12
    for row, factor in zip(seen, np.geomspace(1e-2, 1e1, 12), strict=True):
        assert row == pytest.approx({"head": 1e-2 * factor, "body": 3e-3 * factor})
    moved = {n for n, t in networks[0].items() if not torch.equal(t, net.state_dict()[n])}
    assert moved == {"body.weight", "body.bias", "fc.weight", "fc.bias"}


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_norms_behave_as_in_the_run(monkeypatch, batch_norm):
    """In the test, statistics move in layers that ever train and in no others, and with batch_norm="frozen" nowhere."""
    recipe = dataclasses.replace(RECIPES["norms"], batch_norm=batch_norm)
    net, _, (images, _) = prepare(recipe)
    networks, step = [], lr_finder.train_step

    def watched(recipe, model, *rest):
        done = step(recipe, model, *rest)
        networks.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        return done

    monkeypatch.setattr(lr_finder, "train_step", watched)
    range_test(recipe, net, images, Accelerator(cpu=True), num_steps=10)
    moved = {n for n, t in networks[0].items() if not torch.equal(t, net.get_buffer(n))}
    late = {n for n, _ in net.named_buffers() if n.startswith(("layer3", "layer4"))}
    assert moved == (late if batch_norm == "train" else set()) and late


def test_losses_are_those_of_a_bare_loop():
    """The losses are those of torch's SGD and ExponentialLR over the run's own batches, epoch after epoch.

    The bound is float32 rounding through 15 steps, of which the last have learning rates at which differences grow.
    """
    recipe = small_recipe(
        groups=(Group("all", ".", lr=1e-2),), optimizer=SGD(momentum=0.9), clip_norm=None, label_smoothing=0.1
    )
    net, _, (images, _) = prepare(recipe)
    factors, losses = range_test(recipe, net, images, Accelerator(cpu=True), 1e-2, 1e2, num_steps=15)

    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1e4 ** (1 / 14))
    expected = []
    for epoch in range(5):
        for plan in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images, epoch, plan.micro_batches, 0)
            optimizer.zero_grad()
            loss = cross_entropy(net(batch), labels, label_smoothing=0.1)
            loss.backward()
            expected.append(loss.item())
            optimizer.step()
            schedule.step()
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 15
    assert max(losses) - min(losses) > 0.1  # there was something to get wrong


def test_smoothing_is_a_weighted_mean():
    """Each smoothed loss is numpy's average of all up to it, with weights that fall by beta from each to the one before."""
    losses = np.random.RandomState(0).rand(30)
    expected = [np.average(losses[: i + 1], weights=0.7 ** np.arange(i, -1, -1)) for i in range(30)]
    assert smooth(losses, 0.7) == pytest.approx(expected, rel=1e-12)


def roughened(smoothed, beta=0.8):
    """Losses whose moving average this is."""
    totals = np.asarray(smoothed) * (1 - beta ** np.arange(1, len(smoothed) + 1)) / (1 - beta)
    return (totals - beta * np.insert(totals[:-1], 0, 0.0)).tolist()


def test_suggestions_are_where_the_curve_was_made_to_have_them():
    """A logistic fall is steepest at its centre; the valley's point of a straight fall between two rises is the middle one.

    Steeper falls within the first 10 points, beyond the lowest, and within the last 5 are there to be left alone.
    """
    factors = np.geomspace(1e-3, 1e3, 81)
    traps = np.concatenate([np.linspace(9, 0, 8), np.zeros(58), [6, 5, 3, 1], np.ones(8), [1, -5, -5]])
    logistic = 3 - 2 / (1 + np.exp(-3 * np.log10(factors / factors[44])))
    assert suggest_factors(factors, roughened(logistic + traps))["steepest"] == factors[44]
    straight = np.interp(np.arange(81), [0, 30, 50, 80], [2.8, 3, 1, 1.5])
    valley = suggest_factors(factors, roughened(straight + traps))["valley"]
    assert factors[39] <= valley <= factors[41]


NOISE = 0.3 * np.random.RandomState(0).randn(100)


@pytest.mark.parametrize(
    "losses", [[2.0] * 40, np.linspace(1, 3, 40), 2 + NOISE, np.linspace(2, 3, 100) + NOISE, np.linspace(2, 1, 9)]
)
def test_a_loss_that_never_falls_suggests_nothing(losses):
    """A level, a rising, a merely noisy and a very short curve are refused with what to do about it."""
    with pytest.raises(RecipeError, match="start .*lower"):
        suggest_factors(np.geomspace(1e-3, 1, len(losses)), list(losses))


FALL = [(-3, 3.0), (-1.5, 3.0), (0.5, 0.5), (1, 0.5), (2, 3.0)]  # log10 of the factor, loss
BOTTOM = "flat part: keep them"


@pytest.mark.parametrize(
    "shift, kept, said",
    [
        (0.0, [], BOTTOM),  # the recipe's are near the lowest loss, still falling: both suggestions are higher up
        (0.8, [], BOTTOM),  # at the lowest
        (-2.4, ["steepest", "valley"], "lower"),  # before the fall
        (1.4, ["lowest"], "too high: loss "),  # beyond the lowest, and still below the suggestions
        (2.0, ["steepest", "valley"], "lower"),  # far beyond it
        (2.5, ["steepest", "valley"], "too high: the loss explodes"),  # beyond the last
    ],
)
def test_nothing_is_suggested_that_is_worse_than_the_recipes_own(shift, kept, said):
    """Of a made curve, wherever the recipe stands on it, what is kept has a smoothed loss below that at factor 1."""
    logs = np.linspace(-3, 2, 100)
    smoothed = np.interp(logs, *zip(*FALL, strict=True))
    factors, losses = 10 ** (logs - shift), roughened(smoothed)
    better, verdict = compare_factors(factors, losses, suggest_factors(factors, losses))
    assert list(better) == kept and said in verdict
    at_one = np.interp(shift, logs, smoothed)
    assert all(np.interp(np.log10(factor) + shift, logs, smoothed) < at_one for factor in better.values()) or shift > 2


@pytest.mark.parametrize("last, kept", [(math.nan, 12), (math.inf, 12), (1e3, 13), (1.0, 20)])
def test_it_ends_when_the_loss_explodes(monkeypatch, last, kept):
    """No loss is asked for after one that is no number, which is not kept, or after the smoothed one is 4 times its lowest."""
    net, _, (images, _) = prepare(small_recipe())
    made = iter([2.0] * 12 + [last] + [2.0] * 7)
    monkeypatch.setattr(lr_finder, "train_step", lambda *_: (torch.tensor(next(made)), torch.tensor(1.0)))
    factors, losses = range_test(small_recipe(), net, images, Accelerator(cpu=True), num_steps=20)
    assert len(losses) == kept and len(list(made)) == (0 if last == 1.0 else 7)
    assert factors == pytest.approx(np.geomspace(1e-3, 1e3, 20)[:kept])


def test_a_real_explosion_ends_it():
    """At learning rates that ruin the network the test is over before its range is, with finite losses."""
    recipe = small_recipe(optimizer=SGD(), clip_norm=None)
    net, _, (images, _) = prepare(recipe)
    _, losses = range_test(recipe, net, images, Accelerator(cpu=True), 1e-2, 1e9, num_steps=40)
    assert 10 < len(losses) < 40 and np.isfinite(losses).all()


def test_what_can_not_be_tested_is_said():
    """Several processes, a range that does not rise and too few steps are refused before anything is computed."""
    with pytest.raises(RecipeError, match="find-lr runs on one process"):
        range_test(small_recipe(), None, None, SimpleNamespace(num_processes=2))
    for wrong in ({"low": 1.0, "high": 1.0}, {"low": 0.0}, {"num_steps": 9}):
        with pytest.raises(RecipeError, match="find-lr needs"):
            range_test(small_recipe(), None, None, Accelerator(cpu=True), **wrong)


def test_the_line_is_read_back():
    """What is to be pasted sets every learning rate to its peak times the factor, to two digits, and nothing else."""
    rows = small_recipe(groups=(Group("head", "fc", lr=1e-2), Group("my-body", "body", lr=3e-3), Group("stem", ".", lr=0)))
    layers = small_recipe(backbone="test_resnet", head=None, groups=LayerDecay(head_lr=2e-3, stem_ratio=0.1), lr_scale=0.5)
    for recipe in (rows, layers):
        flag, value = line_to_paste(recipe, 0.317).split()
        changed = override(recipe, [f"{FLAGS[flag][0]}={value}"])
        assert dataclasses.replace(changed, lr_scale=recipe.lr_scale) == recipe
        net = prepare(recipe)[0]
        before, after = ({group.name: group.lr for group in build_param_groups(one, net)} for one in (recipe, changed))
        assert after == pytest.approx({name: 0.317 * lr for name, lr in before.items()}, rel=0.02)


def test_the_picture_shows_the_suggest_factors(tmp_path, monkeypatch):
    """The file is a picture whose legend has both suggestions, and whose axis holds the valley but not the explosion."""
    shown, save = [], lr_finder.save_figure
    monkeypatch.setattr(lr_finder, "save_figure", lambda figure, axes, file: shown.extend(axes) or save(figure, axes, file))
    losses = [3.0] * 15 + np.linspace(3, 1, 25).tolist() + np.geomspace(1, 1e4, 10).tolist()
    file = plot_range_test(
        tmp_path / "find_lr.png",
        np.geomspace(1e-3, 1e3, 50),
        losses,
        {"steepest": 0.234, "valley": 0.0678},
        {"head": 1e-2, "body": 3e-3},
    )
    assert file == tmp_path / "find_lr.png" and matplotlib.image.imread(file).std() > 0
    legend = {text.get_text() for text in shown[0].get_legend().get_texts()}
    assert {"steepest: 0.23", "valley: 0.068"} <= legend
    bottom, top = shown[0].get_ylim()
    assert bottom < 1 and 3 < top < 10 and shown[0].get_xlabel() == "factor on every group's peak learning rate"
