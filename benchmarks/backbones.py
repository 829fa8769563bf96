"""What each of the networks that people choose now is, by timm's names: size, cost, licence, groups, head, image sizes.

    python -m benchmarks.backbones           # writes benchmarks/results/backbones.json; nothing is downloaded
    python -m benchmarks.backbones resnet    # those whose names start so, and the kept rows of the others

Each is built on torch's meta device. GMACs are half of what torch.utils.flop_counter counts in one forward pass of an image of
the size that the weights were trained at: matrix products, convolutions and attention; norms and activations are not counted.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.models.backbone import fresh_norms, head_parameters, meta_backbone
from finetune.models.batch_norm import has_statistics
from finetune.models.linear_probe import check_probe
from finetune.models.pretrained import check_resampling
from finetune.optim.lora import can_adapt
from finetune.optim.param_groups import build_param_groups
from finetune.recipe.recipe import minimal_recipe
from finetune.utils.errors import RecipeError

RESULT = Path(__file__).resolve().parent / "results" / "backbones.json"
NAMES = (
    "resnet18.a1_in1k",
    "resnet50.a1_in1k",
    "resnetv2_50x1_bit.goog_in21k_ft_in1k",
    "resnext50_32x4d.a1h_in1k",
    "wide_resnet50_2.tv2_in1k",
    "regnety_032.ra_in1k",
    "tf_efficientnetv2_s.in21k_ft_in1k",
    "mobilenetv4_conv_small.e2400_r224_in1k",
    "mobilenetv4_hybrid_medium.e500_r224_in1k",
    "repvit_m0_9.dist_450e_in1k",
    "fastvit_t8.apple_dist_in1k",
    "fastvit_mci0.apple_mclip2_dfndr2b",
    "efficientvit_b0.r224_in1k",
    "inception_next_atto.sail_in1k",
    "convnextv2_atto.fcmae_ft_in1k",
    "convnextv2_tiny.fcmae_ft_in22k_in1k",
    "convnext_tiny.dinov3_lvd1689m",
    "caformer_s18.sail_in22k_ft_in1k",
    "maxvit_tiny_tf_224.in1k",
    "tiny_vit_5m_224.dist_in22k_ft_in1k",
    "nextvit_small.bd_in1k",
    "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    "swinv2_tiny_window8_256.ms_in1k",
    "hiera_tiny_224.mae_in1k_ft_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    "vit_base_patch16_224.mae",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_base_patch16_dinov3.lvd1689m",
    "eva02_small_patch14_336.mim_in22k_ft_in1k",
    "eva02_base_patch16_clip_224.merged2b",
    "vit_base_patch32_clip_224.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_clip_224.dfn2b",
    "resnet50_clip.openai",
    "vit_base_patch16_siglip_224.v2_webli",
    "naflexvit_base_patch16_siglip.v2_webli",
    "vit_pe_core_tiny_patch16_384.fb",
    "vit_pe_core_base_patch16_224.fb",
    "vit_intern300m_patch14_448.ogvl_dist",
)


def main() -> int:
    warnings.simplefilter("ignore")
    kept = {row["network"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}
    rows = {}
    for name in NAMES:
        anew = name.startswith(tuple(sys.argv[1:])) if sys.argv[1:] else True
        rows[name] = describe(name) if anew or name not in kept else kept[name]
        print(rows[name], flush=True)
    RESULT.write_text(json.dumps({"timm": timm.__version__, "rows": [*rows.values()]}, indent=1) + "\n")
    return 0


def describe(name: str) -> dict:
    """A network's row."""
    config = timm.get_pretrained_cfg(name)
    size = config.input_size[-1]
    recipe = minimal_recipe(name, "generated", size)
    net = meta_backbone(recipe, 1000)
    groups = timm_groups(recipe, net)
    macs, called = forward_pass(net, size)
    return {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "gmacs": macs / 1e9,
        "image_size": size,
        "sizes": sizes(recipe, net),
        "licence": config.license,
        "groups": groups,
        "probe": fits_probe(recipe, net),
        "head": head_kinds(recipe, net),
        "mean": config.mean,
        "std": config.std,
        "batch_norm": any(map(has_statistics, net.modules())),
        "head_norm": bool(fresh_norms(recipe, net)),
        "registers": 0 if getattr(net, "reg_token", None) is None else net.reg_token.shape[1],
        "heads": 2 if isinstance(config.classifier, tuple) else 1,
        "attention_pool": getattr(net, "attn_pool", None) is not None
        or "AttentionPool" in type(getattr(net, "head", None)).__name__,
        "lora": lora(net, called),
    }


def timm_groups(recipe, net) -> int:
    """The number of LayerDecay's groups; 0 where timm does not state the layers."""
    try:
        return len(build_param_groups(recipe, net))
    except RecipeError:
        return 0


def fits_probe(recipe, net) -> bool:
    """Whether a linear probe can be fitted."""
    try:
        check_probe(recipe, net)
    except RecipeError:
        return False
    return True


def head_kinds(recipe, net) -> str:
    """The kinds of the new head's layers."""
    layers = {name.rpartition(".")[0]: None for name, _ in net.named_parameters() if name in head_parameters(recipe, net)}
    return ", ".join(type(net.get_submodule(name)).__name__ for name in layers)


def forward_pass(net, size: int) -> tuple[float, set[str]]:
    """Multiplications of one image, and the names of the modules that are called."""
    called = set()
    hooks = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in net.named_modules()]
    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, 3, size, size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / 2, called


def sizes(recipe, net) -> int:
    """What the sides of images must be a multiple of, as tried around 256 px; 0: the trained size alone; 1: any."""

    def taken(side: int) -> bool:
        other = replace(recipe, data=replace(recipe.data, image_size=side))
        try:
            check_resampling(other)
            meta_backbone(other)
        except RecipeError:
            return False
        return True

    for step, tried in ((1, (225, 230)), (4, (228, 236)), (14, (238, 266)), (16, (208, 240)), (32, (192, 256))):
        if all(map(taken, tried)):
            return step
    return 0


def lora(net, called: set[str]) -> str:
    """The layers of attention that a Lora row changes: their last names."""
    found = {
        name.rpartition(".")[2]
        for name, layer in net.named_modules()
        if of_attention(name) and can_adapt(layer) and name in called
    }
    return " ".join(sorted(found))


def of_attention(name: str) -> bool:
    """Whether a layer is one of attention's, by its name."""
    return name.rpartition(".")[2] in ("qkv", "q", "kv", "k", "v", "q_proj", "k_proj", "v_proj", "proj") and "attn" in name


if __name__ == "__main__":
    raise SystemExit(main())
