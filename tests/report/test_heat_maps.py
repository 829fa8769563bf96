"""Heat maps: what they are for networks of every kind, and that looking changes nothing."""

import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.models.batch_norm import set_train_mode
from finetune.optim.lora import add_adapters
from finetune.recipe import Lora
from finetune.report.heat_maps import OPACITY, Places, changing, find_places, heat_maps, overlay
from helpers import PREPROCESSING, SmallNet

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


def seeded(name, size, **options):
    """A timm network of 5 classes with random weights, none of them 0, in eval mode."""
    torch.manual_seed(0)
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    net = timm.create_model(name, num_classes=5, **sized | options).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():  # heads and gates that timm starts at 0
            nn.init.normal_(layer.weight, std=0.02)
    return net


def noise(n, *size, seed=0):
    return torch.randn(n, 3, *(size * 2)[:2], generator=torch.Generator().manual_seed(seed))


def of_largest(maps):
    """The positive part of maps [n, h, w], as a share of the largest value of each."""
    maps = maps.relu()
    return maps / maps.amax((1, 2), keepdim=True)


def likeliest(net, images):
    with torch.no_grad():
        return net(images).argmax(1)


def test_with_pooling_and_a_linear_layer_it_is_the_weight_times_the_features():
    """There the map is each place's part of the class's logit (Zhou et al. 2016), whatever class is asked for."""
    net, images = seeded("resnet18", 64), noise(3, 96)
    with torch.no_grad():
        features = net.forward_features(images)
    for classes in (likeliest(net, images), torch.tensor([0, 1, 2])):
        parts = torch.einsum("nchw,nc->nhw", features, net.fc.weight[classes].detach())
        torch.testing.assert_close(heat_maps(net, images, classes), of_largest(parts).nan_to_num(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name,pool", [("resnet18", "avg"), ("vit_tiny_patch16_224", "token"), ("vit_tiny_patch16_224", "avg")])
def test_it_is_the_hirescam_of_the_package_grad_cam(name, pool):
    """The same map, before it is resized: of convolutions, of tokens that are pooled, of what the last block is given."""
    gradcam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net, images = seeded(name, 96, global_pool=pool), noise(2, 96)
    layer = net.layer4 if name == "resnet18" else net.norm if pool == "avg" else net.blocks[-1].norm1
    to_grid = None if name == "resnet18" else lambda tokens: tokens[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    cam = gradcam.HiResCAM(net, [layer], reshape_transform=to_grid)
    classes = likeliest(net, images)
    cam(images, [ClassifierOutputTarget(int(one)) for one in classes])
    activations, gradients = (
        kept[0].detach() for kept in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
    )
    theirs = torch.from_numpy(cam.get_cam_image(images, layer, None, activations.numpy(), gradients.numpy(), False))
    assert find_places(net, images).grid == theirs.shape[1:]
    torch.testing.assert_close(heat_maps(net, images, classes), of_largest(theirs), rtol=0, atol=1e-5)


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


def state_of(net):
    """All of a network that looking at it might change."""
    return {
        "values": {name: value.clone() for name, value in net.state_dict(keep_vars=False).items()},
        "gradients": {name: value.grad for name, value in net.named_parameters()},
        "trained": [value.requires_grad for value in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()],
        "grad mode": torch.is_grad_enabled(),
        "random": (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


class Drawing(SmallNet):
    """With running statistics, dropout, and numbers drawn in evaluation."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop.p = nn.BatchNorm2d(8), 0.5

    def forward(self, images):
        random.random(), np.random.rand()
        return super().forward(images + 0 * torch.rand(()))


def test_looking_changes_nothing():
    """Weights, statistics, gradients, what trains, modes, hooks and random numbers are as before."""
    net, images = Drawing(), noise(4, 24)
    set_train_mode(net, "frozen")  # some of it in eval mode
    net.stem.weight.requires_grad = False
    cross_entropy(net(images), torch.arange(4)).backward()
    before = state_of(net)
    gradients = {name: grad.clone() for name, grad in before["gradients"].items() if grad is not None}
    assert heat_maps(net, images, torch.arange(4)).max() == 1
    after = state_of(net)
    for name, value in before.pop("values").items():
        assert torch.equal(after["values"][name], value)
    for name, grad in before.pop("gradients").items():
        assert after["gradients"][name] is grad and (grad is None or torch.equal(grad, gradients[name]))
    assert before == {name: value for name, value in after.items() if name in before}


def checkpointed(net):
    net.set_grad_checkpointing()
    return net


def frozen(net):
    for parameter in net.parameters():
        parameter.requires_grad = False
    return net


def with_lora(net):
    layers = [f"{name}.weight" for name, _ in net.named_modules() if name.endswith("attn.qkv")]
    add_adapters(net, dict.fromkeys(layers, Lora("attention", "qkv", lr=1e-3)), seed=0)
    return net


@pytest.mark.parametrize("change", [checkpointed, frozen, with_lora, torch.compile], ids=lambda change: change.__name__)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_how_a_network_is_trained_does_not_matter(change, pool):
    """Checkpointing, frozen layers, new adapters and torch.compile leave the map as it is."""
    plain, net = (seeded("vit_tiny_patch16_224", 32, depth=2, global_pool=pool) for _ in range(2))
    images, classes = noise(2, 32), torch.tensor([1, 3])
    torch.testing.assert_close(heat_maps(change(net), images, classes), heat_maps(plain, images, classes))


def test_autocast_rounds_the_map_and_no_more():
    """In bf16, which keeps 8 bits, it is the map in float32 within a few hundredths, and float32 itself."""
    net, images, classes = seeded("resnet18", 96), noise(2, 96), torch.tensor([1, 3])
    exact = heat_maps(net, images, classes)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = heat_maps(net, images, classes)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)


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


def squares(n, seed):
    """(images [n, 3, 32, 32] of noise with a square, its colour as the class, whether it is in the right half)."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(n, 3, 32, 32, generator=draw)
    classes, right = torch.randint(0, 2, (2, n), generator=draw)
    rows, columns = torch.randint(0, 20, (n,), generator=draw), torch.randint(0, 5, (n,), generator=draw) + 16 * right
    for image, colour, row, column in zip(images, classes, rows, columns, strict=True):
        image[colour, row : row + 12, column : column + 12] += 2
    return images, classes, right.bool()


def vit(pool):
    return lambda: seeded("vit_tiny_patch16_224", 32, patch_size=4, embed_dim=32, depth=2, num_heads=2, global_pool=pool)


@pytest.fixture(scope="module", params=[SmallNet, vit("token"), vit("avg")], ids=["convolutions", "class token", "mean token"])
def trained(request):
    """A network that tells the colours of squares apart, and such a network as it was before."""
    torch.manual_seed(0)
    net, fresh = request.param(), request.param()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        images, classes, _ = squares(32, step)
        optimizer.zero_grad()
        cross_entropy(net(images), classes).backward()
        optimizer.step()
    return net.eval(), fresh.eval()


def test_it_lies_where_the_class_is_decided(trained):
    """Of images whose class is the colour of a square, the half with the square has most of the heat, and the most heat."""
    images, classes, right = squares(64, 1000)
    net, _ = trained
    assert torch.equal(likeliest(net, images), classes)
    heat = heat_maps(net, images, classes)
    half = heat.shape[2] // 2
    there = torch.where(right, heat[..., -half:].sum((1, 2)), heat[..., :half].sum((1, 2)))
    hottest = heat.amax(1).argmax(1)
    assert there.sum() > 0.65 * heat.sum()
    assert ((hottest >= heat.shape[2] // 2) == right).float().mean() > 0.75


def test_another_network_has_another_map(trained):
    """With random weights in place of the trained ones the map is another: it tells of the network (Adebayo et al. 2018)."""
    images, classes, _ = squares(64, 1000)
    maps = torch.stack([heat_maps(net, images, classes).flatten(1) for net in trained])
    assert maps.isfinite().all()
    r = [np.corrcoef(one, other)[0, 1] for one, other in zip(*maps.numpy(), strict=True) if one.any() and other.any()]
    assert abs(np.mean(r)) < 0.5


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_the_heat_is_laid_over_what_the_network_sees(crop_mode):
    """The picture is timm's crop of the image, brighter and yellower where there is heat, and dark where there is none."""
    inputs = PREPROCESSING | {"crop_mode": crop_mode, "crop_pct": 0.8}
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 60, 3), np.uint8))
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1
    over = np.asarray(overlay(image, heat, inputs)).astype(float)
    seen = 127.5 * create_transform(**inputs)(image).permute(1, 2, 0).numpy() + 127.5
    assert over.shape == seen.shape == (32, 32, 3)
    np.testing.assert_allclose(over[12:], (1 - OPACITY) * seen[12:], atol=3)  # the colour map starts at black
    assert (over[:4, -4:, :2].mean((0, 1)) > 150 + 0.3 * over[:4, :4, :2].mean((0, 1))).all()
    np.testing.assert_array_equal(over, np.asarray(overlay(np.asarray(image), heat, inputs)))
