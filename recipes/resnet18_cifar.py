"""ResNet-18 on CIFAR-10: linear probe first, then all layers, slower towards the stem.

    accelerate launch finetune/run.py --recipe resnet18_cifar

Top-1 90.4 % (90.3 to 90.4, 3 seeds) on CIFAR-10, JPEG copy, PQF weights; linear probe 77.5 %; 30 to 45 minutes on two CPU
cores, beside other programs. PQF: the weights below, compressed (docs/results.md); with these themselves not measured.
The learning rates are for 50,000 images. With 1,000, a third of them does far better: --lr-scale 0.33 (docs/results.md).
Weights: torchvision's, BSD-3-Clause, from the Hugging Face hub. Data: CIFAR-10 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.tv_in1k",
    data=Data("cifar10", image_size=128, batch_size=128, crop_pct=1.0),  # over all processes; 32 px, enlarged
    augment=Augment(crop_scale=(0.6, 1.0), crop_ratio=(0.9, 1.1)),  # little, for three epochs
    linear_probe=LinearProbe(),
    groups=(
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=3e-3),
        Group("layer4", r"layer4\.",              lr=3e-3),
        Group("layer3", r"layer3\.",              lr=1e-3),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=3e-4),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.3),
    batch_norm="frozen",
    epochs=3,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
