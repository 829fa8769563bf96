"""SigLIP 2 ViT-B/16 on your own photographs: a linear probe alone, on features of the frozen network.

    accelerate launch finetune/run.py --recipe siglip2_base_probe --data DIR

DIR holds train/CLASS/* and val/CLASS/*, or CLASS/* alone, of which a fifth is then left out to validate. Not measured. A run is
two passes over the training images, features and one epoch of the head, and two over the others. Where the epoch does not
improve on it, the fitted probe is the model to use (model-best). The attention pool before the head is pretrained; it stays
frozen, too.
Weights: SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786), Apache-2.0, from the Hugging Face hub.
"""
from finetune import AdamW, Augment, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(
    backbone="vit_base_patch16_siglip_224.v2_webli",
    data=Data("photos", image_size=224, batch_size=64),
    augment=Augment(crop_scale=(0.5, 1.0)),
    linear_probe=LinearProbe(),
    groups=(
        #     name    parameters   peak lr
        Group("head", r"head\.",   lr=1e-4),  # low: it starts at the probe's minimum
        Group("rest", r".",        lr=0),
    ),
    optimizer=AdamW(),
    schedule=Cosine(),
    batch_norm="frozen",  # there is no batch norm in it
    epochs=1,
    mixed_precision="bf16",
)
