"""Every schedule against torch's own."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from finetune.recipe import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Lambda,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Step,
)
from finetune.utils.errors import RecipeError
from helpers import small_recipe

PEAKS = [1e-2, 3e-4, 1e-5]


def optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def lrs_of(scheduler, opt, steps):
    lrs = []
    for _ in range(steps):
        lrs.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 2])
def test_cosine_is_torchs_at_every_step(peak, floor, warmup_epochs):
    """Warmup and cosine equal LinearLR followed by CosineAnnealingLR over a whole run."""
    steps, epochs = 10, 6
    warmup = int(warmup_epochs * steps)
    opt = optimizer(peak)
    cosine = CosineAnnealingLR(opt, T_max=steps * epochs - warmup, eta_min=peak * floor)
    theirs = cosine if not warmup else None
    if warmup:
        opt = optimizer(peak)
        theirs = SequentialLR(
            opt,
            [
                LinearLR(opt, start_factor=0.01, total_iters=warmup),
                CosineAnnealingLR(opt, T_max=steps * epochs - warmup, eta_min=peak * floor),
            ],
            [warmup],
        )
    expected = lrs_of(theirs, opt, steps * epochs)
    ours = Cosine(warmup_epochs=warmup_epochs, floor=floor)
    assert [peak * ours.scale(step, steps, epochs) for step in range(steps * epochs)] == pytest.approx(
        expected, rel=1e-12, abs=1e-12 * peak
    )


@pytest.mark.parametrize("warmup_epochs,total", [(1.5, 15), (1.27, 13), (0.03, 0)])
def test_constant_with_warmup_is_torchs_linear_lr(warmup_epochs, total):
    """Constant is LinearLR during warmup, of the nearest whole number of steps, and the peak after it."""
    opt = optimizer(0.1)
    expected = lrs_of(LinearLR(opt, start_factor=0.2, total_iters=total), opt, 40) if total else [0.1] * 40
    ours = Constant(warmup_epochs=warmup_epochs, warmup_start=0.2)
    assert [0.1 * ours.scale(step, 10, 4) for step in range(40)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize(
    "patience,cooldown,factor,min_scale,threshold",
    [
        (0, 0, 0.5, 0.0, 1e-4),
        (2, 0, 0.1, 0.0, 1e-4),
        (1, 2, 0.3, 0.05, 0.02),
        (0, 3, 0.5, 0.2, 0.1),
        (1, 0, 0.5, 0.0, 0.0),
        (1, 1, 0.5, 0.0, 1.0),
    ],
)
def test_plateau_is_torchs_after_every_epoch(mode, threshold_mode, patience, cooldown, factor, min_scale, threshold):
    """Replaying the metrics gives the lrs of ReduceLROnPlateau, in all its settings, on 20 random histories."""
    cuts = 0
    for seed in range(20):
        rng = random.Random(seed)
        opt = optimizer(0.1)
        theirs = ReduceLROnPlateau(
            opt,
            mode=mode,
            factor=factor,
            patience=patience,
            threshold=threshold,
            eps=0.0,
            threshold_mode=threshold_mode,
            cooldown=cooldown,
            min_lr=0.1 * min_scale,
        )
        ours = Plateau(
            mode=mode,
            factor=factor,
            patience=patience,
            threshold=threshold,
            threshold_mode=threshold_mode,
            cooldown=cooldown,
            min_scale=min_scale,
        )
        metrics = []
        for epoch in range(30):
            assert 0.1 * ours.scale(epoch * 5, 5, 30, metrics) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-12)
            metrics.append(rng.choice([0.5, 0.7, rng.random()]))
            theirs.step(metrics[-1])
        cuts += opt.param_groups[0]["lr"] < 0.1
    assert cuts == 20  # a test in which nothing is ever cut would prove nothing


def test_plateau_by_default_is_torchs_but_for_its_patience():
    """Left open, factor, threshold, cooldown and lowest learning rate are ReduceLROnPlateau's; patience is 2."""
    opt, metrics = optimizer(0.1), [0.5, 0.50004, 0.50001, 0.4, *[0.3] * 12]
    theirs = ReduceLROnPlateau(opt, mode="max", patience=2)
    for epoch, score in enumerate(metrics):
        assert 0.1 * Plateau().scale(epoch, 1, 30, metrics[:epoch]) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-9)
        theirs.step(score)
    assert opt.param_groups[0]["lr"] < 1e-5


def test_plateau_watches_what_its_mode_names():
    """mode "max" reads top-1, "min" the loss."""
    assert [s.watched_metric("top1") for s in (Plateau(), Plateau(mode="min"), Cosine())] == ["top1", "loss", "top1"]


def test_no_step_is_wasted_at_lr_zero():
    """The first and the last step of a cosine run move the weights."""
    schedule = Cosine(warmup_epochs=1)
    assert schedule.scale(0, 10, 5) > 0 and schedule.scale(49, 10, 5) > 0


@pytest.mark.parametrize("schedule,end", [(Cosine(floor=0.1), 0.1), (Linear(end=0.2), 0.2), (OneCycle(end_div=10), 0.004)])
def test_past_the_end_a_learning_rate_stays_down(schedule, end):
    """torch's cosine climbs again past its end; ours stays where it ended."""
    assert [schedule.scale(step, 10, 5) for step in (50, 75)] == pytest.approx([end, end])


@pytest.mark.parametrize("schedule", [Cosine(warmup_epochs=3.9), Linear(warmup_epochs=3.9)])
def test_a_warmup_of_all_steps(schedule):
    """A warmup that rounding makes as long as the run is LinearLR over the whole run, and no division by zero."""
    opt = optimizer(1.0)
    expected = lrs_of(LinearLR(opt, start_factor=0.01, total_iters=4), opt, 4)
    assert [schedule.scale(step, 1, 4) for step in range(4)] == pytest.approx(expected, rel=1e-12)


def test_a_one_cycle_of_few_steps():
    """A rise of a single step is no division by zero: the run starts at its peak."""
    assert [OneCycle(rise=0.25).scale(step, 4, 1) > 0 for step in range(4)] == [True] * 4
    assert OneCycle(rise=0.25).scale(0, 4, 1) == 1.0
    for steps in (1, 2, 3):
        opt = optimizer(1.0)
        theirs = lrs_of(OneCycleLR(opt, max_lr=1.0, total_steps=steps), opt, steps)
        assert [OneCycle().scale(step, steps, 1) for step in range(steps)] == pytest.approx(theirs, rel=1e-9)


STEPS, EPOCHS = 10, 12  # of the runs below: 120 steps
TORCH = {
    "linear": (Linear(end=0.2), lambda opt, peak: LinearLR(opt, start_factor=1.0, end_factor=0.2, total_iters=120)),
    "step": (Step(every=5, factor=0.9), lambda opt, peak: StepLR(opt, step_size=50, gamma=0.9)),
    "step of few steps": (Step(every=0.3, factor=0.9), lambda opt, peak: StepLR(opt, step_size=3, gamma=0.9)),
    "multistep of products": (
        MultiStep(at=tuple(0.1 * k for k in (3, 6, 7))),  # a little above 3, 6 and 7 tenths
        lambda opt, peak: MultiStepLR(opt, milestones=[3, 6, 7]),
    ),
    "multistep": (MultiStep(at=(3, 7.5), factor=0.3), lambda opt, peak: MultiStepLR(opt, milestones=[30, 75], gamma=0.3)),
    "exponential": (Exponential(factor=0.8), lambda opt, peak: ExponentialLR(opt, gamma=0.8**0.1)),
    "restarts": (
        CosineRestarts(period=2, stretch=2, floor=0.1),
        lambda opt, peak: CosineAnnealingWarmRestarts(opt, T_0=20, T_mult=2, eta_min=0.1 * peak),
    ),
    "restarts of steps": (CosineRestarts(period=0.3), lambda opt, peak: CosineAnnealingWarmRestarts(opt, T_0=3)),
    "onecycle": (
        OneCycle(rise=0.25, start_div=10, end_div=100),
        lambda opt, peak: OneCycleLR(opt, max_lr=peak, total_steps=120, pct_start=0.25, div_factor=10, final_div_factor=100),
    ),
    "linear's defaults": (Linear(), lambda opt, peak: PolynomialLR(opt, total_iters=120, power=1.0)),
    "step's defaults": (Step(every=5), lambda opt, peak: StepLR(opt, step_size=50)),
    "cosine's defaults": (Cosine(), lambda opt, peak: CosineAnnealingLR(opt, T_max=120)),
    "restarts' defaults": (CosineRestarts(period=2), lambda opt, peak: CosineAnnealingWarmRestarts(opt, T_0=20)),
    "onecycle's defaults": (OneCycle(), lambda opt, peak: OneCycleLR(opt, max_lr=peak, total_steps=120)),
    "lambda": (Lambda(function=lambda epoch: 0.95**epoch), lambda opt, peak: LambdaLR(opt, lambda step: 0.95 ** (step / 10))),
}


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("name", TORCH)
def test_a_schedule_is_torchs_over_a_whole_run(name, peak):
    """Each schedule gives every step the learning rate of torch's own scheduler, for fast groups and slow ones."""
    ours, theirs = TORCH[name]
    opt = optimizer(peak)
    expected = lrs_of(theirs(opt, peak), opt, STEPS * EPOCHS)
    lrs = [peak * ours.scale(step, STEPS, EPOCHS) for step in range(STEPS * EPOCHS)]
    assert lrs == pytest.approx(expected, rel=1e-12, abs=1e-12 * peak) and len(set(lrs)) > 2


@pytest.mark.parametrize("name", ["step", "multistep", "exponential", "restarts", "lambda"])
def test_warmup_multiplies_what_counts_from_the_start(name):
    """Where epochs count from the run's start, warmup is torch's LinearLR stepped together with the schedule."""
    schedule, theirs = TORCH[name]
    ours = replace(schedule, warmup_epochs=1.5, warmup_start=0.1)
    opt, warm = optimizer(0.1), optimizer(1.0)
    plain, ramp = lrs_of(theirs(opt, 0.1), opt, 120), lrs_of(LinearLR(warm, start_factor=0.1, total_iters=15), warm, 120)
    assert [0.1 * ours.scale(step, STEPS, EPOCHS) for step in range(120)] == pytest.approx(
        [a * b for a, b in zip(plain, ramp, strict=True)], rel=1e-12
    )


FACTORS = ("above 0 and below 1", [0.01, 0.99], [0.0, 1.0])
SHARE = "a share of the peak, "
RANGES = [
    (Constant(), "warmup_epochs", "0 or more", [0, 3.9], [-0.1]),
    (Constant(), "warmup_start", "above 0 and at most 1", [0.001, 1.0], [0.0, 1.1]),
    (Cosine(), "floor", f"{SHARE}at least 0 and below 1", [0.0, 0.99], [-0.1, 1.0]),
    (Linear(), "end", f"{SHARE}from 0 to 1", [0.0, 1.0], [-0.1, 1.1]),
    (Step(every=1), "every", "above 0", [0.1], [0.0]),
    (Step(every=1), "every", "finite and above 0", [], [math.inf]),
    (Step(every=1), "factor", *FACTORS),
    (MultiStep(at=(1,)), "at", "above 0", [(0.1,), (1, 2.5)], [(0, 1)]),
    (MultiStep(at=(1,)), "factor", *FACTORS),
    (Exponential(factor=0.9), "factor", *FACTORS),
    (CosineRestarts(period=1), "period", "above 0", [0.1], [0.0]),
    (CosineRestarts(period=1), "stretch", "1 or more", [1, 2], [0]),
    (CosineRestarts(period=1), "floor", f"{SHARE}at least 0 and below 1", [0.0, 0.99], [-0.1, 1.0]),
    (OneCycle(), "rise", "above 0 and below 1", [0.01, 0.99], [0.0, 1.0]),
    (OneCycle(), "start_div", "1 or more", [1, math.inf], [0.9]),
    (OneCycle(), "end_div", "1 or more", [1, math.inf], [0.9]),
    (Plateau(), "factor", *FACTORS),
    (Plateau(), "patience", "0 or more", [0, 1], [-1]),
    (Plateau(), "threshold", "0 or more", [0.0, 2.0], [-0.1]),
    (Plateau(), "cooldown", "0 or more", [0, 1], [-1]),
    (Plateau(), "min_scale", f"{SHARE}at least 0 and below 1", [0.0, 0.99], [-0.1, 1.0]),
    (Plateau(), "mode", "'max' or 'min'", ["max", "min"], ["best"]),
    (Plateau(), "threshold_mode", "'rel' or 'abs'", ["rel", "abs"], ["relative"]),
    (Lambda(function=abs), "function", "a function", [max], [3]),
]


def fault_of(schedule, field, value):
    """What a recipe says of the schedule with this value."""
    with pytest.raises(RecipeError) as caught:
        small_recipe(schedule=replace(schedule, **{field: value}))
    return str(caught.value).removeprefix("this recipe is not valid:\n  ")


@pytest.mark.parametrize("schedule,field,sentence,right,wrong", RANGES)
def test_wrong_schedules_are_named(schedule, field, sentence, right, wrong):
    """Values up to the ends of a field's range are taken, each value beyond them gets one sentence."""
    for value in right:
        small_recipe(schedule=replace(schedule, **{field: value}))
    for value in wrong:
        assert fault_of(schedule, field, value) == f"schedule.{field} must be {sentence}, not {value!r}"


@pytest.mark.parametrize("at", [(), (3, 2), (1, 1)])
def test_multistep_wants_rising_epochs(at):
    """No epochs, falling ones and two that are equal are refused."""
    assert fault_of(MultiStep(at=(1,)), "at", at) == f"schedule: at must be rising epochs above 0, not {at}"


@pytest.mark.parametrize("epochs", [1.0, 0.5])
def test_a_one_cycle_takes_no_warmup(epochs):
    """OneCycle rises by itself, so a warmup is refused."""
    assert fault_of(OneCycle(), "warmup_epochs", epochs) == "schedule: a OneCycle is its own warmup: leave out warmup_epochs"
