"""ViT-S/16 on CIFAR-100: linear probe first, then all layers, each slower than the one above it.

    accelerate launch finetune/run.py --recipe vit_small_cifar100

Written for one GPU, not measured. Published for this network: 89.5 % (Caron et al. 2021, arXiv 2104.14294, table 6:
supervised weights of ImageNet-1k).
Weights: timm, Apache-2.0, from the Hugging Face hub. Data: CIFAR-100 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Augment, Cosine, Data, LayerDecay, LinearProbe, Recipe

recipe = Recipe(
    backbone="vit_small_patch16_224.augreg_in21k_ft_in1k",
    data=Data("cifar100", image_size=224, batch_size=128),
    augment=Augment(auto_augment="rand-m9-mstd0.5-inc1"),
    linear_probe=LinearProbe(),
    groups=LayerDecay(head_lr=1e-3, stem_ratio=0.02),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=1.0, floor=0.01),
    batch_norm="frozen",  # there is no batch norm in it
    epochs=8,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
