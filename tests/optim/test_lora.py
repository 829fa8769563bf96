"""LoRA rows: peft's networks, steps and files, on timm's networks."""

import copy
import dataclasses
import json

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.optim.freezing import unfreeze
from finetune.optim.lora import adapters, load_adapter, merged, save_adapter
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import AdamW, Augment, Constant, Data, Group, LinearProbe, Lora, Recipe
from finetune.recipe.load import override
from finetune.recipe.serialize import from_dict, to_dict
from finetune.run import main
from finetune.utils.errors import RecipeError
from helpers import Cut, SmallNet, cut_before, prepare, run_here, same_tensors, small_recipe

VIT = (Group("head", "head", lr=1e-2), Lora("attention", r"blocks\.\d+\.attn\.(qkv|proj)", lr=1e-2), Group("rest", ".", lr=0))
RESNET = (Group("head", "fc", lr=1e-2), Lora("convs", r"layer[34].*conv\d", lr=1e-2, rank=4), Group("rest", ".", lr=0))
NETS = {"test_vit": (VIT, 160), "test_resnet": (RESNET, 64)}


@pytest.fixture
def peft():
    """The library that LoRA is compared with; the lowest versions are tried without."""
    return pytest.importorskip("peft")


def lora_recipe(name, **changes):
    groups, size = NETS[name]
    recipe = Recipe(
        backbone=name,
        weights="none",
        data=Data("generated", size, 8),
        groups=groups,
        optimizer=AdamW(weight_decay=0.05),
        schedule=Constant(),
        epochs=3,
        batch_norm="frozen",
        clip_norm=None,
    )
    return dataclasses.replace(recipe, **changes)


def with_adapters(name, **changes):
    """(network with adapters that change it, recipe, groups)."""
    torch.manual_seed(0)
    net, recipe = timm.create_model(name, num_classes=7), lora_recipe(name, **changes)
    groups = build_param_groups(recipe, net)
    for part in adapters(net).values():
        nn.init.normal_(part.B.weight, std=0.05)
    return net, recipe, groups


@pytest.mark.parametrize("name", NETS)
def test_steps_are_those_of_peft(name, peft):
    """From peft's own start, losses, adapters and head of twenty steps of AdamW are those of peft's network in a bare loop."""
    torch.manual_seed(0)
    plain, recipe = timm.create_model(name, num_classes=7), lora_recipe(name)
    net = copy.deepcopy(plain)
    groups = build_param_groups(recipe, net)
    head, row = recipe.groups[0].pattern, recipe.groups[1]
    config = peft.LoraConfig(r=row.rank, lora_alpha=row.alpha, target_modules=list(adapters(net)), modules_to_save=[head])
    theirs = peft.get_peft_model(plain, config)
    state = peft.get_peft_model_state_dict(theirs)
    for layer, part in adapters(net).items():
        part.A.weight.data.copy_(state[f"base_model.model.{layer}.lora_A.weight"])
        assert not part.B.weight.any()
    unfreeze(groups, 0)
    optimizer = build_optimizer(groups)
    trained = {key: value for key, value in theirs.named_parameters() if value.requires_grad}
    biases = [value for key, value in trained.items() if key.endswith("bias")]
    others = [value for key, value in trained.items() if not key.endswith("bias")]
    reference = torch.optim.AdamW([{"params": others, "weight_decay": 0.05}, {"params": biases, "weight_decay": 0}], lr=1e-2)
    assert sum(value.numel() for value in trained.values()) == sum(group.num_values for group in groups if group.trains(0))
    for step in range(20):
        images, labels = torch.randn(4, 3, NETS[name][1], NETS[name][1]), torch.arange(4)
        losses = []
        for model, steps in ((net.eval(), optimizer), (theirs.eval(), reference)):
            loss = cross_entropy(model(images), labels)
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), step
    state = peft.get_peft_model_state_dict(theirs)
    for layer, part in adapters(net).items():
        for side, own in part.sides():
            torch.testing.assert_close(own.weight, state[f"base_model.model.{layer}.lora_{side}.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_merged_is_unmerged(name):
    """The plain network computes the same logits, peft's merging the same weights; afterwards all is as it was, to the bit."""
    net, _, _ = with_adapters(name)
    images = torch.randn(3, 3, NETS[name][1], NETS[name][1])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    logits = net.eval()(images)
    with merged(net):
        torch.testing.assert_close(net(images), logits, rtol=0, atol=1e-5)
        assert net.state_dict().keys() == timm.create_model(name, num_classes=7).state_dict().keys()
    assert same_tensors(before, net.state_dict()) and torch.equal(net(images), logits)


@pytest.mark.parametrize("name", NETS)
def test_peft_reads_the_saved_adapter_and_the_other_way_round(tmp_path, name, peft):
    """peft's network with the saved folder gives the same logits, and what peft saves gives them here."""
    net, recipe, _ = with_adapters(name)
    head = recipe.groups[0].pattern
    images = torch.randn(3, 3, NETS[name][1], NETS[name][1])
    logits = net.eval()(images)
    save_adapter(tmp_path / "ours", net, [head])
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=7)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(images), logits, rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    rows = (recipe.groups[0], dataclasses.replace(recipe.groups[1], start=str(tmp_path / "theirs")), recipe.groups[2])
    build_param_groups(lora_recipe(name, groups=rows), plain)
    torch.testing.assert_close(plain.eval()(images), logits, rtol=0, atol=1e-5)


def test_dropout_is_that_of_peft(tmp_path, peft):
    """In training, from one seed, the logits are those of peft's network with the same dropout, and others than without."""
    net, _, _ = with_adapters("test_vit", groups=(VIT[0], dataclasses.replace(VIT[1], dropout=0.5), VIT[2]))
    save_adapter(tmp_path, net, ["head"])
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(timm.create_model("test_vit", num_classes=7), str(tmp_path), is_trainable=True)
    images, logits = torch.randn(2, 3, 160, 160), []
    for model, training in ((net, True), (theirs, True), (net, False)):
        torch.manual_seed(1)
        logits.append(model.train(training)(images))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-2


def test_rows_of_two_ranks_and_a_rank_stabilised_adapter(tmp_path, peft):
    """peft reads ranks and alphas that differ by row; alpha / sqrt(rank) is read from peft."""
    groups = (
        Group("head", "head", lr=1e-2),
        Lora("first", r"blocks\.0\.", lr=1e-2, rank=2, alpha=3),
        Lora("others", r"blocks\.\d+\.mlp", lr=1e-3, rank=5, alpha=7),
        Group("rest", ".", lr=0),
    )
    net, _, made = with_adapters("test_vit", groups=groups)
    sizes = {group.name: len(group.params) for group in made}
    assert (sizes["first"], sizes["others"], sizes["first-frozen"]) == (8, 4 * (len(net.blocks) - 1), 12)
    images = torch.randn(2, 3, 160, 160)
    save_adapter(tmp_path / "ours", net, ["head"])
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=7)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(images), net.eval()(images), rtol=0, atol=1e-5)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, target_modules=r"blocks\.0\.attn\.qkv", init_lora_weights=False
    )
    stable = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    stable.save_pretrained(str(tmp_path / "stable"))
    row = Lora("qkv", r"blocks\.0\.attn\.qkv", lr=1e-3, start=str(tmp_path / "stable"))
    build_param_groups(lora_recipe("test_vit", groups=(Group("head", "head", lr=1), row, Group("rest", ".", lr=0))), plain)
    torch.testing.assert_close(plain.eval()(images), stable(images), rtol=0, atol=1e-5)


def small_lora(**changes):
    """SmallNet with its head and a change of its body, which trains from the second epoch on."""
    groups = (Group("head", "fc", lr=1e-2), Lora("body", "body", lr=1e-2, rank=2, unfreeze_at=1), Group("rest", ".", lr=0))
    return small_recipe(**{"groups": groups, **changes})


def test_what_a_row_freezes_stays_still(tmp_path):
    """The layers' own weights keep their bits; the change moves from the epoch on in which it starts."""
    net, rows = run_here(small_lora(), tmp_path)
    torch.manual_seed(0)
    start, _, _ = prepare(small_lora())
    own = dict(net.named_parameters())
    for name in ("body.weight", "body.bias", "stem.weight", "norm.weight"):
        assert torch.equal(own[name], start.get_parameter(name)), name
    assert own["body.lora.B.weight"].any() and not torch.equal(own["fc.weight"], start.fc.weight)
    assert [row["lr"]["body"] > 0 for row in rows if "lr" in row] == [False] * 3 + [True] * 9
    plain = safetensors.torch.load_file(tmp_path / "model-best" / "model.safetensors")
    assert set(plain) == set(SmallNet().state_dict())


OPTIONS = {
    "average, accumulation": {"ema_decay": 0.6},
    "dropout": {
        "groups": (Group("head", "fc", lr=1e-2), Lora("body", "body", lr=1e-2, dropout=0.5), Group("rest", ".", lr=0)),
    },
    "kept images": {
        "augment": Augment(frozen_views=1),
        "groups": (Group("head", "fc", lr=1e-2), Lora("body", "body", lr=1e-2), Group("rest", ".", lr=0)),
    },
    "checkpointing, bf16": {
        "backbone": "test_vit",
        "head": None,
        "groups": VIT,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "data": Data("generated", 160, 8),
    },
    "linear probe, l2_sp": {"linear_probe": LinearProbe(), "l2_sp": 0.1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_cut_run_ends_with_the_same_bits(tmp_path, monkeypatch, option):
    """With adapters a resumed run is an unbroken one, whatever else is set."""
    recipe, accumulate = small_lora(**OPTIONS[option]), 2 if "accumulation" in option else 1
    net, rows = run_here(recipe, tmp_path / "whole", accumulate=accumulate)
    with monkeypatch.context() as patched, pytest.raises(Cut):
        cut_before(patched, "set_lrs", 8)
        run_here(recipe, tmp_path / "cut", accumulate=accumulate, checkpoint_every=2)
    again, others = run_here(recipe, tmp_path / "cut", accumulate=accumulate, checkpoint_every=2)
    assert same_tensors(net.state_dict(), again.state_dict()) and rows == others
    assert any(part.B.weight.any() for part in adapters(net).values())


def test_a_run_saves_a_plain_network_and_its_adapter(tmp_path, image_folder, peft):
    """timm loads model/ and peft adapter/ on top of the weights that the run started from: both give the run's logits."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from finetune import AdamW, Constant, Data, Group, Lora, Recipe\n"
        f"recipe = Recipe(backbone='test_resnet', data=Data({str(image_folder)!r}, 32, 8), epochs=2,\n"
        "groups=(Group('head', 'fc', lr=1e-2), Lora('convs', r'layer[34].*conv\\d', lr=1e-2), Group('rest', '.', lr=0)),\n"
        "optimizer=AdamW(), schedule=Constant(), batch_norm='frozen')\n"
    )
    torch.manual_seed(0)
    start = timm.create_model("test_resnet", zero_init_last=False)
    safetensors.torch.save_file(start.state_dict(), tmp_path / "start.safetensors")
    assert (
        main(["--recipe", str(file), "--weights", str(tmp_path / "start.safetensors"), "--output", str(tmp_path / "run")]) == 0
    )
    images = torch.randn(3, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True).eval()
    start.reset_classifier(3)
    theirs = peft.PeftModel.from_pretrained(start, str(tmp_path / "run" / "adapter")).eval()
    torch.testing.assert_close(theirs(images), plain(images), rtol=0, atol=1e-5)
    drift = json.loads((tmp_path / "run" / "result.json").read_text())["drift"]
    assert drift["convs"] > 0 and "rest" in drift


def test_torch_compile_trains_the_same_adapters(tmp_path):
    """Compiled, a run's weights are those of the run without."""
    net, _ = run_here(lora_recipe("test_resnet", epochs=1), tmp_path / "plain")
    other, _ = run_here(lora_recipe("test_resnet", epochs=1, torch_compile=True), tmp_path / "compiled")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-4)


def grouped():
    """A network with a layer that LoRA does not change."""
    net = SmallNet()
    net.body = nn.Conv2d(8, 16, 3, groups=2)
    return net


@pytest.mark.parametrize(
    ("row", "backbone", "text"),
    [
        (Lora("body", "body", lr=1e-3), grouped, "'body' names body, a Conv2d, which LoRA does not change"),
        (Lora("norm", "norm", lr=1e-3), SmallNet, "'norm' .pattern 'norm'. names no layer that LoRA changes"),
        (Lora("body", "body", lr=1e-3, start="nowhere"), SmallNet, "nowhere is no adapter in peft's format"),
        (Lora("none", "nothing", lr=1e-3), SmallNet, "group 'none' .pattern 'nothing'. matches no parameter"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row, backbone, text):
    """Layers that LoRA can't change, none at all, and a folder that is none: one sentence each."""
    recipe = small_recipe(backbone=backbone, groups=(Group("head", "fc", lr=1e-2), row, Group("rest", ".", lr=0)))
    with pytest.raises(RecipeError, match=text):
        build_param_groups(recipe, backbone())


def test_an_adapter_of_another_rank_or_kind_is_refused(tmp_path):
    """A folder in peft's format that does not fit says what it has."""
    net, _, _ = with_adapters("test_vit")
    save_adapter(tmp_path, net, ["head"])
    torch.manual_seed(0)
    rows = (VIT[0], dataclasses.replace(VIT[1], rank=3, start=str(tmp_path)), VIT[2])
    with pytest.raises(RecipeError, match=r"no change of blocks.0.attn.qkv of rank 3, but another"):
        build_param_groups(lora_recipe("test_vit", groups=rows), timm.create_model("test_vit", num_classes=7))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(RecipeError, match="no plain LoRA adapter but DoRA"):
        load_adapter(adapters(net), tmp_path)


def test_a_lora_row_is_written_and_read():
    """As data, and by --set, it is the row it was; without a learning rate it is refused."""
    recipe = lora_recipe("test_vit")
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert override(recipe, ["groups.attention.rank=4"]).groups[1].rank == 4
    with pytest.raises(RecipeError, match="a Lora row trains: its lr must be above 0"):
        override(recipe, ["groups.attention.lr=0"])
