"""Frozen means still: no gradient, no decay, no momentum, no statistics, bit for bit."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import prepare, run_here, small_recipe
from finetune import train_loop
from finetune.recipe import SGD, AdamW, Group, RecipeError
from finetune.unfreeze import begins_stage, synchronise_norms, train_mode, unfreeze

ROWS = (
    Group("head", "fc", lr=1e-2),
    Group("late", r"layer[34]", lr=1e-2, unfreeze_at=1),
    Group("early", r"conv1|bn1|layer[12]", lr=1e-2, unfreeze_at=2),
)


def residual_recipe(**changes):
    """timm's smallest ResNet, which has batch norm, with random weights."""
    return small_recipe(**{"backbone": "test_resnet", "head": None, "groups": ROWS, **changes})


@pytest.mark.parametrize("norm_stats", ["train", "eval"])
@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.5), SGD(momentum=0.9, weight_decay=0.5)], ids=["AdamW", "SGD"])
def test_frozen_groups_keep_every_bit(tmp_path, monkeypatch, optimizer, norm_stats):
    """Through training and evaluation, tensors of frozen groups keep every bit, and each group moves once it trains."""
    recipe = residual_recipe(epochs=3, optimizer=optimizer, norm_stats=norm_stats)
    states = [{n: t.clone() for n, t in prepare(recipe)[0].state_dict().items()}]
    monkeypatch.setattr(
        train_loop,
        "save_checkpoint",
        lambda record, net, *rest: states.append({n: t.clone() for n, t in net.state_dict().items()}),
    )
    run_here(recipe, tmp_path)

    for epoch, trained in enumerate(["fc", "fc|layer[34]", "."]):
        moved = {n for n, t in states[epoch + 1].items() if not torch.equal(t, states[epoch][n])}
        allowed = {n for n in states[0] if re.match(trained, n)}
        statistics = {n for n in allowed if "running" in n or "num_batches" in n}
        assert moved <= allowed - (statistics if norm_stats == "eval" else set())
        assert moved >= {n for n in allowed if n.endswith(("conv1.weight", "fc.weight"))}
        assert moved >= statistics or norm_stats == "eval"


def test_refrozen_parameters_lose_their_gradient():
    """A gradient left from before would be applied, with momentum and decay, after freezing."""
    net, groups, _ = prepare(small_recipe())
    unfreeze(groups, 3)
    net(torch.randn(4, 3, 24, 24)).sum().backward()
    assert net.stem.weight.grad is not None
    assert unfreeze(groups, 0) == [net.fc.weight, net.fc.bias]
    assert net.stem.weight.grad is None and not net.stem.weight.requires_grad


def test_a_frozen_backbone_runs_no_backward_pass():
    """In the head's own stage nothing before the head is on the autograd tape."""
    net, groups, _ = prepare(residual_recipe())
    unfreeze(groups, 0)
    train_mode(net, "eval")
    seen = []
    net.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    unfreeze(groups, 1)
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    assert seen == [False, True]
    assert net.layer2[0].conv1.weight.grad is None and net.layer3[0].conv1.weight.grad is not None


def test_stages_begin_where_the_table_says():
    """A stage begins at each epoch in which some group unfreezes, and at no other."""
    _, groups, _ = prepare(small_recipe())
    assert [begins_stage(groups, epoch) for epoch in range(4)] == [True, True, True, False]


def test_a_norm_without_parameters_follows_what_surrounds_it():
    """Batch norm without affine parameters is frozen with the layer around it."""
    net = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), "b": nn.Conv2d(4, 4, 1)})
    net["a"].requires_grad_(False)
    train_mode(net, "train")
    assert not net["a"][1].training
    net["a"].requires_grad_(True)
    train_mode(net, "train")
    assert net["a"][1].training


def test_synchronised_norms_keep_their_parameters(monkeypatch):
    """norm_stats="sync" swaps norms once, keeping parameters and names; on CPUs it is refused, on one process it is "train"."""
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    net, _, _ = prepare(residual_recipe(norm_stats="sync"))
    before = dict(net.named_parameters())
    kinds = {type(module).__name__ for module in synchronise_norms(net, "sync", accelerator).modules()}
    assert "SyncBatchNorm" in " ".join(kinds) and "BatchNorm2d" not in kinds
    assert all(parameter is before[name] for name, parameter in net.named_parameters()) and len(before) > 20
    for changed in ({"num_processes": 1}, {"num_processes": 1, "device": torch.device("cpu")}):
        assert synchronise_norms(net, "sync", SimpleNamespace(**{**vars(accelerator), **changed})) is net
    with pytest.raises(RecipeError, match="needs GPUs"):
        synchronise_norms(net, "sync", SimpleNamespace(num_processes=2, device=torch.device("cpu")))


def test_no_module_is_swapped():
    """Freezing leaves every module object in its place (timm's own freeze replaces batch norms and orphans parameters)."""
    net, groups, _ = prepare(residual_recipe())
    before = {name: id(module) for name, module in net.named_modules()}
    for epoch in (0, 1, 2, 0):
        unfreeze(groups, epoch)
        train_mode(net, "train")
    assert before == {name: id(module) for name, module in net.named_modules()}
