"""ViT-S/16, ImageNet-21k to CIFAR-100: layer by layer slower towards the patches, the head alone for an epoch.

    accelerate launch finetune/run.py --recipe vit_small_cifar100

Made for one GPU; not measured.
Weights: timm, Apache-2.0, from the Hugging Face hub. Data: CIFAR (Krizhevsky 2009), downloaded on first use.
"""
from finetune.lr_schedule import Cosine
from finetune.recipe import AdamW, Augment, Data, LayerDecay, Recipe

recipe = Recipe(
    backbone="vit_small_patch16_224.augreg_in21k_ft_in1k",
    data=Data("cifar100", image_size=224, batch_size=128),
    augment=Augment(crop_scale=(0.35, 1.0), hflip=0.5, randaugment="rand-m9-mstd0.5-inc1"),
    groups=LayerDecay(head_lr=1e-3, stem_ratio=0.02, unfreeze_at=1),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=1.0, floor=0.01),
    norm_stats="eval",  # there is no batch norm in it
    epochs=8,
    label_smoothing=0.1,
    clip_norm=1.0,
    mixed_precision="bf16",
    seed=0,
)
