"""ResNet-50 on CIFAR-100, the classical way: one more stage each epoch, moving batch-norm statistics, SGD, a plateau.

    accelerate launch finetune/run.py --recipe resnet50_cifar100

Written for one GPU, not measured. In few epochs on few images each of these choices lost (docs/results.md); 20 epochs of
50,000 images are another matter. Published for this network: 86.4 % (Chen et al. 2020, arXiv 2002.05709, supervised
ResNet-50, as quoted by Grill et al. 2020, arXiv 2006.07733, table 3).
Weights: timm, Apache-2.0, from the Hugging Face hub. Data: CIFAR-100 (Krizhevsky 2009), downloaded on first use.
"""
from finetune import SGD, Augment, Data, Group, Plateau, Recipe

recipe = Recipe(
    backbone="resnet50.a1_in1k",
    data=Data("cifar100", image_size=224, batch_size=128),
    augment=Augment(auto_augment="rand-m7-mstd0.5-inc1"),
    groups=(
        #     name      parameters                peak lr    first epoch it trains
        Group("head",   r"fc\.",                  lr=1e-1,   unfreeze_at=0),
        Group("layer4", r"layer4\.",              lr=3e-2,   unfreeze_at=1),
        Group("layer3", r"layer3\.",              lr=1e-2,   unfreeze_at=2),
        Group("stem",   r"conv1|bn1|layer[12]",   lr=3e-3,   unfreeze_at=3),
    ),
    optimizer=SGD(momentum=0.9, nesterov=True, weight_decay=1e-4),
    schedule=Plateau(warmup_epochs=0.5, factor=0.2, patience=1, min_scale=0.001),
    batch_norm="train",
    epochs=20,
    label_smoothing=0.1,
    mixed_precision="bf16",
)
