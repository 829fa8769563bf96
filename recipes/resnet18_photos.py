"""ResNet-18 on your own photographs: linear probe first, then all layers, slower towards the stem.

    accelerate launch finetune/run.py --recipe resnet18_photos --data DIR

DIR holds train/CLASS/* and val/CLASS/*, or CLASS/* alone, of which a fifth is then left out to validate. Not measured: written
for some hundred to some ten thousand photographs, to be copied and changed. `finetune suggest --data DIR` looks at them first.
Weights: timm, Apache-2.0, from the Hugging Face hub.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.a1_in1k",
    data=Data("photos", image_size=224, batch_size=32),
    augment=Augment(crop_scale=(0.5, 1.0)),  # the object stays in view

    linear_probe=LinearProbe(),
    groups=(
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=1e-3),
        Group("layer4", r"layer4\.",              lr=1e-3),
        Group("layer3", r"layer3\.",              lr=3e-4),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=1e-4),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",  # statistics of 32 photographs are worse than the pretrained ones

    epochs=10,
    label_smoothing=0.1,
    ema_decay=0.99,  # of few images a single step's weights vary
)
