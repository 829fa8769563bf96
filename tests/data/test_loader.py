"""The processes that load images."""

import gc
import os
import signal
import time
from contextlib import suppress

import psutil
import pytest
import torch

from finetune.data.loader import load
from helpers import ALL, prepare, run_here, small_recipe

TIMM = {"backbone": "test_resnet", "head": None, "groups": ALL}


def loader_processes():
    """Their numbers, without those of processes that have ended and of Python's helpers."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE and not any("resource_tracker" in word for word in child.cmdline()):
                found.add(child.pid)
    return found


def test_they_stay_from_epoch_to_epoch_and_go_with_the_images():
    """Three epochs of one set are loaded by the same processes, another set has its own, and none outlives its images."""
    before = loader_processes()
    images, others = (prepare(small_recipe(**TIMM))[2][0] for _ in range(2))
    seen = []
    for epoch in range(3):
        batches = [[epoch, 1], [4], [2, 0]]
        here, there = (list(load(images, epoch, batches, workers)) for workers in (0, 2))
        assert all(torch.equal(one, other) for (one, _), (other, _) in zip(here, there, strict=True))
        seen.append(loader_processes() - before)
    assert len(seen[0]) == 2 and seen == [seen[0]] * 3
    list(load(others, 0, [[0]], 2))
    assert len(loader_processes() - before) == 4
    gc.disable()  # no cycle keeps them
    try:
        del images
        assert len(loader_processes() - before) == 2
        del others
        assert loader_processes() == before
    finally:
        gc.enable()


def test_an_epoch_that_is_left_in_the_middle_leaves_nothing_to_the_next():
    """What was loaded ahead is dropped: the next epoch starts with its own images, from the same processes."""
    images = prepare(small_recipe(**TIMM))[2][0]
    whole = list(load(images, 1, [[i] for i in range(8)], 0))
    left = load(images, 0, [[i] for i in range(8)], 2)
    next(left)
    left.close()
    pids = loader_processes()
    again = list(load(images, 1, [[i] for i in range(8)], 2))
    assert loader_processes() == pids and len(again) == 8
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(whole, again, strict=True))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows sends no signals")
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGHUP", None)])
def test_an_interrupt_leaves_them_to_the_process_that_trains(number):
    """A terminal's Ctrl-C between two epochs reaches them, too; the next epoch is loaded all the same."""
    images = prepare(small_recipe(**TIMM))[2][0]
    before = loader_processes()
    list(load(images, 0, [[0], [1], [2], [3]], 2))  # each of the two has begun
    for pid in (pids := loader_processes() - before):
        os.kill(pid, number)
    time.sleep(0.5)
    ((batch, _),) = load(images, 1, [[0, 1]], 2)
    assert torch.equal(batch, next(load(images, 1, [[0, 1]], 0))[0]) and loader_processes() - before == pids


def test_a_run_leaves_no_process(tmp_path):
    """With loader processes, a run ends with the bits of one without, and then they are gone."""
    before = loader_processes()
    nets = [run_here(small_recipe(**TIMM), tmp_path / str(workers), workers=workers)[0] for workers in (0, 2)]
    gc.collect()
    assert loader_processes() == before
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))
