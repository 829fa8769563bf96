"""Every schedule against torch's own."""

import random

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

from conftest import small_recipe
from finetune.lr_schedule import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Lambda,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    Step,
)
from finetune.recipe import RecipeError

PEAKS = [1e-2, 3e-4, 1e-5]


def optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates_of(scheduler, opt, updates):
    rates = []
    for _ in range(updates):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 2])
def test_cosine_is_torchs_at_every_update(peak, floor, warmup_epochs):
    """Warmup and cosine equal LinearLR followed by CosineAnnealingLR over a whole run."""
    updates, epochs = 10, 6
    warmup = int(warmup_epochs * updates)
    opt = optimizer(peak)
    cosine = CosineAnnealingLR(opt, T_max=updates * epochs - warmup, eta_min=peak * floor)
    theirs = cosine if not warmup else None
    if warmup:
        opt = optimizer(peak)
        theirs = SequentialLR(
            opt,
            [
                LinearLR(opt, start_factor=0.01, total_iters=warmup),
                CosineAnnealingLR(opt, T_max=updates * epochs - warmup, eta_min=peak * floor),
            ],
            [warmup],
        )
    expected = rates_of(theirs, opt, updates * epochs)
    ours = Cosine(warmup_epochs=warmup_epochs, floor=floor)
    assert [peak * ours.scale(step, updates, epochs) for step in range(updates * epochs)] == pytest.approx(
        expected, rel=1e-12, abs=1e-12 * peak
    )


def test_constant_with_warmup_is_torchs_linear_lr():
    """Constant is LinearLR during warmup and the peak after it."""
    opt = optimizer(0.1)
    expected = rates_of(LinearLR(opt, start_factor=0.2, total_iters=15), opt, 40)
    ours = Constant(warmup_epochs=1.5, warmup_start=0.2)
    assert [0.1 * ours.scale(step, 10, 4) for step in range(40)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize(
    "patience,cooldown,factor,min_scale,threshold",
    [(0, 0, 0.5, 0.0, 1e-4), (2, 0, 0.1, 0.0, 1e-4), (1, 2, 0.3, 0.05, 0.02), (0, 3, 0.5, 0.2, 0.1)],
)
def test_plateau_is_torchs_after_every_epoch(mode, threshold_mode, patience, cooldown, factor, min_scale, threshold):
    """Replaying the scores gives the rates of ReduceLROnPlateau, in all its settings, on 20 random histories."""
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
        scores = []
        for epoch in range(30):
            assert 0.1 * ours.scale(epoch * 5, 5, 30, scores) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-12)
            scores.append(rng.choice([0.5, 0.7, rng.random()]))
            theirs.step(scores[-1])
        cuts += opt.param_groups[0]["lr"] < 0.1
    assert cuts == 20  # a test in which nothing is ever cut would prove nothing


def test_plateau_watches_what_its_mode_names():
    """mode "max" reads top-1, "min" the loss."""
    assert [s.watches("top1") for s in (Plateau(), Plateau(mode="min"), Cosine())] == ["top1", "loss", "top1"]


def test_no_update_is_wasted_at_rate_zero():
    """The first and the last update of a cosine run move the weights."""
    schedule = Cosine(warmup_epochs=1)
    assert schedule.scale(0, 10, 5) > 0 and schedule.scale(49, 10, 5) > 0


def test_past_the_end_a_cosine_stays_down():
    """torch's cosine climbs again past its end; ours stays at the floor."""
    assert Cosine(floor=0.1).scale(75, 10, 5) == pytest.approx(0.1)


def test_a_one_cycle_of_few_updates():
    """A rise of a single update is no division by zero: the run starts at its peak."""
    assert [OneCycle(rise=0.25).scale(step, 4, 1) > 0 for step in range(4)] == [True] * 4
    assert OneCycle(rise=0.25).scale(0, 4, 1) == 1.0


UPDATES, EPOCHS = 10, 12  # of the runs below: 120 updates
TORCH = {
    "polynomial": (Polynomial(power=2.0), lambda opt, peak: PolynomialLR(opt, total_iters=120, power=2.0)),
    "linear": (Linear(end=0.2), lambda opt, peak: LinearLR(opt, start_factor=1.0, end_factor=0.2, total_iters=120)),
    "step": (Step(every=5, factor=0.9), lambda opt, peak: StepLR(opt, step_size=50, gamma=0.9)),
    "step of updates": (Step(every=0.3, factor=0.9), lambda opt, peak: StepLR(opt, step_size=3, gamma=0.9)),
    "multistep": (MultiStep(at=(3, 7.5), factor=0.3), lambda opt, peak: MultiStepLR(opt, milestones=[30, 75], gamma=0.3)),
    "exponential": (Exponential(factor=0.8), lambda opt, peak: ExponentialLR(opt, gamma=0.8**0.1)),
    "restarts": (
        CosineRestarts(period=2, stretch=2, floor=0.1),
        lambda opt, peak: CosineAnnealingWarmRestarts(opt, T_0=20, T_mult=2, eta_min=0.1 * peak),
    ),
    "onecycle": (
        OneCycle(rise=0.25, start_div=10, end_div=100),
        lambda opt, peak: OneCycleLR(opt, max_lr=peak, total_steps=120, pct_start=0.25, div_factor=10, final_div_factor=100),
    ),
    "lambda": (Lambda(function=lambda epoch: 0.95**epoch), lambda opt, peak: LambdaLR(opt, lambda step: 0.95 ** (step / 10))),
}


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("name", TORCH)
def test_a_schedule_is_torchs_over_a_whole_run(name, peak):
    """Each schedule gives every update the rate of torch's own scheduler, for fast groups and slow ones."""
    ours, theirs = TORCH[name]
    opt = optimizer(peak)
    expected = rates_of(theirs(opt, peak), opt, UPDATES * EPOCHS)
    rates = [peak * ours.scale(step, UPDATES, EPOCHS) for step in range(UPDATES * EPOCHS)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-12 * peak) and len(set(rates)) > 2


@pytest.mark.parametrize("name", ["step", "multistep", "exponential", "restarts", "lambda"])
def test_warmup_multiplies_what_counts_from_the_start(name):
    """Where epochs count from the run's start, warmup is torch's LinearLR stepped together with the schedule."""
    schedule, theirs = TORCH[name]
    ours = type(schedule)(**{**vars(schedule), "warmup_epochs": 1.5, "warmup_start": 0.1})
    opt, warm = optimizer(0.1), optimizer(1.0)
    plain, ramp = rates_of(theirs(opt, 0.1), opt, 120), rates_of(LinearLR(warm, start_factor=0.1, total_iters=15), warm, 120)
    assert [0.1 * ours.scale(step, UPDATES, EPOCHS) for step in range(120)] == pytest.approx(
        [a * b for a, b in zip(plain, ramp, strict=True)], rel=1e-12
    )


@pytest.mark.parametrize(
    "schedule,fault",
    [
        (Polynomial(power=0.0), "power must be above 0"),
        (Linear(end=1.5), "end is a fraction of the peak"),
        (Step(every=0.0), "every must be above 0"),
        (Step(every=1, factor=1.0), "factor must be above 0 and below 1"),
        (MultiStep(at=(3, 2)), "at must be rising epochs above 0, not (3, 2)"),
        (MultiStep(at=()), "at must be rising epochs"),
        (Exponential(factor=0.0), "factor must be above 0"),
        (CosineRestarts(period=0.0), "period must be above 0"),
        (CosineRestarts(period=1.0, stretch=0), "stretch must be 1 or more"),
        (OneCycle(rise=1.0), "rise must be above 0"),
        (OneCycle(warmup_epochs=1.0), "a OneCycle is its own warmup"),
        (Lambda(function=3), "schedule.function must be a function"),
    ],
)
def test_wrong_schedules_are_named(schedule, fault):
    """A schedule's value out of range is refused with its name."""
    with pytest.raises(RecipeError) as caught:
        small_recipe(schedule=schedule)
    assert fault in str(caught.value)
