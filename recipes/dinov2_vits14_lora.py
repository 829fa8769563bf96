"""DINOv2 ViT-S/14 with LoRA: the head and low-rank changes of attention train, all else stays frozen.

    accelerate launch finetune/run.py --recipe dinov2_vits14_lora

Written for one GPU, not measured. Rank, alpha and learning rate are of the size of LoRA's paper (Hu et al. 2021, arXiv
2106.09685, appendix D: rank 8, alpha 8 or 16, 2e-4 to 5e-4). On your own photographs: --data DIR.
Weights: DINOv2 with registers (arXiv 2304.07193, 2309.16588), Apache-2.0, from the Hugging Face hub.
Data: CIFAR-100 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Lora, Recipe

recipe = Recipe(
    backbone="vit_small_patch14_reg4_dinov2.lvd142m",
    data=Data("cifar100", image_size=224, batch_size=128),  # 16 x 14; trained at 518, which costs 7 times as much
    augment=Augment(crop_scale=(0.5, 1.0)),
    linear_probe=LinearProbe(),
    groups=(
        #     name         parameters                          peak lr
        Group("head",      r"head\.",                          lr=1e-3),
        Lora("attention",  r"blocks\.\d+\.attn\.(qkv|proj)",   lr=4e-4, rank=8, alpha=16.0),
        Group("rest",      r".",                               lr=0),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",  # there is no batch norm in it
    epochs=5,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
