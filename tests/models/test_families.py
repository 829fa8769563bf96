"""The families of networks that people choose now, by timm's names: each works, or is refused in one sentence."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import timm
import torch
from packaging.version import Version

from finetune.__main__ import main
from finetune.models.backbone import build_backbone, head_parameters, meta_backbone
from finetune.models.linear_probe import check_probe, head_layer
from finetune.models.pretrained import check_resampling
from finetune.models.saved import load_model
from finetune.optim.lora import adapters, check_called
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Group, Lora
from finetune.recipe.recipe import minimal_recipe
from finetune.utils.errors import RecipeError
from helpers import PIXEL_ROUNDING, run_here, timm_alone

LAYERS = "head.fc"  # of a network with norm and pool before it
FAMILIES = [  # name, image size (another than the weights'), the head that a linear probe fits or why there is none
    ("vit_small_patch14_reg4_dinov2.lvd142m", 224, "head"),
    ("vit_small_patch16_dinov3.lvd1689m", 224, "head"),
    ("convnext_tiny.dinov3_lvd1689m", 256, LAYERS),
    ("vit_base_patch16_siglip_224.v2_webli", 256, "head"),
    ("vit_base_patch32_clip_224.openai", 256, "head"),
    ("resnet50_clip_gap.openai", 256, LAYERS),
    ("fastvit_mci0.apple_mclip2_dfndr2b", 224, LAYERS),
    ("vit_pe_core_tiny_patch16_384.fb", 224, "head"),
    ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 224, "head"),
    ("convnextv2_atto.fcmae", 160, LAYERS),
    ("swinv2_tiny_window8_256.ms_in1k", 224, LAYERS),
    ("caformer_s18.sail_in22k_ft_in1k", 192, "is head.fc.fc1 (Linear), head.fc.fc2 (Linear), head.fc.norm (LayerNorm)"),
    ("maxvit_nano_rw_256.sw_in1k", 224, LAYERS),
    ("mobilenetv4_conv_small.e2400_r224_in1k", 192, "classifier"),
    ("naflexvit_base_patch16_gap.e300_s576_in1k", 224, "head"),
    ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", 192, "head"),
    ("deit_tiny_distilled_patch16_224.fb_in1k", 192, "is head (Linear), head_dist (Linear)"),
    ("resnetv2_50.a1h_in1k", 192, "is head.fc (Conv2d)"),
    ("resnet18.a1_in1k", 192, "fc"),
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 192, "head"),
    ("efficientvit_b0.r224_in1k", 192, "head.classifier.4"),
    ("repvit_m0_9.dist_450e_in1k", 192, "is head.head.bn (BatchNorm1d), head.head.l (Linear), head.head_dist.bn"),
    ("inception_next_atto.sail_in1k", 192, "head.fc2"),
]
MORE = [
    ("vit_small_patch14_dinov2.lvd142m", 224, "head"),
    ("vit_small_patch16_dinov3_qkvb.lvd1689m", 224, "head"),
    ("vit_base_patch14_reg1_tipsv2.webli", 224, "head"),
    ("aimv2_large_patch14_224.apple_pt", 252, "head"),
    ("vit_base_patch16_siglip_gap_224.v2_webli", 256, "head"),
    ("vit_base_patch16_siglip_224.webli", 192, "head"),
    ("eva02_base_patch16_clip_224.merged2b", 256, "head"),
    ("vit_base_patch16_clip_224.laion2b", 192, "head"),
    ("vit_base_patch16_clip_224.dfn2b", 192, "head"),
    ("vit_base_patch16_clip_quickgelu_224.openai", 192, "head"),
    ("vit_base_mci_224.apple_mclip2_dfndr2b", 256, "head"),
    ("vit_pe_core_base_patch16_224.fb", 256, "head"),
    ("vit_pe_spatial_tiny_patch16_512.fb", 256, "head"),
    ("convnextv2_tiny.fcmae_ft_in22k_in1k", 256, LAYERS),
    ("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", 256, LAYERS),
    ("swinv2_base_window12to16_192to256.ms_in22k_ft_in1k", 192, LAYERS),
    ("maxvit_tiny_tf_224.in1k", 256, LAYERS),
    ("coatnet_0_rw_224.sw_in1k", 192, LAYERS),
    ("tf_efficientnetv2_s.in21k_ft_in1k", 256, "classifier"),
    ("regnety_032.ra_in1k", 256, LAYERS),
    ("mobilenetv4_hybrid_medium.e500_r224_in1k", 256, "classifier"),
    ("fastvit_t8.apple_dist_in1k", 224, LAYERS),
    ("naflexvit_base_patch16_siglip.v2_webli", 256, "head"),
    ("beit3_base_patch16_224.in22k_ft_in1k", 192, "head"),
    ("deit3_small_patch16_224.fb_in22k_ft_in1k", 192, "head"),
    ("vit_base_patch16_224.mae", 192, "head"),
    ("vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k", 224, "head"),
    ("vit_small_r26_s32_224.augreg_in21k_ft_in1k", 192, "head"),
    ("resnet50.a1_in1k", 192, "fc"),
    ("resnetv2_50x1_bit.goog_in21k_ft_in1k", 224, "is head.fc (Conv2d)"),
    ("wide_resnet50_2.tv2_in1k", 192, "fc"),
    ("resnext50_32x4d.a1h_in1k", 192, "fc"),
    ("efficientvit_m0.r224_in1k", 256, "head.linear"),
    ("tiny_vit_5m_224.dist_in22k_ft_in1k", 256, LAYERS),
    ("nextvit_small.bd_in1k", 256, LAYERS),
    ("swiftformer_xs.dist_in1k", 256, "is head (Linear), head_dist (Linear)"),
    ("hiera_small_abswin_256.sbb2_e200_in12k", 224, LAYERS),
    ("sam2_hiera_tiny.fb_r896", 224, LAYERS),
    ("mambaout_femto.in1k", 192, LAYERS),
    ("starnet_s1.in1k", 192, "head"),
    ("vit_intern300m_patch14_448.ogvl_dist", 224, "head"),
]
NEWER = ("swinv2_tiny", "efficientvit_b0", "repvit_m0_9", "eva02_tiny", "swin_tiny")  # the oldest timm and torch fail on meta
NO_LAYERS = ("caformer",)  # timm does not say which
SMALL = [  # name, image size
    ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", 32),
    ("vit_pe_core_tiny_patch16_384.fb", 32),
    ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 28),
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 32),
    ("deit_tiny_distilled_patch16_224.fb_in1k", 32),
    ("convnextv2_atto.fcmae", 32),
    ("mobilenetv4_conv_small.e2400_r224_in1k", 32),
    ("inception_next_atto.sail_in1k", 32),
    ("efficientvit_b0.r224_in1k", 32),
]


def recipe_of(name, size, **changes):
    """A recipe on this network, unless the installed timm does not have it."""
    if name not in timm.list_pretrained():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    if name.startswith(NEWER) and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip(f"timm {timm.__version__} does not build {name} on torch's meta device, or not at other sizes")
    return replace(minimal_recipe(name, "generated", size, batch_size=8), **changes)


def on_meta(recipe, state=None):
    """The network without memory, not yet tried on an image."""
    with torch.device("meta"):
        return build_backbone(recipe, 7, state)


def patterns(recipe, net):
    """Rows for the head and for all else."""
    head = "|".join(re.escape(name) for name in sorted(head_parameters(recipe, net)))
    return Group("head", head, lr=1e-3), Group("rest", ".", lr=1e-4)


@pytest.mark.parametrize("name,size,head", [*FAMILIES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)])
def test_weights_fit_another_size_the_head_is_new_and_every_parameter_is_in_one_group(name, size, head):
    """Weights with the head they come with, or none, load whole; groups by layer and by pattern hold each parameter once."""
    recipe = recipe_of(name, size, weights="FILE")
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=timm.get_pretrained_cfg(name).num_classes)
    net = on_meta(recipe, theirs.state_dict())
    assert net.state_dict().keys() == on_meta(recipe).state_dict().keys()  # what is planned is what is trained
    with torch.no_grad():
        assert net.eval()(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 7)
    by_layer = pytest.raises(RecipeError, match="write the groups as rows") if name.startswith(NO_LAYERS) else nullcontext()
    for rows, fits in ((recipe.groups, by_layer), (patterns(recipe, net), nullcontext())):
        with fits:
            groups = build_param_groups(replace(recipe, groups=rows), net)
            owned = [name for group in groups for name in (*group.params, *group.fixed)]
            assert sorted(owned) == sorted(name for name, _ in net.named_parameters())
            assert groups[0].params.keys() == head_parameters(recipe, net) and len(groups) > (rows is recipe.groups) * 5
    if " " in head:
        with pytest.raises(RecipeError) as caught:
            head_layer(recipe, net)
        assert head in str(caught.value)
    else:
        assert check_probe(recipe, net) is net.get_submodule(head)


@pytest.mark.parametrize(
    "name,size,others",
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 256, "252 or 266"),
        ("vit_small_patch16_dinov3.lvd1689m", 230, "224 or 240"),
        ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 10, "14"),
        ("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", 230, "228 or 232"),
        ("maxvit_nano_rw_256.sw_in1k", 230, "224 or 256"),
        ("naflexvit_base_patch16_gap.e300_s576_in1k", 100, "96 or 128"),
    ],
)
def test_an_image_size_that_can_not_be_names_those_that_can(name, size, others):
    """Pixels that no patch would hold, and windows that do not divide, are refused; the sizes named are taken."""
    with pytest.raises(RecipeError, match=f" {size} x {size} .*: --set data.image_size={others}$|; --set .*={others}$"):
        meta_backbone(recipe_of(name, size))
    net = on_meta(recipe_of(name, other := int(others.split()[-1])))
    with torch.no_grad():
        assert net.eval()(torch.zeros(2, 3, other, other, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(
    "name,size", [("resnet50_clip.openai", 256), ("levit_128s.fb_dist_in1k", 192), ("hiera_tiny_224.mae_in1k_ft_in1k", 192)]
)
def test_weights_for_one_size_alone_are_refused_before_the_download(name, size):
    """Where timm resamples nothing, the trained size is named; random weights and the trained size are taken."""
    recipe = recipe_of(name, size)
    with pytest.raises(RecipeError, match=f"the weights of {name} are for 224 x 224 .*: --set data.image_size=224$"):
        check_resampling(recipe)
    with pytest.raises(RecipeError, match="do not fit"), torch.device("meta"):
        on_meta(recipe, timm.create_model(name).state_dict())
    check_resampling(replace(recipe, weights="none"))
    check_resampling(recipe_of(name, 224))


BLOCKS = r"blocks\.\d+\.attn\."
ADAPTED = [  # name, pattern, number of layers; 0: refused, as attention takes the weight of qkv for itself
    ("vit_small_patch14_reg4_dinov2.lvd142m", BLOCKS + "(qkv|proj)", 24),
    ("vit_small_patch16_dinov3.lvd1689m", BLOCKS + "(qkv|proj)", 24),
    ("vit_base_patch16_siglip_224.v2_webli", rf"{BLOCKS}(qkv|proj)|attn_pool\.(q|kv|proj)\b", 27),
    ("eva02_base_patch16_clip_224.merged2b", BLOCKS + "([qkv]_proj|proj)", 48),
    ("vit_pe_core_tiny_patch16_384.fb", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp)|attn_pool\.(q|kv|proj)\b", 51),
    ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", BLOCKS + "qkv", 0),
    ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", r"blocks\.\d+\.(attn\.proj|mlp\.fc)", 36),
    ("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", r"layers\.\d\.blocks\.\d\.attn\.(qkv|proj)", 24),
    ("swinv2_tiny_window8_256.ms_in1k", r"layers\.\d\.blocks\.\d\.attn\.qkv", 0),
    ("swinv2_tiny_window8_256.ms_in1k", r"layers\.\d\.blocks\.\d\.(attn\.proj|mlp\.fc)", 36),
    ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", BLOCKS + "(qkv|proj)", 0),
]


@pytest.mark.parametrize("name,pattern,layers", ADAPTED)
def test_lora_changes_attention_or_says_that_it_can_not(name, pattern, layers):
    """A Lora row's pattern for each family gives its layers adapters; one for layers that are never called is refused."""
    recipe = recipe_of(name, 56 if "patch14" in name else 64)
    net = on_meta(recipe)
    head, rest = patterns(recipe, net)
    build_param_groups(replace(recipe, groups=(head, Lora("attention", pattern, lr=1e-3), replace(rest, lr=0))), net)
    with nullcontext() if layers else pytest.raises(RecipeError, match=r"LoRA can't change \S+\.qkv and \d+ more"):
        check_called(net, recipe.data.shape)
        assert len(adapters(net)) == layers


@pytest.mark.parametrize("name,size", SMALL)
def test_an_epoch_moves_every_parameter(tmp_path, name, size):
    """From random weights an epoch moves each parameter, and the loss is a number."""
    recipe = recipe_of(name, size, weights="none", batch_norm="train")
    torch.manual_seed(recipe.seed)
    before = build_backbone(recipe, 10)
    net, rows = run_here(recipe, tmp_path)
    moved = {name for name, value in net.named_parameters() if not torch.equal(value.cpu(), before.get_parameter(name))}
    assert moved == {name for name, _ in net.named_parameters()}
    assert 0 < rows[-1]["loss"] < 100


@pytest.mark.parametrize(
    "name,size,lora",
    [
        ("dinov2_vits14_lora", 28, True),
        ("dinov3_vits16_layerdecay", 32, False),
        pytest.param("siglip2_base_probe", 32, False, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_on_photographs_is_planned_trained_saved_and_predicts(here, capsys, image_folder, name, size, lora):
    """From random weights on small photographs: timm alone, with what a run has saved, sees what predict sees."""
    small = ["--data", str(image_folder), "--weights", "none"]
    for field in (f"data.image_size={size}", "data.batch_size=15", "mixed_precision=no", "schedule.warmup_epochs=0"):
        small += ["--set", field]
    assert main(["plan", name, *small]) == 0
    assert main(["train", name, *small, "--epochs", "1", "--processes", "1", "--output", "out"]) == 0
    assert ("attention-frozen" in (text := capsys.readouterr().out)) == lora and "linear probe" in text
    files = sorted((image_folder / "val").rglob("*.png"))
    assert main(["predict", "out", *map(str, files), "--checkpoint", "last", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    names = json.loads((here / "out" / "model" / "config.json").read_text())["label_names"]
    temperature = load_model(here / "out").temperature
    theirs = (timm_alone(here / "out" / "model", files) / temperature).softmax(1).tolist()
    for row, probs in zip(said, theirs, strict=True):
        assert dict(row["top"]) == pytest.approx(dict(zip(names, probs, strict=True)), abs=PIXEL_ROUNDING)
    assert (here / "out" / "adapter").is_dir() == lora
