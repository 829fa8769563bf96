"""ResNet-18, ImageNet to CIFAR-10: the head first, then everything, slower towards the stem.

    accelerate launch finetune/run.py --recipe resnet18_cifar

Made for one GPU; not measured. Published for this network: 97.1 % (Salman et al. 2020, arXiv 2007.08489, in their repository's
list of best parameters: adversarially robust ImageNet weights, 150 epochs).
Weights: timm, Apache-2.0, from the Hugging Face hub. Data: CIFAR (Krizhevsky 2009), downloaded on first use.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="resnet18.a1_in1k",
    data=Data("cifar10", image_size=224, batch_size=256),  # the batch over ALL processes
    augment=Augment(crop_scale=(0.35, 1.0), hflip=0.5),
    linear_probe=LinearProbe(),  # the head, from features computed once; then all trains at once, which beat a stage an epoch
    groups=(  # tried in order against the start of each parameter's name; every parameter needs a row, every row a parameter
        #     name      parameters                peak lr
        Group("head",   r"fc\.",                  lr=1e-3),
        Group("layer4", r"layer4\.",              lr=3e-4),
        Group("layer3", r"layer3\.",              lr=1e-4),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=3e-5),
    ),
    optimizer=AdamW(weight_decay=0.05),   # never on biases and norms
    schedule=Cosine(warmup_epochs=0.5),   # or Plateau(factor=0.1, patience=2), Constant()
    batch_norm="frozen",                    # batch norm keeps its pretrained statistics, in layers that train too
    epochs=10,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
