"""Optimizers by name, several in one run, and a switch of them, each against torch's own in a bare loop."""

import inspect

import pytest
import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch.nn.functional import cross_entropy

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.optim.optimizers import SeveralOptimizers, build_optimizer
from finetune.optim.param_groups import build_param_groups, planned_lrs
from finetune.recipe import SGD, AdamW, Constant, Data, Group, Optimizer, Step, Switch
from finetune.training import loop as train_loop
from finetune.utils.errors import RecipeError
from helpers import SmallNet, assert_same_weights, prepare, run_here, scaling_accelerator, small_recipe

TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon")
)
HEAD = (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=0))


def constant(**changes):
    """Two epochs at one learning rate without clipping: 6 steps, the last of each epoch smaller."""
    return small_recipe(**{"schedule": Constant(), "epochs": 2, "clip_norm": None, **changes})


def bare_loop(recipe, optimizers_of, before_epoch=lambda epoch, net, optimizers: optimizers, clip=None):
    """The weights after the recipe's steps, taken by torch's own optimizers from the same start on the same batches."""
    net, _, images = prepare(recipe)
    optimizers = optimizers_of(net)
    for epoch in range(recipe.epochs):
        optimizers = before_epoch(epoch, net, optimizers)
        for plan in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images[0], epoch, plan.micro_batches, 0)

            def loss(batch=batch, labels=labels):
                net.zero_grad()
                value = cross_entropy(net(batch.contiguous()), labels)
                value.backward()
                return value

            loss()
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step(loss if isinstance(optimizer, torch.optim.LBFGS) else None)
    return net.state_dict()


def assert_moved(net, recipe, pattern="fc.weight"):
    assert (net.state_dict()[pattern] - prepare(recipe)[0].state_dict()[pattern]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*TORCH, "Adam amsgrad"])
def test_every_optimizer_of_torch_works_by_its_name(tmp_path, name):
    """A run with any optimizer of torch.optim takes that optimizer's own steps."""
    name, *switches = name.split()
    options = dict.fromkeys(switches, True)
    recipe = constant(groups=(Group("all", ".", lr=1e-2),), optimizer=Optimizer(name, **options))
    reference = bare_loop(
        recipe,
        lambda net: [
            getattr(torch.optim, name)(
                net.parameters(),
                lr=1e-2,
                **options,
                **({"weight_decay": 0.0} if "weight_decay" in inspect.signature(getattr(torch.optim, name)).parameters else {}),
            )
        ],
    )
    net, _ = run_here(recipe, tmp_path)
    assert_same_weights(net, reference)
    assert (net.fc.weight - prepare(recipe)[0].fc.weight).abs().max() > (0 if name == "Adadelta" else 1e-4)  # slow by nature


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lbfgs_is_given_its_closure(tmp_path, monkeypatch, accumulate):
    """LBFGS with a line search on a head over frozen features takes torch's own steps, and more than one look at the loss."""
    options = {"max_iter": 4, "line_search_fn": "strong_wolfe"}
    recipe = constant(groups=(Group("head", "fc", lr=0.5), Group("rest", ".", lr=0)), optimizer=Optimizer("LBFGS", **options))
    reference = bare_loop(recipe, lambda net: [torch.optim.LBFGS(net.fc.parameters(), lr=0.5, **options)])
    looks, backward = [], train_loop.backward
    monkeypatch.setattr(train_loop, "backward", lambda *given: looks.append(1) or backward(*given))
    net, rows = run_here(recipe, tmp_path, accumulate=accumulate)
    assert len(looks) > 2 * sum("grad_norm" in row for row in rows)
    assert_same_weights(net, reference, 1e-4)  # a line search amplifies rounding
    assert_moved(net, recipe)


def test_several_optimizers_in_one_run(tmp_path):
    """Convolutions by Adam, the linear layer by SGD, the norm by RMSprop: torch's own three side by side, clipped as one."""
    recipe = constant(
        clip_norm=0.5,
        optimizer=Optimizer("Adam", weight_decay=0.1),
        groups=(
            Group("linear", "fc", lr=1e-2, optimizer=SGD(momentum=0.9, weight_decay=0.1)),
            Group("norm", "norm", lr=1e-3, optimizer=Optimizer("RMSprop")),
            Group("convolutions", ".", lr=3e-3, weight_decay=0.0),
        ),
    )
    reference = bare_loop(
        recipe,
        lambda net: [
            torch.optim.SGD(
                [{"params": [net.fc.weight], "weight_decay": 0.1}, {"params": [net.fc.bias]}], lr=1e-2, momentum=0.9
            ),
            torch.optim.RMSprop(net.norm.parameters(), lr=1e-3),
            torch.optim.Adam([*net.stem.parameters(), *net.body.parameters()], lr=3e-3),
        ],
        clip=0.5,
    )
    net, rows = run_here(recipe, tmp_path)
    assert_same_weights(net, reference)
    assert min(row["grad_norm"] for row in rows if "grad_norm" in row) > 0.5  # all were clipped


def test_muon_for_matrices_and_adamw_for_the_rest():
    """In a ViT, Muon takes the matrices and AdamW all else; every parameter is in one of them and each steps as torch's own."""
    pytest.importorskip("torch", minversion="2.9", reason="torch has Muon from 2.9 on")
    recipe = small_recipe(
        backbone="test_vit",
        head=None,
        data=Data("generated", 96, 8),
        groups=(
            Group("matrices", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", lr=2e-2, optimizer=Optimizer("Muon")),
            Group("rest", ".", lr=1e-3),
        ),
    )
    net, groups, _ = prepare(recipe)
    other, _, _ = prepare(recipe)
    optimizer = build_optimizer(groups)
    matrices = {name for name, p in other.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    assert matrices == set(groups[0].params) and len(matrices) > 10
    of = dict(other.named_parameters())
    theirs = [
        torch.optim.Muon([of[name] for name in matrices], lr=2e-2, weight_decay=0.0),
        torch.optim.AdamW([of[name] for name in groups[1].decay], lr=1e-3, weight_decay=0.05, fused=True),
        torch.optim.AdamW([of[name] for name in groups[1].no_decay], lr=1e-3, weight_decay=0, fused=True),
    ]
    for _ in range(3):
        for network in (net, other):
            network.zero_grad()
            torch.manual_seed(0)
            network(torch.randn(2, 3, 96, 96)).square().sum().backward()
        optimizer.step()
        for one in theirs:
            one.step()
    assert_same_weights(net, other.state_dict())


def test_several_optimizers_under_a_loss_scaler(tmp_path):
    """With a scaler, two optimizers are unscaled once, skip an overflow together, and step as one optimizer does."""
    plain = SGD(momentum=0.9, fused=False)  # as on a GPU, where scalers are
    rows = (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=3e-3, optimizer=SGD(momentum=0.9, fused=False, dampening=0.0)))
    one, _ = run_here(
        constant(optimizer=plain, groups=(rows[0], Group("rest", ".", lr=3e-3)), epochs=6),
        tmp_path / "one",
        accelerator=scaling_accelerator(),
    )
    two, logged = run_here(
        constant(optimizer=plain, groups=rows, epochs=6), tmp_path / "two", accelerator=scaling_accelerator()
    )
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    skipped = [row for row in logged if "grad_norm" in row and row["grad_norm"] == float("inf")]
    assert 0 < len(skipped) < 18


def test_several_optimizers_share_rows_and_state():
    """A row's lr reaches the optimizer within; loading a state reaches it too, after any number of loads."""
    rows = (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=3e-3, optimizer=SGD(momentum=0.9)))
    net, groups, _ = prepare(small_recipe(groups=rows))
    optimizer = build_optimizer(groups)
    assert isinstance(optimizer, SeveralOptimizers) and len(optimizer.optimizers) == 2
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[-1]["lr"] = 0.125
        assert optimizer.optimizers[1].param_groups[-1]["lr"] == 0.125
        net(torch.randn(2, 3, 24, 24)).sum().backward()
        optimizer.step()
        assert set(optimizer.state_dict()["state"]) == set(range(8)) and optimizer.optimizers[0].state is optimizer.state


@pytest.mark.parametrize(
    "later,theirs",
    [
        (SGD(momentum=0.9), lambda rows: torch.optim.SGD(rows, momentum=0.9)),
        (AdamW(), lambda rows: torch.optim.AdamW(rows, weight_decay=0)),
    ],
    ids=["SGD", "AdamW"],
)
def test_a_switch_starts_another_optimizer_afresh(tmp_path, later, theirs):
    """From its epoch on the run takes the steps of a new optimizer at its own lrs, without the first one's state."""
    rows = (Group("head", "fc", lr=1e-3), Group("rest", ".", lr=1e-4, unfreeze_at=1))
    recipe = constant(groups=rows, optimizer=AdamW(), epochs=3, switch=Switch(at=1, optimizer=later, lr_factor=10.0))

    def switch(epoch, net, optimizers):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(epoch >= 1 or name.startswith("fc"))
        if epoch != 1:
            return optimizers
        rest = [p for n, p in net.named_parameters() if not n.startswith("fc")]
        return [theirs([{"params": net.fc.parameters(), "lr": 1e-2}, {"params": rest, "lr": 1e-3}])]

    reference = bare_loop(recipe, lambda net: [torch.optim.AdamW(net.fc.parameters(), lr=1e-3, weight_decay=0)], switch)
    net, logged = run_here(recipe, tmp_path)
    assert_same_weights(net, reference)
    lrs = [row["lr"] for row in logged if "lr" in row]
    assert lrs[2] == {"head": 1e-3, "rest": 0.0} and lrs[3] == pytest.approx({"head": 1e-2, "rest": 1e-3})


def test_changing_learning_rates_keeps_momentum(tmp_path):
    """A step of the schedule changes the learning rate alone: torch's SGD under torch's StepLR, one state throughout."""
    recipe = constant(
        groups=(Group("all", ".", lr=1e-2),), optimizer=SGD(momentum=0.9), epochs=3, schedule=Step(every=1, factor=0.5)
    )

    def halve(epoch, net, optimizers):
        if epoch:
            optimizers[0].param_groups[0]["lr"] *= 0.5
        return optimizers

    reference = bare_loop(recipe, lambda net: [torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)], halve)
    assert_same_weights(run_here(recipe, tmp_path)[0], reference)


@pytest.mark.parametrize("backbone,head", [(SmallNet, "fc"), ("test_resnet", None)], ids=["SmallNet", "batch norm"])
def test_frozen_rows_keep_every_bit_and_are_in_no_optimizer(tmp_path, backbone, head):
    """A row with lr=0 is outside the optimizer, its lr is logged as 0, and training leaves its tensors as they were."""
    changes = {"backbone": backbone, "head": head, "batch_norm": "train"}
    recipe = small_recipe(groups=HEAD, epochs=2, optimizer=AdamW(weight_decay=0.5), **changes)
    net, rows = run_here(recipe, tmp_path)
    before = prepare(recipe)[0].state_dict()
    assert {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])} == {"fc.weight", "fc.bias"}
    assert {row["lr"]["rest"] for row in rows if "lr" in row} == {0.0}
    optimizer = build_optimizer(build_param_groups(recipe, net))
    assert sum(len(row["params"]) for row in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "changes,fault",
    [
        ({"optimizer": Optimizer("LBFGS")}, "LBFGS takes one group, not head, body, stem"),
        ({"groups": (Group("a", "fc", lr=1.0, optimizer=Optimizer("sdg")), Group("b", ".", lr=1.0))}, "Did you mean sgd?"),
        (
            {"groups": (Group("a", "fc", lr=1.0, weight_decay=0.1, optimizer=Optimizer("Rprop")), Group("b", ".", lr=1.0))},
            "Rprop has no weight_decay",
        ),
    ],
)
def test_optimizers_that_do_not_fit_are_named(changes, fault):
    """An optimizer that can't take its groups is refused before training, with the remedy."""
    recipe = small_recipe(**changes)
    with pytest.raises(RecipeError) as caught:
        build_optimizer(build_param_groups(recipe, SmallNet()))
    assert fault in str(caught.value)


@pytest.mark.parametrize("pattern,found", [("fc", r"fc.bias .* own is \(7,\)"), ("body", "body.weight .* is .16, 8, 3, 3.")])
def test_muon_names_what_is_no_matrix(pattern, found):
    """The parameter, its group and its shape."""
    pytest.importorskip("torch", minversion="2.9", reason="torch has Muon from 2.9 on")
    recipe = small_recipe(groups=(Group("own", pattern, lr=1e-2, optimizer=Optimizer("Muon")), Group("rest", ".", lr=1e-3)))
    with pytest.raises(RecipeError, match=f"optimizer Muon takes matrices, and {found}: give it to a group with another opt"):
        build_optimizer(build_param_groups(recipe, SmallNet()))


def test_columns_are_independent(tmp_path):
    """A group's own columns change nothing of its neighbour: after one step each has moved, and has lrs, as when alone."""
    own = {"weight_decay": 0.3, "schedule": Step(every=1, factor=0.5), "warmup_epochs": 0.5, "optimizer": SGD(momentum=0.9)}
    rows = (Group("head", "fc", lr=1e-2, **own), Group("rest", ".", lr=1e-3))
    still = (Group("head", "fc", lr=0), Group("rest", ".", lr=0))
    recipe, head, rest = (
        small_recipe(groups=groups, data=Data("generated", 24, 22), epochs=1, clip_norm=None)
        for groups in (rows, (rows[0], still[1]), (still[0], rows[1]))
    )
    both = run_here(recipe, tmp_path / "both")[0].state_dict()
    for alone, moves in ((head, "head"), (rest, "rest")):
        tensors = run_here(alone, tmp_path / moves)[0].state_dict()
        mine = [name for name in both if name.startswith("fc.") == (moves == "head")]
        assert all(torch.equal(both[name], tensors[name]) for name in mine)
        assert not torch.equal(both[mine[0]], prepare(recipe)[0].state_dict()[mine[0]])
        lrs = [planned_lrs(build_param_groups(one, SmallNet()), range(9), 3, 3)[moves] for one in (recipe, alone)]
        assert lrs[0] == lrs[1] and len(set(lrs[0])) > 2


def test_an_optimizer_that_needs_more_than_a_loss_is_refused():
    """Every optimizer that timm marks as of second order is refused before the first step, as the recipe is checked."""
    second_order = [name for name in list_optimizers() if get_optimizer_info(name).second_order]
    assert "adahessian" in second_order
    for name in second_order:
        with pytest.raises(RecipeError, match=f"optimizer {name} needs second derivatives"):
            build_optimizer(prepare(small_recipe(optimizer=Optimizer(name)))[1])
