"""Norms computed within convolutions: the function, its gradients and a run's weights are those of the network as it was."""

import copy

import pytest
import timm
import torch
from torch import nn

from finetune.models.fuse_conv_bn import fuse_conv_bn
from finetune.recipe import Data, Group
from finetune.train import loop as train_loop
from helpers import assert_same_weights, run_here, small_recipe

NETWORKS = {
    "test_resnet": 15,
    "resnet18": 20,
    "tf_efficientnet_lite0": 49,
    "mobilenetv3_small_050": 34,
    "densenet121": 59,
    "regnetx_002": 44,
    "convnext_atto": 0,
    "vit_tiny_patch16_224": 0,
}  # and the convolutions that take a norm in


def lively(name):
    """A network whose norms have statistics, factors and summands of their own."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5).double().eval()  # in float32 rounding would hide a small fault
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def recipe_for(size=64, batch_size=100_000, **changes):
    return small_recipe(data=Data("generated", size, batch_size), groups=(Group("all", ".", lr=1e-2),), **changes)


def gradients(net, images):
    net.zero_grad()
    net(images).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_function_and_gradients_stay(name):
    """Of real networks, logits and every parameter's gradient are as before, to 1e-10; nothing has another name."""
    net = lively(name)
    size = 224 if "vit" in name else 64
    images, keys = torch.randn(2, 3, size, size, dtype=torch.float64), list(net.state_dict())
    before, expected = net(images).detach(), gradients(net, images)
    assert len(fuse_conv_bn(recipe_for(size), net)) == NETWORKS[name]
    torch.testing.assert_close(net(images), before, rtol=0, atol=1e-10 * before.abs().max().item())
    for parameter, gradient in gradients(net, images).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=1e-10 * expected[parameter].abs().max().item())
    assert list(net.state_dict()) == keys


def test_a_copy_is_a_network_of_its_own():
    """What is changed in a deep copy, as an average of weights is, changes it and not the first."""
    net, images = lively("test_resnet"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert fuse_conv_bn(recipe_for(), net)
    other, before = copy.deepcopy(net), net(images)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(net(images), before) and not torch.allclose(other(images), before)


def test_what_has_more_weights_than_activations_is_left_alone():
    """Of a ResNet-18 at 64 px with a batch of 8, the first layers fold and the last do not."""
    net = lively("resnet18")
    pairs = fuse_conv_bn(recipe_for(batch_size=8), net)
    assert pairs[0] == (net.conv1, net.bn1) and 0 < len(pairs) < 20
    assert not any(conv in net.layer4.modules() for conv, _ in pairs)


class Forked(nn.Module):
    """A convolution whose output goes past its norm, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.norm.running_mean.normal_()

    def forward(self, images):
        made = self.conv(images)
        return self.fc((self.norm(made) + made).mean((2, 3)))


def test_a_network_that_would_say_something_else_is_left_alone():
    """Where a convolution's own output is of use elsewhere nothing is folded."""
    net, images = Forked().eval(), torch.randn(2, 3, 64, 64)
    before = net(images)
    assert fuse_conv_bn(recipe_for(), net) == [] and torch.equal(net(images), before)
    assert "forward" not in net.conv.__dict__ and "forward" not in net.norm.__dict__


@pytest.mark.parametrize("changes", [{"batch_norm": "train"}, {"mixed_precision": "bf16"}])
def test_only_fixed_statistics_in_float32_are_folded(changes):
    """Statistics that move are no constants, and in bf16 a folded weight would be rounded elsewhere."""
    assert fuse_conv_bn(recipe_for(**changes), lively("test_resnet")) == []


def test_a_run_is_the_same(tmp_path, monkeypatch):
    """After a run of twelve updates weights and scores are those of a run without it, to rounding."""
    recipe = recipe_for(32, 8, backbone="test_resnet", head=None, clip_norm=None)
    folds = []
    monkeypatch.setattr(train_loop, "fuse_conv_bn", lambda *given: folds.append(fuse_conv_bn(*given)) or folds[-1])
    ours, rows = run_here(recipe, tmp_path / "folded")
    assert folds[0]
    monkeypatch.setattr(train_loop, "fuse_conv_bn", lambda *args: [])
    plain, expected = run_here(recipe, tmp_path / "plain")
    assert_same_weights(ours, plain.state_dict(), 1e-4)
    assert rows[-1]["top1"] == expected[-1]["top1"] and rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-3)
