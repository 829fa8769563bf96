"""DINOv3 ViT-S/16 on CIFAR-100: linear probe first, then all layers, each slower than the one above it.

    accelerate launch finetune/run.py --recipe dinov3_vits16_layerdecay

Written for one GPU, not measured. Learning rate (1e-3 x batch size / 256), decay of 0.75 a layer, weight decay and drop path
are those with which MAE is fine-tuned (He et al. 2021, arXiv 2111.06377, table 9), after BEiT (arXiv 2106.08254).
Weights: DINOv3 (arXiv 2508.10104), from the Hugging Face hub, under Meta's own DINOv3 License, which binds what is trained
from them, too: read it before you publish or sell. Data: CIFAR-100 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Augment, Cosine, Data, LayerDecay, LinearProbe, Recipe

recipe = Recipe(
    backbone="vit_small_patch16_dinov3.lvd1689m",
    drop_path=0.1,
    data=Data("cifar100", image_size=224, batch_size=128),  # any multiple of 16; rotary positions need no resampling
    augment=Augment(auto_augment="rand-m9-mstd0.5-inc1"),
    linear_probe=LinearProbe(),
    groups=LayerDecay(head_lr=5e-4, stem_ratio=0.024),  # 0.75 ** 13
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=1.0),
    batch_norm="frozen",  # there is no batch norm in it
    epochs=10,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
