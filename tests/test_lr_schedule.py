"""Every schedule against torch's own."""

import random

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR

from finetune.lr_schedule import Constant, Cosine, Plateau

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
        theirs = SequentialLR(opt, [LinearLR(opt, start_factor=0.01, total_iters=warmup),
                                    CosineAnnealingLR(opt, T_max=updates * epochs - warmup, eta_min=peak * floor)], [warmup])
    expected = rates_of(theirs, opt, updates * epochs)
    ours = Cosine(warmup_epochs=warmup_epochs, floor=floor)
    assert [peak * ours.scale(step, updates, epochs) for step in range(updates * epochs)] == pytest.approx(expected, rel=1e-12,
                                                                                                            abs=1e-12 * peak)


def test_constant_with_warmup_is_torchs_linear_lr():
    """Constant is LinearLR during warmup and the peak after it."""
    opt = optimizer(0.1)
    expected = rates_of(LinearLR(opt, start_factor=0.2, total_iters=15), opt, 40)
    ours = Constant(warmup_epochs=1.5, warmup_start=0.2)
    assert [0.1 * ours.scale(step, 10, 4) for step in range(40)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("patience,cooldown,factor,min_scale,threshold", [
    (0, 0, 0.5, 0.0, 1e-4), (2, 0, 0.1, 0.0, 1e-4), (1, 2, 0.3, 0.05, 0.02), (0, 3, 0.5, 0.2, 0.1)])
def test_plateau_is_torchs_after_every_epoch(mode, threshold_mode, patience, cooldown, factor, min_scale, threshold):
    """Replaying the scores gives the rates of ReduceLROnPlateau, in all its settings, on 20 random histories."""
    cuts = 0
    for seed in range(20):
        rng = random.Random(seed)
        opt = optimizer(0.1)
        theirs = ReduceLROnPlateau(opt, mode=mode, factor=factor, patience=patience, threshold=threshold, eps=0.0,
                                   threshold_mode=threshold_mode, cooldown=cooldown, min_lr=0.1 * min_scale)
        ours = Plateau(mode=mode, factor=factor, patience=patience, threshold=threshold, threshold_mode=threshold_mode,
                       cooldown=cooldown, min_scale=min_scale)
        scores = []
        for epoch in range(30):
            assert 0.1 * ours.scale(epoch * 5, 5, 30, scores) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-12)
            scores.append(rng.choice([0.5, 0.7, rng.random()]))
            theirs.step(scores[-1])
        cuts += opt.param_groups[0]["lr"] < 0.1
    assert cuts == 20  # a test in which nothing is ever cut would prove nothing


def test_plateau_watches_what_its_mode_names():
    """mode "max" reads top-1, "min" the loss."""
    assert (Plateau().monitor, Plateau(mode="min").monitor, Cosine().monitor) == ("top1", "loss", "top1")


def test_no_update_is_wasted_at_rate_zero():
    """The first and the last update of a cosine run move the weights."""
    schedule = Cosine(warmup_epochs=1)
    assert schedule.scale(0, 10, 5) > 0 and schedule.scale(49, 10, 5) > 0


def test_past_the_end_a_cosine_stays_down():
    """torch's cosine climbs again past its end; ours stays at the floor."""
    assert Cosine(floor=0.1).scale(75, 10, 5) == pytest.approx(0.1)
