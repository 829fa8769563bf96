"""ResNet-18 on chest X-rays, normal or pneumonia, read as they are: grey, in one channel.

    accelerate launch finetune/run.py --recipe resnet18_xray --data DIR

Macro F1 92.8 % (92.4 to 93.5, 3 seeds) on chest X-rays of Kermany et al., 224 px, PQF weights; linear probe 82.9 %; 3 to 5
minutes on two CPU cores, beside other programs. One channel is as good as three copies of it (docs/data.md).
DIR holds train/NORMAL, train/PNEUMONIA and val/ likewise, as for resnet50_xray. Grey DICOM, TIFF and .npy are read, too. The
first layer has the sum of its pretrained weights over red, green and blue; mean and deviation are the images' own.
Weights: torchvision's, BSD-3-Clause, from the Hugging Face hub; PQF: these, compressed (docs/results.md).
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.tv_in1k",
    data=Data("xray", image_size=128, batch_size=64, channels=1, crop_pct=1.0),  # evaluate on all of it
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
)
