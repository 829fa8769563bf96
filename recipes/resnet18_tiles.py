"""ResNet-18 on pictures of all shapes, defects of magnetic tiles: none of a picture is cut away, uneven classes count the same.

    accelerate launch finetune/run.py --recipe resnet18_tiles --data DIR

Macro F1 90.2 % (88.7 to 91.4, 3 seeds) on magnetic tiles, PQF weights; linear probe 81.5 %; 4 to 6 minutes on two CPU cores,
beside other programs. Cut as the weights were evaluated, without ends and edges, 71 % (docs/data.md). The learning rates were
not tuned.
DIR holds CLASS/*: blowhole, break, crack, fray, free and uneven, 1,344 pictures of magnetic tiles (Huang et al. 2018,
doi:10.1007/s00371-018-1588-5), 32 to 952 a class, of which two fifths validate.
Weights: torchvision's, BSD-3-Clause, from the Hugging Face hub; PQF: these, compressed (docs/results.md).
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.tv_in1k",
    data=Data("tiles", image_size=128, batch_size=16, resize="pad", val_share=0.4),  # a border in place of a cut
    augment=Augment(crop_scale=(0.8, 1.0), vflip=0.5),  # a defect may lie at the edge

    linear_probe=LinearProbe(),
    groups=(
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=7e-4),
        Group("layer4", r"layer4\.",              lr=7e-4),
        Group("layer3", r"layer3\.",              lr=2e-4),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=7e-5),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",

    epochs=12,
    class_weights="balanced",
    metric="macro_f1",
    label_smoothing=0.1,
    ema_decay=0.99,
)
