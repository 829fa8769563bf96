"""Frozen means still: no gradient, no decay, no momentum, no statistics, bit for bit."""

import re
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, EvoNorm2dB1
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetune.models.batch_norm import convert_sync_batch_norm, hold_batch_norm, set_train_mode
from finetune.optim.freezing import describe_stage, starts_stage, unfreeze
from finetune.optim.param_groups import build_param_groups, describe_param_groups
from finetune.recipe import SGD, AdamW, Group
from finetune.training import loop as train_loop
from finetune.training.distributed import wrap
from finetune.utils.errors import RecipeError
from helpers import SmallNet, prepare, run_here, small_recipe

ROWS = (
    Group("head", "fc", lr=1e-2),
    Group("late", r"layer[34]", lr=1e-2, unfreeze_at=1),
    Group("early", r"conv1|bn1|layer[12]", lr=1e-2, unfreeze_at=2),
)


def residual_recipe(**changes):
    """timm's smallest ResNet, which has batch norm, with random weights."""
    return small_recipe(**{"backbone": "test_resnet", "head": None, "groups": ROWS, **changes})


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.5), SGD(momentum=0.9, weight_decay=0.5)], ids=["AdamW", "SGD"])
def test_frozen_groups_keep_every_bit(tmp_path, monkeypatch, optimizer, batch_norm):
    """Through training and evaluation, tensors of frozen groups keep every bit, and each group moves once it trains."""
    recipe = residual_recipe(epochs=3, optimizer=optimizer, batch_norm=batch_norm)
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
        assert moved <= allowed - (statistics if batch_norm == "frozen" else set())
        assert moved >= {n for n in allowed if n.endswith(("conv1.weight", "fc.weight"))}
        assert moved >= statistics or batch_norm == "frozen"


def test_refrozen_parameters_lose_their_gradient():
    """A gradient left from before would be applied, with momentum and decay, after freezing."""
    net, groups, _ = prepare(small_recipe())
    unfreeze(groups, 3)
    net(torch.randn(4, 3, 24, 24)).sum().backward()
    assert net.stem.weight.grad is not None
    unfreeze(groups, 0)
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == {"fc.weight", "fc.bias"}
    assert net.stem.weight.grad is None and not net.stem.weight.requires_grad


def test_a_frozen_backbone_runs_no_backward_pass():
    """In the head's own stage nothing before the head is on the autograd tape."""
    net, groups, _ = prepare(residual_recipe())
    unfreeze(groups, 0)
    set_train_mode(net, "frozen")
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
    assert [starts_stage(groups, epoch) for epoch in range(4)] == [True, True, True, False]


def test_a_stage_in_words():
    """What trains is named with its number of parameters, then what does not, where there is any."""
    groups = build_param_groups(small_recipe(), SmallNet())
    assert describe_stage(groups, 0) == "from epoch 1: trains: head (119 parameters); frozen: body, stem (1,408 parameters)"
    assert describe_stage(groups, 2) == "from epoch 3: trains: head, body, stem (1,527 parameters)"


@pytest.mark.parametrize("held_by", [set_train_mode, hold_batch_norm])
@pytest.mark.parametrize("batch_norm,still", [("frozen", {"a", "b"}), ("train", {"a"}), ("sync", {"a"})])
def test_statistics_move_in_layers_that_train_only(held_by, batch_norm, still):
    """With "train" and "sync" norms of frozen layers alone stand still, with "frozen" all; so too after net.train()."""
    net = nn.Sequential(OrderedDict(a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3), c=nn.Dropout()))
    net.a.requires_grad_(False)
    net.b.register_forward_pre_hook(lambda module, inputs: None)  # somebody else's
    for _ in range(2):
        held_by(net, batch_norm)
    assert len(net.b._forward_pre_hooks) == 1 + (held_by is hold_batch_norm)  # once, however often it is asked for
    if held_by is hold_batch_norm:
        net.train()
    net(torch.randn(4, 3, 2, 2))
    assert {name for name in ("a", "b") if not net.get_buffer(f"{name}.num_batches_tracked")} == still and net.c.training
    net.a.requires_grad_(True)
    held_by(net.train(), batch_norm)
    net(torch.randn(4, 3, 2, 2))
    assert bool(net.a.num_batches_tracked) == (batch_norm != "frozen")


class MovingMean(nn.Module):
    """A norm of somebody's own: it takes off the mean, over images in training, else the one that it keeps."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))

    def forward(self, images):
        mean = images.detach().mean((0, 2, 3)) if self.training else self.moving_mean
        if self.training:
            self.moving_mean.lerp_(mean, 0.1)
        return (images - mean[:, None, None]) * self.weight[:, None, None]


class Counting(nn.Module):
    """A layer that counts in training what it has seen, with dropout below it."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(channels, channels, 1), nn.Dropout()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, images):
        self.seen += len(images) * self.training
        return self.drop(self.conv(images))


NORMS = {
    "EvoNorm": EvoNorm2dB0,
    "EvoNorm of another kind": EvoNorm2dB1,
    "timm's with activation": BatchNormAct2d,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    "one's own": MovingMean,
}
OTHERS = {
    "spectral norm": lambda channels: nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1)),
    "spectral norm by hook": lambda channels: nn.utils.spectral_norm(nn.Conv2d(channels, channels, 1)),
    "counter": Counting,
}


@pytest.mark.parametrize("held_by", [set_train_mode, hold_batch_norm])
@pytest.mark.parametrize("kind", [*NORMS, *OTHERS])
def test_every_buffer_of_a_frozen_layer_stands_still(kind, held_by):
    """Whatever moves in training: in a frozen layer nothing does, in one that trains only norms stand still, by "frozen"."""
    make = {**NORMS, **OTHERS}[kind]
    for batch_norm, trains, moves in (("train", False, False), ("train", True, True), ("frozen", True, kind in OTHERS)):
        net = nn.Sequential(make(4), nn.Conv2d(4, 4, 1)).requires_grad_(trains)
        net[1].requires_grad_(True)
        for parameter in net.parameters():  # spectral norm starts with vectors that fit its weights
            parameter.data.add_(torch.randn(parameter.shape))
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        held_by(net, batch_norm)
        net(torch.randn(8, 4, 3, 3) + 1)
        assert before and all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers()) != moves
        assert all(module.training for module in net.modules() if isinstance(module, nn.Dropout))


class Positions(SmallNet):
    """With a position embedding that the network itself does not train."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.linspace(-1, 1, 8 * 121).sin().view(1, 8, 11, 11), requires_grad=False)

    def forward(self, images):
        return self.fc(self.body((self.norm(self.stem(images)) + self.pos_embed).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("named", [False, True])
def test_what_the_network_itself_fixed_stays_unless_a_row_names_it(tmp_path, named):
    """A parameter made with requires_grad=False keeps every bit under a row that claims all, and trains by a row of its own."""
    rows = (Group("positions", "pos_embed", lr=1e-2),) * named + (
        Group("head", "fc", lr=1e-2),
        Group("rest", ".", lr=1e-2, unfreeze_at=1),
    )
    recipe = small_recipe(backbone=Positions, groups=rows, epochs=2)
    net, _ = run_here(recipe, tmp_path)
    assert torch.equal(net.pos_embed, Positions().pos_embed) != named
    again = build_param_groups(recipe, net)  # by any later look at it
    assert ("pos_embed" in {name for group in again for name in group.params}) == named
    assert ("kept still by the network itself (requires_grad=False): pos_embed" in describe_param_groups(again, 3, 2)) != named


def test_a_norm_without_parameters_follows_what_surrounds_it():
    """Batch norm without affine parameters is frozen with the nearest layer around it that has some."""
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    net = nn.Sequential(nn.Sequential(block, nn.Conv2d(4, 4, 1)))  # the last layer always trains
    for moves in (False, True):
        block.requires_grad_(moves)
        set_train_mode(net, "train")
        assert block[1][0].training == moves
    set_train_mode(nn.Sequential(nn.BatchNorm2d(4, affine=False)), "train")  # no parameter anywhere: nothing to ask


@pytest.fixture
def one_process_group(tmp_path):
    """A process group of this process alone, as DistributedDataParallel needs one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_each_process_wraps_for_its_own_gpu(monkeypatch):
    """DDP is told the process's GPU."""
    ddp = "finetune.training.distributed.DistributedDataParallel"
    monkeypatch.setattr(ddp, lambda net, device_ids, **_: SimpleNamespace(devices=device_ids))
    model = wrap(small_recipe(), nn.Linear(1, 1), SimpleNamespace(num_processes=2, device=torch.device("cuda", 1)))
    assert model.devices == [torch.device("cuda", 1)]


def test_several_processes_average_what_trains_in_the_stage(one_process_group):
    """On several processes DDP averages the trained gradients alone and sends no statistics; on one there is no wrapper."""
    net, groups, _ = prepare(residual_recipe())
    several, one = (SimpleNamespace(num_processes=n, device=torch.device("cpu")) for n in (2, 1))
    unfreeze(groups, 1)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    model, sent = wrap(small_recipe(), net, several), []

    def send(state, bucket):
        sent.extend(bucket.parameters())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, send)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert isinstance(model, DistributedDataParallel) and model.module is net and not model.broadcast_buffers
    assert {id(parameter) for parameter in sent} == {id(parameter) for parameter in trained} and len(sent) == len(trained)
    compiled = wrap(small_recipe(torch_compile=True), net, one)
    assert wrap(small_recipe(), net, one) is net and isinstance(compiled, nn.Module) and compiled is not net


def test_synchronised_norms_keep_their_parameters(monkeypatch):
    """batch_norm="sync" swaps norms once, keeping parameters and names; on CPUs it is refused, on one process it is "train"."""
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    net, _, _ = prepare(residual_recipe(batch_norm="sync"))
    before = dict(net.named_parameters())
    kinds = {type(module).__name__ for module in convert_sync_batch_norm(net, "sync", accelerator).modules()}
    assert "SyncBatchNorm" in " ".join(kinds) and "BatchNorm2d" not in kinds
    assert all(parameter is before[name] for name, parameter in net.named_parameters()) and len(before) > 20
    for changed in ({"num_processes": 1}, {"num_processes": 1, "device": torch.device("cpu")}):
        assert convert_sync_batch_norm(net, "sync", SimpleNamespace(**{**vars(accelerator), **changed})) is net
    with pytest.raises(RecipeError, match="needs GPUs"):
        convert_sync_batch_norm(net, "sync", SimpleNamespace(num_processes=2, device=torch.device("cpu")))


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_a_networks_own_synchronised_norm_needs_gpus(batch_norm):
    """On several processes of a CPU it is refused by name, as torch's DDP would after the folder was begun; else it stays."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    for processes, device in ((1, "cpu"), (2, "cuda")):
        accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
        assert convert_sync_batch_norm(net, batch_norm, accelerator) is net
    with pytest.raises(RecipeError, match="backbone: 1 is a SyncBatchNorm, .* needs GPUs; here: --processes 1, or"):
        convert_sync_batch_norm(net, batch_norm, SimpleNamespace(num_processes=2, device=torch.device("cpu")))


def test_no_module_is_swapped():
    """Freezing leaves every module object in its place (timm's own freeze replaces batch norms and orphans parameters)."""
    net, groups, _ = prepare(residual_recipe())
    before = dict(net.named_modules())
    for epoch in (0, 1, 2, 0):
        unfreeze(groups, epoch)
        set_train_mode(net, "train")
    assert all(module is before[name] for name, module in net.named_modules())
