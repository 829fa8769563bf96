"""ResNet-50 on your own photographs: linear probe first, then all layers, slower towards the stem.

    accelerate launch finetune/run.py --recipe resnet50_photos --data DIR

DIR holds train/CLASS/* and val/CLASS/*, or CLASS/* alone, of which a fifth is then left out to validate. Not measured: written
for one GPU and some thousand photographs or more, to be copied and changed; on a CPU start with resnet18_photos.
Weights: timm, Apache-2.0, from the Hugging Face hub.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet50.a1_in1k",
    data=Data("photos", image_size=224, batch_size=64),
    augment=Augment(crop_scale=(0.5, 1.0), auto_augment="rand-m5-mstd0.5-inc1"),

    linear_probe=LinearProbe(),
    groups=(
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=1e-3),
        Group("layer4", r"layer4\.",              lr=5e-4),
        Group("layer3", r"layer3\.",              lr=2e-4),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=5e-5),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",

    epochs=10,
    label_smoothing=0.1,
    ema_decay=0.99,
    mixed_precision="bf16",
)
