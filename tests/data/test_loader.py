"""The processes that load images."""

import gc
from contextlib import suppress

import psutil
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


def test_a_run_leaves_no_process(tmp_path):
    """With loader processes, a run ends with the bits of one without, and then they are gone."""
    before = loader_processes()
    nets = [run_here(small_recipe(**TIMM), tmp_path / str(workers), workers=workers)[0] for workers in (0, 2)]
    gc.collect()
    assert loader_processes() == before
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))
