"""ResNet-50 on chest X-rays, normal or pneumonia: uneven classes, which count the same.

    accelerate launch finetune/run.py --recipe resnet50_xray --data DIR

Macro F1 83.4 % (82.8 to 84.5, 3 seeds) on chest X-rays of Kermany et al., 224 px, PQF weights; linear probe 84.8 %; 11 to 15
minutes on two CPU cores. On a fifth of the training images, held out, 96.5 % (linear probe 95.7 %).
DIR holds train/NORMAL, train/PNEUMONIA and val/ likewise: the 5,856 X-rays of Kermany et al. 2018 (doi:10.17632/rscbjbr9sj.2,
CC BY 4.0) at 224 px, of which 5,216 train and 624 validate. Three of four to train on are pneumonia.
Weights: torchvision, BSD-3-Clause, from the Hugging Face hub; PQF: these, compressed (docs/results.md).
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet50.tv_in1k",
    data=Data("xray", image_size=128, batch_size=64),
    augment=Augment(crop_scale=(0.8, 1.0)),  # an X-ray fills its image: hardly any cropping

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

    epochs=3,
    class_weights="balanced",
    metric="macro_f1",
    label_smoothing=0.1,
    ema_decay=0.99,
    mixed_precision="bf16",
)
