"""Averages of networks, against timm's and torch's."""

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from finetune.optim.average import MovingAverage, mean_state
from helpers import same_tensors


def train(net, averages, images, steps=4):
    """Take steps of SGD, each followed by an update of the averages."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        net.train()(images).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update(net, step) if isinstance(average, ModelEmaV3) else average.update_parameters(net)


class Special(nn.Module):
    """With a weight of two names, unit vectors, codes that are counted, a complex weight and a norm."""

    def __init__(self, spectral_norm):
        super().__init__()
        self.encode, self.decode, self.norm = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
        self.decode.weight = self.encode.weight
        self.last = spectral_norm(nn.Linear(6, 6))
        self.phase = nn.Parameter(torch.ones(6, dtype=torch.complex64))
        self.register_buffer("codes", torch.zeros(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, features):
        if self.training:
            self.codes, self.seen = self.codes + features.sum(0), self.seen + len(features)
        return self.last(self.norm(self.decode(self.encode(features)))) * self.phase.abs()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_of_most_networks_it_is_timms(name):
    """Of a network without shared or special tensors, to the bit, statistics of batch norm included."""
    net = timm.create_model(name)
    averages = [kind(net, 0.6, use_warmup=True) for kind in (MovingAverage, ModelEmaV3)]
    size = net.pretrained_cfg["input_size"][-1]
    train(net, averages, torch.randn(4, 3, size, size))
    states = [average.module.state_dict() for average in averages]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert any(
        not torch.equal(tensor, net.state_dict()[key])
        for key, tensor in states[0].items()
        if "running" in key or name == "test_vit"
    )


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_each_tensor_is_averaged_once_and_no_unit_vector(spectral_norm):
    """Parameters are those of torch's averaged model, a tied one too; other buffers are the network's, unit vectors so long."""
    net = Special(spectral_norm)
    ours, theirs = MovingAverage(net, 0.6), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    theirs.update_parameters(net)  # the first time it copies
    ours.update(net)
    train(net, [], torch.randn(8, 6))
    for _ in range(3):
        train(net, [theirs], torch.randn(8, 6), steps=1)
        ours.update(net)
    for (name, own), (_, other) in zip(ours.module.named_parameters(), theirs.module.named_parameters(), strict=True):
        torch.testing.assert_close(own, other, msg=name)
    assert ours.module.encode.weight is ours.module.decode.weight
    for (name, own), (_, now) in zip(ours.module.named_buffers(), net.named_buffers(), strict=True):
        assert torch.equal(own, now) == (not name.startswith("norm.running")), name
        if name.endswith(("_u", "_v")):
            assert own.norm().item() == pytest.approx(1.0)


class Tied(nn.Module):
    """With a weight of two names and a norm."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.decode.weight = self.encode.weight


def test_a_mean_of_states_is_swa_s():
    """With equal shares it is torch's AveragedModel of the same networks; a share of 1 gives that state, bit for bit, also
    where another is infinite, and integers are the first's."""
    nets = [Tied() for _ in range(3)]
    for i, net in enumerate(nets):
        for value in net.state_dict().values():
            value.add_(i + 1) if not value.is_floating_point() else value.copy_(torch.randn(value.shape))
    reference = AveragedModel(nets[0], use_buffers=True)
    for net in nets:
        reference.update_parameters(net)
    states = [net.state_dict() for net in nets]
    mean = mean_state(states, [1 / 3] * 3)
    for name, value in reference.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(mean[name], value, rtol=1e-7, atol=1e-7)
        else:
            assert torch.equal(mean[name], states[0][name])
    broken = {
        name: torch.full_like(value, float("inf")) if value.is_floating_point() else value for name, value in states[1].items()
    }
    assert same_tensors(mean_state([states[0], broken], [1.0, 0.0]), states[0])
    assert same_tensors(mean_state([broken, states[2]], [0, 1]), states[2])
    assert same_tensors(mean_state([states[0]] * 3, [1 / 3] * 3), states[0])
    half = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 2.0)]
    assert mean_state(half, [0.5, 0.5])["w"].equal(torch.tensor([1.5], dtype=torch.bfloat16))
