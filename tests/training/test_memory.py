"""Memory that runs out, and memory that is kept."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finetune.models.batch_norm import set_train_mode
from finetune.recipe import SGD, Data, Group
from finetune.training import loop as train_loop
from finetune.training import memory
from finetune.training.memory import find_micro_batches
from finetune.utils.errors import RecipeError
from helpers import ALL, ROOT, DroppingNet, SmallNet, assert_same_weights, prepare, run_here, small_recipe


class Hungry(SmallNet):
    """Runs out of memory with more than 3 images at once."""

    def forward(self, images):
        if len(images) > 3:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(images)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(tmp_path, capsys, monkeypatch):
    """The batch stays, one line says what is done, and the weights are those of a run with memory enough."""
    recipe = small_recipe(groups=ALL, epochs=2, optimizer=SGD(momentum=0.9), backbone=Hungry)
    monkeypatch.setattr(train_loop, "predict_logits", lambda *args, **options: (torch.zeros(4, 10), torch.zeros(4).long()))
    monkeypatch.setattr(memory, "says_when_full", lambda device: True)  # as if this were a GPU
    net, _ = run_here(recipe, tmp_path / "hungry")
    out = capsys.readouterr().out
    assert out.count("out of memory with 8 images at once: now 4, 2 times a step; the batch stays 8") == 1
    assert out.count("now 2, 4 times a step") == 1
    other, _ = run_here(small_recipe(groups=ALL, epochs=2, optimizer=SGD(momentum=0.9)), tmp_path / "plenty")
    assert_same_weights(net, other.state_dict())


class HungryNorm(SmallNet):
    """Runs out of memory with 2 images; its norm, of single features, can't take statistics of one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.BatchNorm1d(16), self.fc)

    def forward(self, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(images)


@pytest.mark.parametrize("batch_norm,refused", [("train", True), ("frozen", False)])
def test_a_micro_batch_of_one_image_is_refused_where_norms_move(monkeypatch, batch_norm, refused):
    """Memory that only holds one image is no memory for a norm that takes statistics of several."""
    monkeypatch.setattr(memory, "says_when_full", lambda device: True)  # as if this were a GPU
    recipe = small_recipe(backbone=HungryNorm, head="fc.1", batch_norm=batch_norm)
    net, _, _ = prepare(recipe)
    set_train_mode(net, batch_norm)
    with pytest.raises(RecipeError, match="can't do with one") if refused else nullcontext():
        assert find_micro_batches(recipe, net, Accelerator(cpu=True), 1, print) == 8


@pytest.mark.parametrize("accumulate,batch_norm,said", [(1, "train", 0), (2, "train", 1), (2, "frozen", 0), (4, "sync", 1)])
def test_a_run_says_where_norms_see_less_than_the_batch(tmp_path, capsys, accumulate, batch_norm, said):
    """Only where statistics move, and from the first stage on in which they do."""
    rows = (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=1))
    recipe = small_recipe(backbone=DroppingNet, batch_norm=batch_norm, groups=rows, epochs=2)
    run_here(recipe, tmp_path, accumulate=accumulate)
    before, stage, after = capsys.readouterr().out.partition("from epoch 2:")
    words = f"sees {8 // accumulate} of a step's 8 images at a time: another result"
    assert stage and (before.count(words), after.count(words)) == (0, said)


def test_a_try_for_memory_leaves_no_trace(monkeypatch):
    """Trying a micro-batch changes no parameter, gradient or statistic; one image too many is refused."""
    monkeypatch.setattr(memory, "says_when_full", lambda device: True)  # as if this were a GPU
    net, groups, _ = prepare(small_recipe(backbone=DroppingNet, batch_norm="train"))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net.train()
    assert find_micro_batches(small_recipe(), net, Accelerator(cpu=True), 1, print) == 1
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net.forward = lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError())
    with pytest.raises(RecipeError, match="out of memory with 1 images of 24 px"):
        find_micro_batches(small_recipe(), net, Accelerator(cpu=True), 1, print)


def test_the_smallest_and_the_largest_images_are_tried(monkeypatch):
    """Those of the first epoch and of the last with a backward pass, those that are evaluated without."""
    monkeypatch.setattr(memory, "says_when_full", lambda device: True)  # as if this were a GPU
    recipe, tried = small_recipe(data=Data("generated", 32, 8, start_size=8, test_size=40)), []
    net, _, _ = prepare(recipe)
    net.register_forward_pre_hook(lambda net, images: tried.append((images[0].shape[-1], torch.is_grad_enabled())))
    assert find_micro_batches(recipe, net, Accelerator(cpu=True), 1, print) == 1
    assert tried == [(8, True), (32, True), (40, False)]


ALLOCATES = """
import resource, sys, torch
from finetune.recipe.load import load_recipe
from finetune.training.setup import make_accelerator

if sys.argv[1] == "kept":
    make_accelerator(load_recipe("efficientnet_lite0_digits")[0])
for _ in range(10):
    torch.empty(2**24).fill_(1)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about Linux's C library")
def test_freed_memory_is_kept_for_the_next_step():
    """A large tensor made anew takes the memory of the one before it: the system maps none, where otherwise it maps all."""
    faults = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", ALLOCATES, name],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            ).stdout.split()[-1]
        )
        for name in ("kept", "returned")
    }
    assert faults["kept"] < faults["returned"] / 10 and faults["returned"] > 100
