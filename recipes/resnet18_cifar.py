"""ResNet-18 on CIFAR-10: linear probe first, then all layers, slower towards the stem.

    accelerate launch finetune/run.py --recipe resnet18_cifar

Written for one GPU, not measured. Published for this network: 97.1 % (Salman et al. 2020, arXiv 2007.08489, the list of best
parameters in their repository: adversarially robust ImageNet weights, 150 epochs).
Weights: timm, Apache-2.0, from the Hugging Face hub. Data: CIFAR-10 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.a1_in1k",
    data=Data("cifar10", image_size=224, batch_size=256),  # over all processes
    linear_probe=LinearProbe(),
    groups=(
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=1e-3),
        Group("layer4", r"layer4\.",              lr=3e-4),
        Group("layer3", r"layer3\.",              lr=1e-4),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=3e-5),
    ),
    optimizer=AdamW(weight_decay=0.05),
    schedule=Cosine(warmup_epochs=0.5),
    batch_norm="frozen",
    epochs=10,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
