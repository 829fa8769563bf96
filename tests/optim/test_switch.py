"""A switch of optimizers in mid-run: the groups, and the optimizer that holds both."""

import copy
from dataclasses import replace

import pytest
import torch

from finetune.models.backbone import meta_backbone
from finetune.optim.optimizers import SwitchedOptimizer, build_optimizer, just_switched, needs_closure, start_epoch
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, Constant, Group, LayerDecay, Optimizer, Switch
from helpers import SmallNet, prepare, same_tensors, small_recipe


def test_a_switch_reaches_the_groups():
    """From the switch on rows have its optimizer and lrs times its factor; a row with an optimizer of its own keeps both."""
    own, later = SGD(weight_decay=0.3), SGD(momentum=0.9, weight_decay=0.2)
    rows = (
        Group("own", "fc", lr=1e-2, optimizer=own),
        Group("decay", "body", lr=3e-3, weight_decay=0.1, unfreeze_at=2),
        Group("plain", "norm", lr=1e-3),
        Group("rest", ".", lr=0),
    )
    changes = {"schedule": Constant(), "lr_scale": 0.5}
    recipe = small_recipe(groups=rows, switch=Switch(at=2, optimizer=later, lr_factor=10.0), **changes)
    groups = build_param_groups(recipe, SmallNet())
    assert [[group.lr_at(step, 5, 4) for group in groups] for step in (0, 9, 10, 19)] == [
        pytest.approx(lrs, rel=1e-12) for lrs in 2 * [[5e-3, 0.0, 5e-4, 0.0]] + 2 * [[5e-3, 1.5e-2, 5e-3, 0.0]]
    ]
    assert [group.optimizer for group in groups] == [own, *[recipe.optimizer] * 3]
    assert [group.after_switch.optimizer for group in groups] == [own, *[later] * 3]
    assert [group.weight_decay for group in groups] == [0.3, 0.1, 0.05, 0.05]
    assert [group.after_switch.weight_decay for group in groups] == [0.3, 0.1, 0.2, 0.2]
    layers = small_recipe(backbone="resnet18", head=None, groups=LayerDecay(head_lr=1e-2, stem_ratio=0.1, unfreeze_at=1))
    net = meta_backbone(layers)
    for group in build_param_groups(replace(layers, switch=Switch(at=1, optimizer=later, lr_factor=10.0)), net):
        assert group.after_switch.lr == pytest.approx(10 * group.lr) and group.after_switch.optimizer == later


def switched(**changes):
    """(network, optimizer) of a recipe that goes over from AdamW to SGD in epoch 1."""
    switch = Switch(at=1, optimizer=SGD(momentum=0.9), lr_factor=10.0)
    net, groups, _ = prepare(small_recipe(**{"switch": switch, **changes}))
    return net, build_optimizer(groups)


def take_step(net, optimizer, seed):
    """One step of the optimizer, by a gradient that the seed decides."""
    torch.manual_seed(seed)
    net.zero_grad()
    net(torch.randn(4, 3, 24, 24)).square().sum().backward()
    optimizer.step()


def test_the_first_optimizers_state_is_not_carried_over():
    """Up to the switch the state is Adam's of every parameter; from it on it is empty, then SGD's; there are no other rows."""
    net, optimizer = switched()
    assert isinstance(optimizer, SwitchedOptimizer) and isinstance(optimizer.current, torch.optim.AdamW)
    take_step(net, optimizer, 0)
    assert {frozenset(state) for state in optimizer.state.values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}
    adam = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    start_epoch(optimizer, 1)
    assert isinstance(optimizer.current, torch.optim.SGD) and not optimizer.state and not optimizer.state_dict()["state"]
    take_step(net, optimizer, 1)
    assert {frozenset(state) for state in optimizer.state.values()} == {frozenset({"momentum_buffer"})}
    assert not adam & {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    assert {row["name"] for row in optimizer.param_groups} == {"head", "body", "stem"}
    assert sum(len(row["params"]) for row in optimizer.param_groups) == 8 and "betas" not in optimizer.param_groups[0]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_switched_optimizer_is_saved_and_loaded(epoch, several):
    """In either epoch state_dict is that of the optimizer that steps; loaded into a new one, both go on to the same bits."""
    head = Group("head", "fc", lr=1e-2, **({"optimizer": Optimizer("RMSprop")} if several else {}))
    rows = {"groups": (head, Group("rest", ".", lr=1e-3, unfreeze_at=1))}
    (net, optimizer), (other, loaded) = switched(**rows), switched(**rows)
    start_epoch(optimizer, epoch)
    take_step(net, optimizer, 0)
    other.load_state_dict(net.state_dict())
    start_epoch(loaded, epoch)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes tensors as they are
    assert set(loaded.state_dict()["state"]) == set(range(8)) and loaded.state is loaded.current.state
    for network, one in ((net, optimizer), (other, loaded)):
        for row in one.param_groups:
            row["lr"] *= 0.5  # as the schedule writes it
        take_step(network, one, 1)
    assert same_tensors(net.state_dict(), other.state_dict())


def test_an_optimizer_has_just_switched_in_one_epoch_only():
    """just_switched holds in the epoch of the switch, and never without one; a closure is asked for by who steps now."""
    _, optimizer = switched()
    assert [just_switched(optimizer, epoch) for epoch in range(4)] == [False, True, False, False]
    plain = build_optimizer(build_param_groups(small_recipe(), SmallNet()))
    start_epoch(plain, 1)
    assert not any(just_switched(plain, epoch) for epoch in range(4))
    rows = (
        Group("head", "fc", lr=1e-2),
        Group("body", "body", lr=1e-2, unfreeze_at=1, optimizer=SGD()),
        Group("rest", ".", lr=0),
    )
    _, later = switched(groups=rows, switch=Switch(at=1, optimizer=Optimizer("LBFGS")))
    closures = []
    for epoch in (0, 1, 0):
        start_epoch(later, epoch)
        closures.append(needs_closure(later))
    assert closures == [False, True, False]
