"""Where a network's frozen layers end: what follows them computes what the whole network does, and trains the same."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from finetune.models.batch_norm import set_train_mode
from finetune.models.frozen_prefix import Suffix, find_prefix, frozen_part, share_of_forward


def freeze(net, count):
    """The network in training, its first parameters frozen, as many as `count`, or up to the parameter of that name."""
    names = [name for name, _ in net.named_parameters()]
    for name in names[: names.index(count) if isinstance(count, str) else count]:
        net.get_parameter(name).requires_grad_(False)
    set_train_mode(net, "frozen")
    return net


def gradients(net, logits):
    """The gradient of a sum of logits in all that trains, by name."""
    net.zero_grad()
    (logits * torch.arange(logits.numel()).view_as(logits)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("test_resnet", "fc.weight", "global_pool"),
        ("test_resnet", "layer4.0.conv1.weight", "layer3"),
        ("test_resnet", "layer4.0.conv2.weight", "layer3"),  # its block has a shortcut around it
        ("test_vit", "blocks.4.norm1.weight", "blocks.3"),
        ("test_convnext", "stages.2.blocks.1.conv_dw.weight", "stages.2.blocks.0"),
        ("densenet121", "features.denseblock3.denselayer1.norm1.weight", "features.transition2"),
        ("torchvision/resnet18", "layer3.0.conv1.weight", "layer2"),
    ],
)
def test_a_network_goes_on_from_what_its_frozen_layers_returned(name, first, last):
    """Logits and gradients of other images are those of the whole network; the modules stay as they were."""
    torch.manual_seed(0)
    made = torchvision.models.resnet18 if "/" in name else lambda: timm.create_model(name, num_classes=5)
    net = freeze(made(), first)
    before = {path: (module, module.training, dict(module.__dict__)) for path, module in net.named_modules()}
    state = {key: value.clone() for key, value in net.state_dict().items()}
    prefix = find_prefix(net, (3, 64, 64) if name != "test_vit" else (3, 160, 160), "frozen")
    assert prefix is not None and prefix.last == last
    images = torch.randn(5, 3, *prefix.shape[1:])
    logits = net(images)
    wanted = gradients(net, logits)
    suffix = Suffix(net, prefix)
    kept = frozen_part(net, last, images)
    torch.testing.assert_close(suffix(kept), logits, rtol=1e-5, atol=1e-5)
    found = gradients(net, suffix(kept))
    assert found.keys() == wanted.keys() and first in wanted
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-4 * float(wanted[key].abs().max()))
    for path, (module, training, fields) in before.items():
        now = net.get_submodule(path)
        assert now is module and now.training == training and now.__dict__.keys() == fields.keys()
        assert not now._forward_hooks and not now._forward_pre_hooks
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


class Odd(nn.Module):
    """A stem and a head, and between them what tests fill in."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.fc = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.middle(self.stem(images)).mean((2, 3)))


class Around(Odd):
    """The head sees the image, too."""

    def forward(self, images):
        return self.fc(self.middle(self.stem(images)).mean((2, 3)) + images.mean((1, 2, 3))[:, None])


class Functional(Odd):
    """The middle is used, and never called; what comes after it is."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, images):
        return self.fc(self.act(nn.functional.conv2d(self.stem(images), self.middle.weight)).mean((2, 3)))


class Dropping(Odd):
    """The stem draws at random."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(self.stem, nn.Dropout(0.5))


class OfTheBatch(Odd):
    """The stem's output depends on the other images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(self.stem, nn.BatchNorm2d(4, track_running_stats=False))


class Twice(Odd):
    """The stem's activation is the middle's, too."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, images):
        return self.fc(self.act(self.middle(self.act(self.stem(images)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        (Odd, "middle.weight", "stem"),
        (Around, "fc.weight", None),
        (Functional, "middle.weight", "stem"),
        (Functional, "fc.weight", "act"),
        (Dropping, "middle.weight", None),
        (OfTheBatch, "middle.weight", None),
        (Twice, "middle.weight", "stem"),
        (Twice, "fc.weight", "middle"),
        (Odd, "stem.weight", None),
    ],
)
def test_only_what_is_still_and_alone_decides_is_a_prefix(kind, first, last):
    """Where more than the frozen layers' output matters, or it is not the same again, there is none or a shorter one."""
    torch.manual_seed(0)
    found = find_prefix(freeze(kind(), first), (3, 16, 16), "frozen")
    assert (found and found.last) == last


def test_the_share_of_a_forward_pass_is_that_of_its_multiplications():
    """Of two convolutions and a linear layer: counted by hand."""
    net = freeze(Odd(), "middle.weight")
    prefix = find_prefix(net, (3, 16, 16), "frozen")
    stem, middle, head = 16 * 48 * 4, 16 * 4 * 4, 4 * 3
    assert share_of_forward(net, prefix) == pytest.approx(stem / (stem + middle + head))
