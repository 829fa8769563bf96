"""Networks of every kind: small odd ones, one of each kind that people bring, and those of timm and torchvision."""

import random
from collections import OrderedDict
from functools import partial

import safetensors
import timm
import torch
from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm


class Base(nn.Module):
    """A stem, a body of 8 channels, and a head."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1), nn.Linear(width, 5)

    def features(self, images):
        return self.body(self.stem(images).relu()).relu()

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


class TiedWeights(Base):
    """Two convolutions share one weight."""

    def __init__(self):
        super().__init__()
        self.more = nn.Conv2d(8, 8, 3, 1, 1)
        self.more.weight = self.body.weight

    def features(self, images):
        return self.more(super().features(images)).relu()


class SharedModule(Base):
    """One block under two names."""

    def __init__(self):
        super().__init__()
        self.again = self.body

    def features(self, images):
        return self.again(super().features(images)).relu()


class LayerUsedTwice(Base):
    """One convolution used twice, with a batch norm for each time."""

    def __init__(self):
        super().__init__()
        self.norm0, self.norm1 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def features(self, images):
        return self.norm1(self.body(self.norm0(super().features(images)).relu())).relu()


class ExtraState(Base):
    """A module that keeps more than tensors in its state dict."""

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def get_extra_state(self):
        return {"scale": self.scale, "seen": [1, 2]}

    def set_extra_state(self, state):
        self.scale = state["scale"]

    def forward(self, images):
        return super().forward(images) * self.scale


class ManyBuffers(Base):
    """Buffers of every kind: whole numbers, bits, half precision, complex, empty, a scalar, a view of another one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(12, dtype=torch.int64).reshape(3, 4))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))
        self.register_buffer("halves", torch.ones(8, dtype=torch.float16))
        self.register_buffer("wave", torch.ones(8, dtype=torch.complex64))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("column", self.table[:, 1])

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)) * self.mask * self.halves.float() * self.wave.real)


class ReadsValues(Base):
    """Drop rates read off a linspace in the constructor, as in much official code, in three ways."""

    def __init__(self):
        super().__init__()
        rates = torch.linspace(0, 0.1, 3)
        self.rates = [[rate.item() for rate in rates], rates.tolist(), list(rates.numpy())]


class Guard(Base):
    """A guard on values in forward."""

    def forward(self, images):
        if images.abs().max() > 1e4:
            raise ValueError("images are not normalised")
        return super().forward(images)


class RandomBranch(Base):
    """A branch that is taken at random while training."""

    def features(self, images):
        x = self.stem(images).relu()
        return x + self.body(x) if not self.training or torch.rand(()) < 0.5 else x


class Unused(Base):
    """A layer that forward does not use."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(8, 8)


class Dropout(Base):
    """Dropout and moving batch-norm statistics."""

    def features(self, images):
        return self.drop(self.norm(super().features(images)))

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)


class OwnDouble(Base):
    """Computes in double precision, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, images):
        return super().forward(images.double()).float()


class ComplexHead(Base):
    """A complex weight on the way to the logits."""

    def __init__(self):
        super().__init__()
        self.wave = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, images):
        return self.fc((self.features(images).mean((2, 3)).to(torch.complex64) @ self.wave).abs())


class ParameterLists(Base):
    """Parameters in a list and in a dict, and a scalar one."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(8), torch.ones(8)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(8)})
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        x = self.features(images).mean((2, 3))
        return self.fc(self.gain * x * self.scales[0] * self.scales[1] + self.shifts["a"])


class HandedOn(nn.Module):
    """A timm backbone with a head of one's own, which hands on its pretrained_cfg."""

    def __init__(self):
        super().__init__()
        self.trunk = timm.create_model("test_resnet", num_classes=0)
        self.pretrained_cfg, self.fc = self.trunk.pretrained_cfg, nn.Linear(self.trunk.num_features, 5)

    def forward(self, images):
        return self.fc(self.trunk(images))


class TwoInTraining(Base):
    """Returns a second output in training."""

    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class DictOutput(Base):
    """Returns a dict."""

    def forward(self, images):
        return {"logits": super().forward(images)}


class UnsavedRandom(Base):
    """A random projection that is drawn anew each time, in no state dict."""

    def __init__(self):
        super().__init__()
        self.projection = torch.randn(8, 8)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)) @ self.projection)


class UnpicklableState(Base):
    """Extra state that no file without code can hold."""

    def get_extra_state(self):
        return random.Random(0)

    def set_extra_state(self, state):
        pass


class AlwaysRandom(Base):
    """Dropout that stays on in evaluation."""

    def forward(self, images):
        return self.fc(nn.functional.dropout(self.features(images).mean((2, 3)), 0.1, training=True))


def with_layer(change):
    """A Base whose body is changed by a function."""
    net = Base()
    net.body = change(net.body)
    return net


def lazy():
    return nn.Sequential(
        OrderedDict(
            stem=nn.LazyConv2d(8, 3, 2, 1), norm=nn.LazyBatchNorm2d(), act=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(), fc=nn.LazyLinear(5),
        )
    )  # fmt: skip


def half_frozen_norm():
    """Norms without parameters, without statistics, and over groups, rows and images."""
    net = Base()
    net.body = nn.Sequential(
        net.body, nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    )  # fmt: skip
    return net


# safetensors has complex numbers from 0.7 on.
COMPLEX = "" if Version(safetensors.__version__) >= Version("0.7") else "can't be saved and loaded again"

# By name: what makes it, and the words of the refusal, before the first step, if it can't be trained.
ODD = {
    "plain": (Base, ""),
    "partial": (partial(Base, width=6), ""),
    "tied weights": (TiedWeights, ""),
    "shared module": (SharedModule, ""),
    "layer used twice": (LayerUsedTwice, ""),
    "extra state": (ExtraState, ""),
    "many buffers": (ManyBuffers, COMPLEX),
    "reads values": (ReadsValues, ""),
    "guard in forward": (Guard, ""),
    "random branch": (RandomBranch, ""),
    "unused layer": (Unused, ""),
    "dropout and batch norm": (Dropout, ""),
    "computes in double": (OwnDouble, ""),
    "complex weight": (ComplexHead, COMPLEX),
    "parameter lists": (ParameterLists, ""),
    "many norms": (half_frozen_norm, ""),
    "lazy": (lazy, ""),
    "weight norm by hook": (partial(with_layer, weight_norm), ""),
    "weight norm": (partial(with_layer, parametrizations.weight_norm), ""),
    "spectral norm by hook": (partial(with_layer, spectral_norm), ""),
    "spectral norm": (partial(with_layer, parametrizations.spectral_norm), ""),
    "orthogonal": (partial(with_layer, parametrizations.orthogonal), ""),
    "always random": (AlwaysRandom, ""),
    "timm": (partial(timm.create_model, "test_resnet", num_classes=5), ""),
    "timm, changed": (partial(timm.create_model, "test_vit", num_classes=5, img_size=32, act_layer=nn.ReLU), ""),
    "timm, handed on": (HandedOn, ""),
    "double": (lambda: Base().double(), "float32, some of its weights are torch.float64: return net.float()"),
    "two outputs in training": (TwoInTraining, "returns tuple for 2 images in training"),
    "dict": (DictOutput, "returns dict for 2 images in training"),
    "unsaved random values": (UnsavedRandom, "returns other logits"),
    "extra state with code": (UnpicklableState, "can't be saved and loaded again"),
    "a network, not a function": (Base(), "this is a network"),
    "no network": (lambda: None, "returns NoneType, not a torch.nn.Module"),
    "raises": (lambda: 1 / 0, "can't be built: ZeroDivisionError"),
}

# Of timm its test models and the smallest of many families, of torchvision one of each, all with random weights: the smallest
# image size that they take.
FAMILIES = (
    "resnet10t", "resnetv2_18", "vit_tiny_patch16_224", "convnext_atto", "convnextv2_atto", "tf_efficientnet_lite0",
    "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "lcnet_035", "regnetx_002", "densenet121",
    "deit_tiny_distilled_patch16_224", "levit_128s", "edgenext_xx_small", "repvgg_a0", "mobileone_s0", "ghostnet_050",
    "starnet_s1", "fastvit_t8", "mobilevit_xxs",
)  # fmt: skip
TORCHVISION = (
    "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0", "mobilenet_v3_small",
)  # fmt: skip
LIBRARIES = dict.fromkeys([*timm.list_models("test_*"), *FAMILIES, *(f"torchvision/{name}" for name in TORCHVISION)], 32)
