"""Learning rate, weight decay and optimizer of every parameter, on real architectures."""

import re

import pytest
import timm
import timm.optim
import torch

from finetune.images.transforms import training_transform
from finetune.models.backbone import build_backbone, meta_backbone
from finetune.models.pretrained import preprocessing
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups, no_weight_decay, param_group_table, set_lrs
from finetune.recipe import SGD, AdamW, Constant, Data, Group, LayerDecay, Optimizer, Plateau
from finetune.recipe.load import load_recipe
from finetune.utils.errors import RecipeError
from helpers import ROOT, SmallNet, small_recipe

ARCHITECTURES = [
    "resnet18",
    "resnet50",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
]


def layered(name):
    """(network on the meta device, its groups) with LayerDecay."""
    recipe = small_recipe(backbone=name, head=None, groups=LayerDecay(head_lr=1e-3, stem_ratio=0.01, unfreeze_at=2))
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=10)
    return net, build_param_groups(recipe, net)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.py")), ids=lambda file: file.stem)
def test_every_recipe_fits_its_real_architecture(file):
    """Every shipped recipe's rows, optimizer and transforms fit the network it names, each parameter in one row."""
    recipe, _ = load_recipe(str(file))
    net = meta_backbone(recipe)
    groups = build_param_groups(recipe, net)
    claimed = [name for group in groups for name in group.params]
    assert sorted(claimed) == sorted(name for name, _ in net.named_parameters())
    held = [parameter for row in build_optimizer(groups).param_groups for parameter in row["params"]]
    assert set(map(id, held)) == {id(p) for group in groups if group.ever_trains for p in group.params.values()}
    training_transform(recipe, preprocessing(recipe, net))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_decay_covers_every_parameter_once_with_the_head_alone_on_top(name):
    """LayerDecay: groups are disjoint, complete, ordered by lr; the head group is the classifier and nothing else."""
    net, groups = layered(name)
    claimed = [n for group in groups for n in group.params]
    assert len(claimed) == len(set(claimed)) and set(claimed) == {n for n, _ in net.named_parameters()}
    classifier = {id(p) for p in net.get_classifier().parameters()}
    assert {id(p) for p in groups[0].params.values()} == classifier and groups[0].name == "head"
    lrs = [group.lr for group in groups]
    assert lrs == sorted(lrs, reverse=True) and len(set(lrs)) == len(lrs)
    assert lrs[-1] / lrs[0] == pytest.approx(0.01)
    assert [group.unfreeze_at for group in groups] == [0] + [2] * (len(groups) - 1)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_layer_decay_is_timms(name):
    """Stated as an exponent, the same learning rates come out of timm's param_groups_layer_decay."""
    net, groups = layered(name)
    exponent = 0.01 ** (1 / (len(groups) - 1))
    theirs = {
        id(p): row["lr_scale"] for row in timm.optim.param_groups_layer_decay(net, layer_decay=exponent) for p in row["params"]
    }
    for group in groups:
        for p in group.params.values():
            assert group.lr == pytest.approx(1e-3 * theirs[id(p)], rel=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_decays_is_what_timm_decays(name):
    """Decay spares just what timm's own optimizer factory spares."""
    net, groups = layered(name)
    theirs = timm.optim.create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.05)
    decayed_there = {id(p) for row in theirs.param_groups for p in row["params"] if row["weight_decay"]}
    ours = {n for group in groups for n in group.decay}
    theirs = {n for n, p in net.named_parameters() if id(p) in decayed_there}
    assert ours == theirs and ours


FAMILIES = {timm.models._registry._model_to_module[name]: name for name in sorted(timm.list_models(), key=len, reverse=True)}
NAMING = ("xcit_nano_12_p8_224", "cait_xxs24_224", "crossvit_9_240", "levit_128", "tiny_vit_5m_224")  # more than a few names


@pytest.mark.parametrize("name", [*NAMING, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES.values())])
def test_what_a_network_names_never_decays(name):
    """Whatever timm spares in a network of each of its families, by name or by pattern, is spared, and scales besides."""
    with torch.device("meta"):
        net = timm.create_model(name)
    named = getattr(net, "no_weight_decay", set)()
    theirs = timm.optim.param_groups_weight_decay(net, 0.05, no_weight_decay_list=named)
    spared = {id(p) for row in theirs if not row["weight_decay"] for p in row["params"]}
    ours = no_weight_decay(net)
    assert {n for n, p in net.named_parameters() if id(p) in spared} <= ours
    assert all(p.numel() == max(p.shape) for n, p in net.named_parameters() if n in ours and id(p) not in spared)


@pytest.mark.parametrize(
    "name,spared",
    [
        ("vit_tiny_patch16_224", ["cls_token", "pos_embed"]),
        ("swin_tiny_patch4_window7_224", ["layers.0.blocks.0.attn.relative_position_bias_table"]),
        ("fastvit_t8", ["stages.0.blocks.0.layer_scale.gamma", "stem.0.conv_kxk.0.bn.bias"]),  # a gamma of 4 axes
    ],
)
def test_tokens_tables_and_scales_never_decay(name, spared):
    """Parameters of several axes that are no weights are spared."""
    _, groups = layered(name)
    spared_here = {n for group in groups for n in group.no_decay}
    assert set(spared) <= spared_here


def test_a_weight_of_one_output_decays():
    """The [1, C] weight of a binary head is a weight, though it is a vector by shape; a small table is no vector."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Flatten(), torch.nn.Sequential(torch.nn.Linear(5, 1)))
    net.scale, net.table = torch.nn.Parameter(torch.ones(1, 5, 1)), torch.nn.Parameter(torch.ones(2, 3))
    groups = build_param_groups(small_recipe(groups=(Group("all", ".", lr=1.0),)), net)
    assert set(groups[0].decay) == {"0.weight", "2.0.weight", "table"}


@pytest.mark.parametrize("optimizer", [AdamW(), Optimizer("Adam"), Optimizer("lion")], ids=lambda o: o.name)
def test_the_first_step_moves_each_group_by_its_lr(optimizer):
    """The first step of Adam and of Lion is the learning rate itself, so each group must move by its own."""
    recipe = small_recipe(optimizer=optimizer, schedule=Constant(warmup_epochs=5.0, warmup_start=1e-9), epochs=6)
    net = SmallNet()
    groups = build_param_groups(recipe, net)
    opt = build_optimizer(groups)
    set_lrs(opt, groups, 25, 10, 4, ())  # the middle of the third epoch
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p) + torch.rand_like(p)
    opt.step()
    for group in groups:
        for n, p in group.params.items():
            assert (before[n] - p).abs().max().item() == pytest.approx(0.5 * group.lr, rel=0.01)


def test_decay_reaches_weights_only():
    """With zero gradients AdamW shrinks the decaying parameters by lr x decay and leaves the others, bit for bit."""
    recipe = small_recipe(optimizer=AdamW(weight_decay=0.1))
    net = SmallNet()
    groups = build_param_groups(recipe, net)
    opt = build_optimizer(groups)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for group in groups:
        for n, p in group.decay.items():
            torch.testing.assert_close(p.detach(), before[n] * (1 - group.lr * 0.1))
        for n, p in group.no_decay.items():
            assert torch.equal(p, before[n])
    assert {n for group in groups for n in group.decay} == {"stem.weight", "body.weight", "fc.weight"}


def test_the_first_row_that_matches_a_names_start_claims():
    """Rows are tried in order, on the start of a name: an early narrow pattern wins, one of a name's middle finds nothing."""
    rows = (Group("bias", r"body\.bias", lr=1.0), Group("norm", "norm|bias", lr=2.0), Group("rest", ".", lr=3.0))
    bias, norm, rest = build_param_groups(small_recipe(groups=rows), SmallNet())
    assert list(bias.params) == ["body.bias"] and list(norm.params) == ["norm.weight", "norm.bias"]
    assert sorted(rest.params) == ["body.weight", "fc.bias", "fc.weight", "stem.bias", "stem.weight"]


def test_a_row_brings_its_own_columns_or_the_recipes():
    """What a row leaves open is the recipe's, or its own optimizer's; a decay of 0 in a row is one; frozen rows never train."""
    own, schedule = SGD(weight_decay=0.3), Plateau(mode="min")
    rows = (
        Group("a", "fc", lr=1.0, weight_decay=0.0),
        Group("b", "body", lr=2.0, optimizer=own, schedule=schedule, unfreeze_at=1, warmup_epochs=0.5),
        Group("c", "norm", lr=3.0, optimizer=own, weight_decay=0.1),
        Group("d", ".", lr=0),
    )
    recipe = small_recipe(groups=rows, metric="macro_f1")
    a, b, c, d = groups = build_param_groups(recipe, SmallNet())
    assert [group.weight_decay for group in groups] == [0.0, 0.3, 0.1, 0.05]
    assert [group.optimizer for group in groups] == [recipe.optimizer, own, own, recipe.optimizer]
    assert [group.schedule for group in groups] == [recipe.schedule, schedule, recipe.schedule, recipe.schedule]
    assert [group.watched_metric for group in groups] == ["macro_f1", "loss", "macro_f1", "macro_f1"]
    assert [group.warmup_epochs for group in groups] == [0.0, 0.5, 0.0, 0.0]
    assert [(group.name, group.lr, group.unfreeze_at) for group in groups[:3]] == [("a", 1.0, 0), ("b", 2.0, 1), ("c", 3.0, 0)]
    assert d.name == "d" and not d.ever_trains and not d.trains(10**9) and set(d.params) == {"stem.weight", "stem.bias"}


def test_rows_that_do_not_fit_are_all_named():
    """Unused rows, shadowed rows and unclaimed parameters come in one message, with the model's own names."""
    rows = (Group("head", "fc", lr=1.0), Group("again", r"fc\.b", lr=1.0), Group("top", "layer5", lr=1.0))
    recipe = small_recipe(groups=rows)
    with pytest.raises(RecipeError) as caught:
        build_param_groups(recipe, SmallNet())
    for text in (
        "the recipe's groups do not fit",
        "group 'again' (pattern 'fc\\.b') matches no parameter that an earlier row has not taken",
        "group 'top' (pattern 'layer5') matches no parameter\n",
        "no group matches 6 parameters, the first of them 'stem.weight'",
        "the model's top-level names are: stem, norm, body, fc",
    ):
        assert text in str(caught.value)
    for left, pattern in {"1 parameter, .* 'fc.bias'": r"(?!fc\.bias)", "2 parameters, .* 'fc.weight'": "(?!fc)"}.items():
        with pytest.raises(RecipeError, match=f"no group matches {left}\n"):
            build_param_groups(small_recipe(groups=(Group("all", pattern, lr=1.0),)), SmallNet())


def test_layer_decay_needs_a_model_that_knows_its_layers():
    """For a network without group_matcher the remedy is named."""
    with pytest.raises(RecipeError, match="SmallNet.* does not state its layers .*; write the groups as rows"):
        build_param_groups(small_recipe(groups=LayerDecay(head_lr=1.0, stem_ratio=0.1)), SmallNet())


@pytest.mark.parametrize(
    "optimizer,fault",
    [
        (AdamW(betaz=1), "has no option 'betaz'. Did you mean betas?"),
        (AdamW(betas=(2, 2)), "refuses its options: Invalid beta parameter"),
        (SGD(momentum=0.0, nesterov=True), "refuses its options: Nesterov momentum requires"),
        (Optimizer("AdmaW"), "no optimizer 'AdmaW'. Did you mean AdamW?"),
        (Optimizer("Rprop", weight_decay=0.1), "has no weight_decay"),
        (Optimizer("SparseAdam"), "works on sparse gradients only"),
    ],
)
def test_wrong_optimizers_are_named(optimizer, fault):
    """An optimizer that does not exist, or not with these options, is refused before training."""
    with pytest.raises(RecipeError) as caught:
        build_optimizer(build_param_groups(small_recipe(optimizer=optimizer), SmallNet()))
    assert fault in str(caught.value)


def test_the_table_shows_each_group():
    """A line a group: its sizes, first, highest and last lr, decay and what it spares, optimizer, epoch; then the sums."""
    rows = (
        Group("head", "fc", lr=1e-2, optimizer=SGD(weight_decay=0.3)),
        Group("body", "body", lr=1e-3, unfreeze_at=2),
        Group("rest", ".", lr=0),
    )
    groups = build_param_groups(small_recipe(groups=rows), SmallNet())
    text = param_group_table(groups, {"head": [1e-4, 0.01234, 2e-5], "body": [3e-3], "rest": []}, wide=True)
    assert [re.split(r"  +", line.strip()) for line in text.splitlines()] == [
        [
            *("group", "tensors", "parameters", "first lr", "peak lr", "last lr"),
            *("weight decay", "without decay", "optimizer", "from epoch"),
        ],
        ["head", "2", "119", "0.0001", "0.012", "2e-05", "0.3", "1 of 2", "SGD", "1"],
        ["body", "2", "1,168", "0.003", "0.003", "0.003", "0.05", "1 of 2", "AdamW", "3"],
        ["rest", "4", "240", "-", "-", "-", "-", "-", "frozen", "never"],
        ["all", "8", "1,527"],
    ]
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1  # numbers stand under one another, to the right


def test_a_default_lr_for_what_is_not_named():
    """Two linear layers of a classifier at 1e-2 and everything else at 1e-5, by two rows."""
    recipe = small_recipe(
        backbone="torchvision/vgg11",
        head=None,
        data=Data("digits", 64, 8),
        groups=(Group("classifier", r"classifier\.[36]", lr=1e-2), Group("rest", ".", lr=1e-5)),
    )
    with torch.device("meta"):
        net = build_backbone(recipe, 10)
    lrs = {name: group.lr for group in build_param_groups(recipe, net) for name in group.params}
    assert {name for name, lr in lrs.items() if lr == 1e-2} == {
        f"classifier.{i}.{kind}" for i in (3, 6) for kind in ("weight", "bias")
    }
    assert set(lrs) == {name for name, _ in net.named_parameters()} and set(lrs.values()) == {1e-2, 1e-5}
