"""Recipes drawn at random equal a bare loop of torch's own parts, and survive a cut."""

import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

pytest.importorskip("hypothesis")
from hypothesis import given, note, settings
from hypothesis import strategies as st

from finetune.data.batches import Cut as BatchCut
from finetune.data.loader import epoch_batches, load
from finetune.recipe import (
    SGD,
    AdamW,
    Constant,
    Cosine,
    CosineRestarts,
    Data,
    EarlyStop,
    Exponential,
    Group,
    Linear,
    MultiStep,
    OneCycle,
    Optimizer,
    Plateau,
    Step,
)
from helpers import Cut, cut_before, prepare, run_here, same_tensors, small_recipe

# EXAMPLES=500 pytest tests/training/test_properties.py: as many, and others each time.
examples = settings(
    max_examples=int(os.environ.get("EXAMPLES", 12)), derandomize="EXAMPLES" not in os.environ, deadline=None, database=None
)
START = 0.01  # of warmup

SHARES = st.sampled_from([0.0, 0.1, 0.5])
OPTIMIZERS = st.sampled_from(
    [
        SGD(),
        SGD(momentum=0.9, weight_decay=0.1),
        SGD(momentum=0.9, nesterov=True),
        AdamW(weight_decay=0.05),
        AdamW(weight_decay=0.5, amsgrad=True),
        Optimizer("RMSprop", weight_decay=0.01, momentum=0.5),
        Optimizer("Adam", weight_decay=0.01),
    ]
)


@st.composite
def schedules(draw, epochs):
    """Any schedule, with warmup where it takes one."""
    kind = draw(st.sampled_from([Constant, Cosine, Linear, Step, MultiStep, Exponential, CosineRestarts, OneCycle, Plateau]))
    warmup = {} if kind is OneCycle else {"warmup_epochs": draw(st.sampled_from([0.0, 0.5, 1.0][: 2 if epochs == 1 else 3]))}
    factor = draw(st.sampled_from([0.1, 0.9]))
    own = {
        Cosine: {"floor": draw(SHARES)},
        Linear: {"end": draw(SHARES)},
        Step: {"every": draw(st.integers(1, 2)), "factor": factor},
        MultiStep: {"at": draw(st.sampled_from([(1,), (1, 2)])), "factor": factor},
        Exponential: {"factor": factor},
        CosineRestarts: {"period": draw(st.integers(1, 2)), "stretch": draw(st.integers(1, 2)), "floor": draw(SHARES)},
        OneCycle: {"rise": draw(st.sampled_from([0.3, 0.5]))},
        Plateau: {"patience": draw(st.integers(0, 1)), "factor": factor, "mode": draw(st.sampled_from(["max", "min"]))},
    }
    return kind(**own.get(kind, {}), **warmup)


@st.composite
def recipes(draw):
    """A valid recipe of SmallNet, and the micro-batches of a step."""
    epochs = draw(st.integers(1, 3))
    patterns = draw(st.sampled_from([["."], ["fc", "."], ["fc", "body", "stem|norm"], ["stem", "norm|fc", "body"]]))
    starts = [0, *(draw(st.integers(0, epochs - 1)) for _ in patterns[1:])]
    groups = []
    for i, (pattern, start) in enumerate(zip(patterns, starts, strict=True)):
        lr = draw(st.sampled_from([1e-2, 1e-3, 0][: 2 if i == 0 else 3]))
        more = {
            "unfreeze_at": start,
            "weight_decay": draw(st.sampled_from([None, 0.0, 0.2])),
            "warmup_epochs": draw(st.sampled_from([0.0, 0.5])),
            "schedule": draw(st.none() | schedules(epochs)),
        }
        groups.append(Group(f"row{i}", pattern, lr, **more if lr else {}))
    batch_size = draw(st.sampled_from([4, 6, 8, 22]))
    recipe = small_recipe(
        data=Data("generated", 24, batch_size, sampling=draw(st.sampled_from(["all", "balanced"]))),
        groups=tuple(groups),
        optimizer=draw(OPTIMIZERS),
        schedule=draw(schedules(epochs)),
        epochs=epochs,
        lr_scale=draw(st.sampled_from([1.0, 0.3])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        clip_norm=draw(st.sampled_from([None, 0.1, 1.0])),
        clip_value=draw(st.sampled_from([None, 0.05])),
        ema_decay=draw(st.sampled_from([None, 0.9])),
        early_stop=draw(st.sampled_from([None, EarlyStop(patience=1)])),
        seed=draw(st.integers(0, 3)),
    )
    return recipe, draw(st.sampled_from([1, 2]))


def followed(make, steps, metrics=None):
    """The learning rate at each step, as torch's scheduler sets it from a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler, lrs = make(optimizer), []
    for step in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([] if metrics is None else [metrics[step]]))
    return lrs


def torch_factors(schedule, per_epoch, epochs, rows):
    """A schedule's factor at each step, by torch's schedulers; `rows` are the metrics of finished epochs."""
    steps, warmup = per_epoch * epochs, round(schedule.warmup_epochs * per_epoch)
    rest = steps - warmup
    match schedule:
        case Cosine(floor=floor):
            shape = [1.0] * warmup + followed(lambda o: lr_scheduler.CosineAnnealingLR(o, rest, floor), rest)
        case Linear(end=end):
            shape = [1.0] * warmup + followed(lambda o: lr_scheduler.LinearLR(o, 1.0, end, rest), rest)
        case Step(every=every, factor=factor):
            shape = followed(lambda o: lr_scheduler.StepLR(o, every * per_epoch, factor), steps)
        case MultiStep(at=at, factor=factor):
            shape = followed(lambda o: lr_scheduler.MultiStepLR(o, [epoch * per_epoch for epoch in at], factor), steps)
        case Exponential(factor=factor):
            shape = followed(lambda o: lr_scheduler.ExponentialLR(o, factor ** (1 / per_epoch)), steps)
        case CosineRestarts(period=period, stretch=stretch, floor=floor):
            kind = lr_scheduler.CosineAnnealingWarmRestarts
            shape = followed(lambda o: kind(o, period * per_epoch, stretch, floor), steps)
        case OneCycle(rise=rise):
            shape = followed(lambda o: lr_scheduler.OneCycleLR(o, 1.0, steps, pct_start=rise, cycle_momentum=False), steps)
        case Plateau(mode=mode, factor=factor, patience=patience):
            metrics = [row["top1" if mode == "max" else "loss"] for row in rows]
            kind = lr_scheduler.ReduceLROnPlateau
            by_epoch = followed(lambda o: kind(o, mode, factor, patience), len(rows), metrics)
            shape = [factor for factor in by_epoch for _ in range(per_epoch)]
        case Constant():
            shape = [1.0] * steps
    return [one * other for one, other in zip(warmed(warmup, steps), shape, strict=False)]


def warmed(warmup, steps):
    """A linear warmup, by torch."""
    return followed(lambda o: lr_scheduler.LinearLR(o, START, total_iters=warmup), steps) if warmup else [1.0] * steps


def bare_loop(recipe, rows):
    """The network, and the average if there is one, after as many epochs as there are rows of metrics."""
    net, _, (images, _) = prepare(recipe)
    epochs, per_epoch = [row for row in rows if "grad_norm" not in row], recipe.data.steps_per_epoch(len(images))
    named, table, factors = dict(net.named_parameters()), [], []
    for row in recipe.groups:
        own = [named.pop(name) for name in list(named) if re.match(row.pattern, name)]
        decay = recipe.optimizer.weight_decay if row.weight_decay is None else row.weight_decay
        lrs = torch_factors(row.schedule or recipe.schedule, per_epoch, recipe.epochs, epochs)
        start = row.unfreeze_at * per_epoch
        late = [0.0] * start + warmed(round(row.warmup_epochs * per_epoch), recipe.epochs * per_epoch)
        for is_matrix in (True, False):
            part = [parameter for parameter in own if (parameter.ndim > 1) == is_matrix]
            table.append({"params": part, "weight_decay": decay if is_matrix else 0.0})
            factors.append([row.lr * recipe.lr_scale * one * other for one, other in zip(lrs, late, strict=False)])
    optimizer = getattr(torch.optim, recipe.optimizer.name)(table, lr=1.0, **recipe.optimizer.options)
    ema = ModelEmaV3(net, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    for epoch in range(len(epochs)):
        for plan in epoch_batches(recipe, images, epoch, BatchCut()):
            for group, lrs in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = lrs[plan.step]
                for parameter in group["params"]:
                    parameter.requires_grad_(lrs[plan.step] > 0)
            ((batch, labels),) = load(images, epoch, plan.micro_batches, 0)
            optimizer.zero_grad()
            cross_entropy(net(batch), labels, label_smoothing=recipe.label_smoothing).backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
            if recipe.clip_value:
                torch.nn.utils.clip_grad_value_(net.parameters(), recipe.clip_value)
            optimizer.step()
            if ema:
                ema.update(net, plan.step + 1)
    return ema.module if ema else net


@examples
@given(recipes())
def test_a_recipe_equals_a_bare_loop(drawn):
    """Groups, stages, schedules, sampling, accumulation, clipping, decay and averages together give a bare loop's weights."""
    recipe, accumulate = drawn
    note(f"{recipe}, accumulate={accumulate}")
    with tempfile.TemporaryDirectory() as folder:
        net, rows = run_here(recipe, Path(folder) / "run", accumulate=accumulate)
    reference = bare_loop(recipe, rows).state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@examples
@given(recipes(), st.integers(0, 10**6))
def test_a_recipe_survives_a_cut(drawn, where):
    """Cut before any step and resumed, it ends with the weights and the metrics of an unbroken run, to the bit."""
    recipe, accumulate = drawn
    note(f"{recipe}, accumulate={accumulate}")
    options = {"accumulate": accumulate, "checkpoint_every": 2}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        net, rows = run_here(recipe, Path(folder) / "whole", **options)
        steps = sum("grad_norm" in row for row in rows)
        cut_before(patched, "train_step", 1 + where % steps)
        with pytest.raises(Cut):
            run_here(recipe, Path(folder) / "cut", **options)
        resumed, same_rows = run_here(recipe, Path(folder) / "cut", **options)
    assert rows == same_rows and same_tensors(net.state_dict(), resumed.state_dict())
