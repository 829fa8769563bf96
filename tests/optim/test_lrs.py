"""The learning rate of each group at each step."""

from dataclasses import replace

import pytest
import torch

from finetune.models.backbone import meta_backbone
from finetune.optim.freezing import start_stage
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups, set_lrs
from finetune.recipe import SGD, Constant, Group, LayerDecay, Plateau, Step, Switch
from helpers import ALL, SmallNet, small_recipe


@pytest.mark.parametrize("mode,cut", [("max", "macro_f1"), ("min", "loss")])
def test_a_plateau_sees_the_metric_it_watches(mode, cut):
    """Of an epoch's metrics a schedule gets the one it watches, and a warmup that starts late multiplies what it says."""
    rows = (*ALL, Group("late", "fc", lr=1.0, unfreeze_at=2, warmup_epochs=0.5))
    schedule = Plateau(mode=mode, patience=0, factor=0.1)
    groups = build_param_groups(small_recipe(groups=rows[::-1], schedule=schedule, metric="macro_f1"), SmallNet())
    better = {"macro_f1": [0.1, 0.2], "loss": [0.2, 0.1]}
    history = [{"top1": 0.5, "macro_f1": 0.5, "loss": 0.5, cut: value} for value in better[cut][::-1]]
    optimizer = build_optimizer(groups)
    assert set_lrs(optimizer, groups, 20, 10, 4, history) == pytest.approx({"late": 1e-3, "all": 1e-3})
    assert set_lrs(optimizer, groups, 25, 10, 4, history) == pytest.approx({"late": 1e-1, "all": 1e-3})


@pytest.mark.parametrize("groups", [None, LayerDecay(head_lr=1e-2, stem_ratio=0.1, unfreeze_at=1)], ids=["rows", "LayerDecay"])
def test_lr_scale_multiplies_every_learning_rate(groups):
    """At every step lr_scale gives torch's optimizer the lrs of a recipe whose own are multiplied, after a switch too."""
    recipe = small_recipe(
        backbone="test_resnet",
        head=None,
        groups=groups or (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=1, warmup_epochs=0.5)),
        switch=Switch(at=1, optimizer=SGD(momentum=0.9), lr_factor=10.0),
    )
    if groups:
        multiplied = replace(recipe, groups=replace(groups, head_lr=groups.head_lr * 0.3))
    else:
        multiplied = replace(recipe, groups=tuple(replace(row, lr=row.lr * 0.3) for row in recipe.groups))
    net, found = meta_backbone(recipe), []
    for one in (replace(recipe, lr_scale=0.3), multiplied):
        own = build_param_groups(one, net)
        optimizer = build_optimizer(own)
        for epoch in range(4):
            start_stage(own, optimizer, epoch)
            for step in range(5 * epoch, 5 * epoch + 5):
                set_lrs(optimizer, own, step, 5, 4, ())
                found.append([row["lr"] for row in optimizer.param_groups])
    assert found[:20] == [pytest.approx(lrs, rel=1e-12) for lrs in found[20:]] and found[2][0] > 0


def test_a_groups_own_schedule_and_warmup_are_torchs():
    """Every 5 epochs times 0.9 is torch's StepLR; warmup from the unfreezing on is torch's LinearLR started at that epoch."""
    recipe = small_recipe(
        epochs=20,
        schedule=Constant(),
        groups=(
            Group("head", "fc", lr=1e-2, schedule=Step(every=5, factor=0.9)),
            Group("late", "body", lr=1e-3, unfreeze_at=4, warmup_epochs=1.5),
            Group("rest", ".", lr=0),
        ),
    )
    head, late, rest = build_param_groups(recipe, SmallNet())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5 * 6, gamma=0.9)
    for step in range(120):
        assert head.lr_at(step, 6, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=9)
    assert [late.lr_at(step, 6, 20) for step in range(24)] == [0.0] * 24
    for step in range(24, 120):
        assert late.lr_at(step, 6, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert {rest.lr_at(step, 6, 20) for step in range(120)} == {0.0}
