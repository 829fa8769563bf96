"""The folder of a timm model, read by transformers."""

from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from finetune.models.backbone import build_backbone
from finetune.models.pretrained import preprocessing
from finetune.models.saving import save_model
from finetune.recipe.recipe import minimal_recipe

CLASSES = ("cat", "<dog>", "héron")


@pytest.mark.parametrize(
    ("backbone", "size", "resize"),
    [
        ("test_resnet", 64, None),
        ("test_vit", (64, 96), "squash"),
        ("test_convnext", 64, "pad"),
        ("test_efficientnet", 96, None),
    ],
)
def test_transformers_gives_timms_logits(tmp_path, backbone, size, resize):
    """Its processor's pixels are timm's, its logits timm's, its classes ours, and its pipeline names the likeliest first."""
    transformers = pytest.importorskip("transformers")
    recipe = minimal_recipe(backbone, "digits", size)
    recipe = replace(recipe, weights="none", data=replace(recipe.data, resize=resize))
    torch.manual_seed(0)
    net = build_backbone(recipe, len(CLASSES)).eval()
    save_model(tmp_path / "model", net, preprocessing(recipe, net), CLASSES, 1.5)

    image = Image.fromarray(load_sample_images().images[0])
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    ours = timm.data.create_transform(**timm.data.resolve_model_data_config(again))(image)[None]
    assert torch.equal(pixels, ours)
    with torch.no_grad():
        logits = theirs(pixels).logits
        torch.testing.assert_close(logits, again(ours), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, net(ours), rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    ranked = transformers.pipeline("image-classification", model=str(tmp_path / "model"))(image)
    assert [row["label"] for row in ranked] == [CLASSES[i] for i in logits[0].argsort(descending=True)]
