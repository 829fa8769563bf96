"""Heat maps: what they are for networks of every kind, and that looking changes nothing."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.models.batch_norm import set_train_mode
from finetune.optim.lora import add_adapters
from finetune.recipe import Lora
from finetune.report.heat_maps import OPACITY, find_places, heat_maps, overlay
from helpers import PREPROCESSING, SmallNet, likeliest, noise, seeded


def of_largest(maps):
    """The positive part of maps [n, h, w], as a share of the largest value of each."""
    maps = maps.relu()
    return maps / maps.amax((1, 2), keepdim=True)


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


def test_images_do_not_depend_on_one_another():
    """However many there are, each has the map that it has alone."""
    net, images, classes = SmallNet(), noise(40, 24), torch.arange(40) % 7
    alone = torch.cat([heat_maps(net, *one) for one in zip(images.split(1), classes.split(1), strict=True)])
    torch.testing.assert_close(heat_maps(net, images, classes), alone)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_gpu_gives_the_same_map(name):
    """Of a network on the GPU, and images on the CPU, the map is on the CPU and as computed there."""
    net, images, classes = seeded(name, 64), noise(2, 64), torch.tensor([1, 3])
    here = heat_maps(net, images, classes)
    torch.testing.assert_close(heat_maps(net.cuda(), images, classes), here, rtol=0, atol=1e-2)


def test_autocast_rounds_the_map_and_no_more():
    """In bf16, which keeps 8 bits, it is the map in float32 within a few hundredths, and float32 itself."""
    net, images, classes = seeded("resnet18", 96), noise(2, 96), torch.tensor([1, 3])
    exact = heat_maps(net, images, classes)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = heat_maps(net, images, classes)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)


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
