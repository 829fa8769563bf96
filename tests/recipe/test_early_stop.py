"""When a run stops early."""

import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from finetune.recipe import EarlyStop


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_early_stop_waits_for_its_patience(patience, mode):
    """It stops once `patience` epochs have followed the best one, and a gain no larger than the threshold is none."""
    rows = [{"top1": metric, "loss": 1.0 - metric} for metric in (0.5, 0.7, 0.74, 0.72, 0.74, 0.6, 0.6)]
    stop = EarlyStop(patience=patience, mode=mode, threshold=0.05)
    assert [stop.should_stop(rows[:epoch], "top1") for epoch in range(8)] == [epoch >= 2 + patience for epoch in range(8)]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stop_counts_as_torchs_plateau_does(mode):
    """On random histories it stops in the epoch in which torch's ReduceLROnPlateau with that patience would cut."""
    stops = set()
    for seed in range(50):
        rng, stop = random.Random(seed), EarlyStop(patience=1 + seed % 3, mode=mode, threshold=0.1 * (seed % 2))
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        theirs = ReduceLROnPlateau(optimizer, mode, 0.5, stop.patience - 1, stop.threshold, threshold_mode="abs")
        history = []
        while not stop.should_stop(history, "top1"):
            assert optimizer.param_groups[0]["lr"] == 1.0
            history.append({"top1": rng.random(), "loss": rng.random()})
            theirs.step(history[-1]["top1" if mode == "max" else "loss"])
        assert optimizer.param_groups[0]["lr"] == 0.5
        stops.add(len(history))
    assert len(stops) > 3
