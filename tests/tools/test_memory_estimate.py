"""The plan's layers are the network's, and its bytes are those that a real network takes."""

import gc
import math
import re

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.nn.modules import module as torch_module

from finetune.models.backbone import build_backbone, memory_format, meta_backbone
from finetune.models.batch_norm import set_train_mode
from finetune.optim.freezing import unfreeze
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, AdamW, Data, Group, LayerDecay, Optimizer, Switch
from finetune.recipe.load import load_recipe
from finetune.tools.memory_estimate import layer_table, memory_table, stage_memory
from helpers import SmallNet, small_recipe

ARCHITECTURES = [
    "resnet18",
    "resnet50",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
    "efficientformer_l1",
    "torchvision/vgg11",
    SmallNet,
]
HEADS = r"fc\.|head\.|head_dist|classifier\."


class ShiftedNet(SmallNet):
    """A network with a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)

    def forward(self, images):
        return super().forward(images - self.mean)


def recipe_for(backbone, size=224, **changes):
    """The head alone in epoch 0, everything from epoch 1."""
    groups = (Group("head", HEADS, lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=1))
    fields = {"groups": groups, "data": Data("generated", size, 8), **changes}
    return small_recipe(backbone=backbone, head="fc" if callable(backbone) else None, **fields)


def planned(recipe):
    """(recipe, network on the meta device, groups), as the tables of a plan take them."""
    net = meta_backbone(recipe)
    return recipe, net, build_param_groups(recipe, net)


def columns(text):
    """The cells of a table by title, the first column's as they are, the others right-aligned under their titles."""
    lines = text.splitlines()
    found, start = {}, 0
    for title in re.finditer(r"\S+( \S+)*", lines[0]):
        cells = [line[start : title.end()] if start else line[: max(map(len, lines))].split()[0] for line in lines[1:]]
        found[title[0]], start = [cell.strip() for cell in cells], title.end()
    return found


def real_network(recipe, epoch):
    """The network on the CPU with weights, as the epoch trains it, and its groups."""
    torch.manual_seed(0)
    net = build_backbone(recipe, 10)
    groups = build_param_groups(recipe, net)
    unfreeze(groups, epoch)
    set_train_mode(net, recipe.batch_norm)
    return net, groups


@pytest.mark.parametrize("backbone", ARCHITECTURES, ids=str)
def test_the_layers_have_every_parameter_once(backbone):
    """The parameters of the rows add up to the network's, and each layer's are those of its module."""
    recipe, net, groups = planned(recipe_for(backbone))
    table = columns(layer_table(recipe, net, groups))
    counts = [int(count.replace(",", "")) for count in table["parameters"]]
    assert table["layer"][-1] == "all" and counts[-1] == sum(counts[:-1]) == sum(p.numel() for p in net.parameters())
    modules = dict(net.named_modules())
    for name, count in zip(table["layer"][:-1], counts, strict=False):
        own = modules[name].parameters() if name in modules else [net.get_parameter(name)]
        assert count == sum(p.numel() for p in own)


@pytest.mark.parametrize("backbone,size", [("resnet18", 64), ("vit_tiny_patch16_224", 32), ("mobilenetv3_small_050", 64)])
def test_the_layers_are_those_of_a_real_forward_pass(backbone, size):
    """The layers come in the order, and return the shapes, that hooks see in a pass of one real image."""
    recipe = recipe_for(backbone, size)
    table = columns(layer_table(*planned(recipe)))
    shapes = {name: shape for name, shape in zip(table["layer"], table["output"], strict=True) if shape}
    net, seen = build_backbone(recipe, 10).eval(), {}
    for name in shapes:
        net.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.shape})
        )
    net(torch.zeros(1, 3, size, size))
    assert list(seen) == list(shapes)
    assert {name: " x ".join(map(str, shape[1:])) for name, shape in seen.items()} == shapes


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "convnext_atto", "tf_efficientnet_lite0"])
def test_the_shapes_are_timms(backbone):
    """The layers that timm names as stages have the channels and the reduction that timm states."""
    recipe, net, groups = planned(recipe_for(backbone))
    table = columns(layer_table(recipe, net, groups))
    stages = [info for info in net.feature_info if info["module"] in "\n".join(table["layer"])]
    assert len(stages) >= 4
    for info in stages:
        last = [i for i, name in enumerate(table["layer"]) if f"{name}.".startswith(f"{info['module']}.")][-1]
        side = 224 // info["reduction"]
        assert table["output"][last] == f"{info['num_chs']} x {side} x {side}"


def test_the_layers_name_who_trains_them():
    """A layer has its groups and their first epochs, or never; of more than two the first and the last."""
    rows = (
        Group("head", "fc", lr=1.0),
        Group("bias", r"body\.bias", lr=1.0, unfreeze_at=2),
        Group("norm", "norm", lr=0),
        Group("body", "body", lr=1.0, unfreeze_at=1),
        Group("stem", "stem", lr=1.0),
    )
    table = columns(layer_table(*planned(small_recipe(groups=rows))))
    assert table["layer"] == ["stem", "norm", "body", "fc", "all"]
    assert table["group"] == ["stem", "norm", "bias, body", "head", ""]
    assert table["from epoch"] == ["1", "never", "2, 3", "1", ""]
    recipe = recipe_for("resnet18", groups=LayerDecay(head_lr=1.0, stem_ratio=0.1, unfreeze_at=1))
    table = columns(layer_table(*planned(recipe)))
    assert dict(zip(table["layer"], table["group"], strict=True))["layer4.1"] == "layer08"
    recipe = recipe_for("swin_tiny_patch4_window7_224", groups=LayerDecay(head_lr=1.0, stem_ratio=0.1))
    _, net, groups = planned(recipe)
    table = columns(layer_table(recipe, net, groups, math.inf))
    own = [group.name for group in groups if any(name.startswith("layers.2.") for name in group.params)]
    assert dict(zip(table["layer"], table["group"], strict=True))["layers.2"] == f"{own[0]} .. {own[-1]}"


def allocated(recipe, epoch, images):
    """Bytes that are there after a real forward pass and were not before, by torch.profiler, and the images'."""
    net, _ = real_network(recipe, epoch)
    size = recipe.data.image_size
    batch = torch.rand(images, 3, size, size).contiguous(memory_format=memory_format(recipe, net))
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logits = net(batch)
    assert logits.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()) + batch.nbytes


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(
    "backbone,size,batch_norm,checkpointing",
    [
        ("test_resnet", 64, "train", False),
        ("resnet18", 64, "frozen", True),
        ("vit_tiny_patch16_224", 64, "frozen", False),
        ("vit_tiny_patch16_224", 64, "frozen", True),
        ("torchvision/mobilenet_v3_small", 32, "frozen", False),
        (ShiftedNet, 32, "frozen", False),
    ],
)
def test_activations_are_what_a_real_pass_leaves(backbone, size, batch_norm, checkpointing, epoch):
    """The bytes of activations are what the allocator has handed out by the end of a real forward pass, and not taken back.

    To 0.1 %, the allocator rounds up; with checkpoints also to the generator's state that each of at most 12 keeps.
    """
    recipe = recipe_for(backbone, size, batch_norm=batch_norm, gradient_checkpointing=checkpointing)
    found = stage_memory(*planned(recipe), epoch, 6)["activations"]
    spare = 12 * torch.get_rng_state().nbytes if checkpointing and epoch else 0
    real = allocated(recipe, epoch, 6)
    assert 0.999 * (real - spare) <= found <= 1.001 * real


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224"])
def test_frozen_layers_and_checkpoints_save_memory(backbone):
    """The head alone takes less than 0.4 of the activations of everything, and checkpoints leave less than 0.6."""
    recipe = recipe_for(backbone, 64)
    head, everything = (stage_memory(*planned(recipe), epoch, 8)["activations"] for epoch in (0, 1))
    recipe = recipe_for(backbone, 64, gradient_checkpointing=True)
    assert head < 0.4 * everything
    assert head < stage_memory(*planned(recipe), 1, 8)["activations"] < 0.6 * everything


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(),
        AdamW(amsgrad=True),
        SGD(),
        SGD(momentum=0.9),
        Optimizer("Adagrad"),
        Optimizer("RMSprop"),
        Optimizer("lamb"),
        Optimizer("muon"),
    ],
    ids=str,
)
def test_the_optimizers_state_is_the_real_ones(optimizer):
    """In every stage the bytes of the state are those that the real optimizer would save after a real step."""
    recipe = small_recipe(optimizer=optimizer)
    for epoch in range(3):
        net, groups = real_network(recipe, epoch)
        real = build_optimizer(groups)
        net(torch.rand(2, 3, 24, 24)).sum().backward()
        real.step()
        state = [value for row in real.state_dict()["state"].values() for value in row.values()]
        assert stage_memory(*planned(recipe), epoch, 2)["optimizer"] == sum(
            value.nbytes for value in state if isinstance(value, torch.Tensor)
        )


@pytest.mark.parametrize("optimizer", [Optimizer("LBFGS"), Optimizer("Adafactor")], ids=str)
def test_an_unknown_state_is_said(optimizer):
    """A state that can't be found without numbers is left out, and the sum is then a lower bound."""
    data = Data("generated", image_size=24, batch_size=2)
    recipe = small_recipe(optimizer=optimizer, groups=(Group("all", ".", lr=1.0),), data=data)
    assert "optimizer" not in stage_memory(*planned(recipe), 0, 2)
    row = memory_table(*planned(recipe)).splitlines()[1]
    assert "unknown" in row and "  > 0.0" in row


def test_parameters_and_their_average_are_the_real_ones():
    """Parameters and buffers, and the moving average's, take the bytes that the tensors on the CPU take."""
    recipe = recipe_for("resnet18", 64, ema_decay=0.9)
    stage, net = stage_memory(*planned(recipe), 0, 2), build_backbone(recipe, 10)
    assert stage["parameters"] == sum(t.nbytes for t in net.state_dict().values())
    assert stage["average"] == sum(t.nbytes for t in ModelEmaV3(net).module.state_dict().values())
    assert "average" not in stage_memory(*planned(recipe_for("resnet18", 64)), 0, 2)


def test_the_table_has_every_stage_and_its_sum():
    """A row for each epoch in which something unfreezes, with the optimizer that holds then; MiB that add up."""
    recipe = recipe_for(
        "resnet18",
        64,
        groups=(
            Group("head", "fc", lr=1.0),
            Group("top", r"layer4", lr=1.0, unfreeze_at=1),
            Group("stem", r"conv1|bn1", lr=0),
            Group("rest", r"layer", lr=1.0, unfreeze_at=3),
        ),
        switch=Switch(at=3, optimizer=SGD(momentum=0.9)),
        ema_decay=0.9,
        data=Data("generated", 64, 4),
    )
    _, net, groups = planned(recipe)
    text = memory_table(recipe, net, groups)
    table = columns("\n".join(text.splitlines()[:-3]))
    assert table["from epoch"] == ["1", "2", "4"] and table["trains"] == ["head", "head, top", "head .. rest"]
    assert table["trained parameters"][-1] == f"{sum(p.numel() for p in net.parameters()) - 9408 - 128:,}"
    parts = ("parameters", "gradients", "optimizer", "average", "activations")
    mib = {name: [float(cell) for cell in table[name]] for name in (*parts, "sum")}
    assert mib["optimizer"][1] == pytest.approx(2 * mib["gradients"][1], abs=0.15)
    assert mib["optimizer"][2] == mib["gradients"][2] > 0
    for i, total in enumerate(mib["sum"]):
        assert total == pytest.approx(sum(mib[name][i] for name in parts), abs=0.3)
        assert total == pytest.approx(sum(stage_memory(recipe, net, groups, (0, 1, 3)[i], 4).values()) / 2**20, abs=0.05)
    assert "4 images at once" in text


def test_the_network_stays_as_it_was():
    """Looking leaves every tensor, flag, mode, gradient and hook of the network, and torch's own hooks, alone."""
    recipe = recipe_for("test_resnet", 64)
    _, net, groups = planned(recipe)
    net.train()
    net.bn1.eval()
    net.fc.weight.requires_grad = False

    def state():
        tensors = [*net.named_parameters(), *net.named_buffers()]
        return [(name, id(tensor), tensor.requires_grad, tensor.grad) for name, tensor in tensors], [
            (name, module.training, len(module._forward_hooks)) for name, module in net.named_modules()
        ]

    before = state()
    layer_table(recipe, net, groups)
    memory_table(recipe, net, groups)
    assert state() == before and not torch_module._global_forward_hooks


@pytest.mark.parametrize("name", ["efficientnet_lite0_elpv", "resnet50_cifar100", "vit_small_cifar100"])
def test_a_recipes_plan_fits_a_screen(name):
    """The layers and the stages of recipes of each family are lines of at most 120 characters."""
    plan = planned(load_recipe(name)[0])
    lines = f"{layer_table(*plan)}\n{memory_table(*plan)}".splitlines()
    assert len(lines) > 15 and max(map(len, lines)) <= 120
