"""Where in a network heat maps are made: families of timm, torchvision's networks, and those of a recipe's function."""

import pytest
import torch
import torchvision
from torch import nn

from finetune.report.heat_maps import Places, changing, find_places, heat_maps
from helpers import SmallNet, likeliest, noise, seeded

FAMILIES = [  # name, image size, the grid
    ("convnext_atto", 64, (2, 2)),  # NCHW
    ("vit_tiny_patch16_224", 64, (4, 4)),  # the class token
]
MORE = [
    ("resnet18", 64, (2, 2)),
    ("efficientnet_lite0", 64, (2, 2)),
    ("mobilenetv3_small_050", 64, (2, 2)),
    ("vgg11", 64, (2, 2)),
    ("swin_tiny_patch4_window7_224", 224, (7, 7)),  # NHWC
    ("mambaout_femto", 64, (2, 2)),
    ("deit_tiny_distilled_patch16_224", 64, (4, 4)),  # two tokens before those of the patches
    ("vit_small_patch14_reg4_dinov2", 56, (4, 4)),  # five
    ("vit_small_patch16_dinov3", 64, (4, 4)),
    ("vit_base_patch32_siglip_256", 128, (4, 4)),  # attention pooling
    ("eva02_tiny_patch14_224", 56, (4, 4)),
    ("beit_base_patch16_224", 64, (4, 4)),
    ("mixer_s32_224", 224, (7, 7)),
    ("levit_128s", 224, (4, 4)),
    ("hiera_tiny_224", 224, (7, 7)),
    ("xcit_nano_12_p16_224", 64, (4, 4)),
    ("cait_xxs24_224", 64, (4, 4)),
    ("naflexvit_base_patch16_gap", 64, (4, 4)),
]


@pytest.mark.parametrize("name,size,grid", [*FAMILIES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)])
def test_each_family_has_a_map_of_its_places(name, size, grid):
    """Some class has places that speak for it, and the place of pixels that are changed is the one that changes most."""
    net, images = seeded(name, size), noise(1, size)
    places = find_places(net, images)
    heat = heat_maps(net, images.expand(5, -1, -1, -1), torch.arange(5), places)
    assert heat.shape == (5, *grid) and heat.dtype == torch.float32 and heat.isfinite().all() and heat.max() == 1
    other, side = images.clone(), size // grid[0]
    other[..., :side, -side:] *= -3  # the upper right corner
    one, two = (output_at(net, places, pixels) for pixels in (images, other))
    if not name.startswith(("levit", "vgg", "mobilenetv3", "efficientnet", "resnet")):  # whose last places see all of an image
        assert places.sum_channels((one - two).abs()).flatten().argmax() == grid[1] - 1


def output_at(net, places, images):
    """The tensor that a network's maps are made of."""
    outputs = []
    with torch.no_grad(), changing(net, places, lambda output: outputs.append(output) or output):
        net(images)
    return outputs[0]


class Tokens(torchvision.models.VisionTransformer):
    def __init__(self):
        super().__init__(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
        nn.init.normal_(self.heads.head.weight)


class Windows(torchvision.models.SwinTransformer):
    def __init__(self):
        super().__init__([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=5)


class TwoLevels(nn.Module):
    """Pools a feature map and one made of it: what the logits see of an image passes through the first."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, images):
        early = self.early(images).relu()
        return self.fc(torch.cat([early.mean((2, 3)), self.late(early).relu().mean((2, 3))], 1))


class Pixels(nn.Sequential):
    """A network without places."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))


@pytest.mark.parametrize(
    "net,expected",
    [
        (SmallNet, ("body", "NCHW", (7, 7))),
        (TwoLevels, ("early", "NCHW", (8, 8))),
        (Tokens, ("encoder.layers.encoder_layer_1.ln_1", "NLC", (4, 4))),
        (Windows, ("permute", "NCHW", (8, 8))),
        (lambda: torchvision.models.resnet18(num_classes=5), ("layer3", "NCHW", (2, 2))),  # of layer4 a single place is left
        (Pixels, None),
    ],
    ids=["own", "branches", "torchvision's tokens", "torchvision's windows", "torchvision's convolutions", "none"],
)
def test_networks_of_other_sources_have_a_map_too(net, expected):
    """The tensor is the last that all goes through, found without a name; a network that sees no places has no map."""
    torch.manual_seed(0)
    net, images = net(), noise(2, 32)
    places = find_places(net, images)
    assert places == (expected and Places(expected[0], 0, *expected[1:]))
    heat = heat_maps(net, images, likeliest(net.eval(), images))
    assert heat is None if expected is None else heat.shape == (2, *expected[2])


def test_images_need_not_be_square():
    """Tokens are laid out as the patches are: 2 rows of 4 from an image of 32 x 64 pixels."""
    net = seeded("vit_tiny_patch16_224", (32, 64), depth=2)
    assert find_places(net, torch.rand(1, 3, 32, 64)) == Places("blocks.1.norm1", 0, "NLC", (2, 4))


def test_attention_that_pools_is_no_place():
    """It is the tokens that attention pooling is given, not the keys and values that it makes of them."""
    assert find_places(seeded("vit_tiny_patch16_224", 32, depth=2, global_pool="map"), noise(1, 32)).module == "norm"
