"""ResNet-18 that estimates a number: how much of a steel surface is defective, in percent.

    accelerate launch finetune/run.py --recipe resnet18_steel --data FILE.csv

MAE 7.497 (7.453 to 7.535, 3 seeds) on NEU-DET, 200 px, PQF weights: points of percent; R2 0.86; linear probe 12.6; 7 to 11
minutes on two CPU cores, beside other programs. The learning rates were not tuned.
FILE.csv has the columns path and label_covered: here the share that the boxes of the defects cover in NEU-DET's 1,800 images
(Song and Yan 2013, He et al. 2020), of which a fifth validates. `python -m benchmarks.steel DIR` writes it.
Weights: torchvision's, BSD-3-Clause, from the Hugging Face hub; PQF: these, compressed (docs/results.md).
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.tv_in1k",
    data=Data("steel.csv", image_size=128, batch_size=32),
    augment=Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), vflip=0.5, rot90=1.0),  # a cut would change the number

    linear_probe=LinearProbe(),  # ridge regression
    groups=(
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=1e-3),
        Group("layer4", r"layer4\.",              lr=1e-3),
        Group("layer3", r"layer3\.",              lr=3e-4),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=1e-4),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",

    epochs=8,
    loss="huber",
    metric="mae",
    ema_decay=0.99,
)
