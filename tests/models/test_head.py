"""The new head of a function's network: the old layer with other outputs, or a refusal."""

import dataclasses

import pytest
import timm
from torch import nn

from finetune.models.backbone import build_backbone, meta_backbone
from finetune.utils.errors import RecipeError
from helpers import SmallNet, small_recipe


class Cosine(nn.Linear):
    def forward(self, features):
        return 10 * nn.functional.linear(nn.functional.normalize(features), nn.functional.normalize(self.weight))


def with_head(layer):
    """SmallNet with this as its last layer."""

    class Own(SmallNet):
        def __init__(self):
            super().__init__()
            self.fc = layer()

        def forward(self, images):
            features = self.body(self.norm(self.stem(images)))
            return self.fc(features if isinstance(self.fc, nn.Conv2d) else features.mean((2, 3))).flatten(1)

    return small_recipe(backbone=Own)


@pytest.mark.parametrize(
    "layer,what",
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 7)), "a ParametrizedLinear, a kind of its own"),
        (lambda: nn.utils.weight_norm(nn.Linear(16, 7)), "a Linear with a hook, such as weight_norm's"),
        (lambda: nn.utils.spectral_norm(nn.Linear(16, 7)), "a Linear with a hook, such as weight_norm's"),
        (lambda: Cosine(16, 7), "a Cosine, a kind of its own"),
        (lambda: timm.layers.Conv2dSame(16, 7, 5), "a Conv2dSame, a kind of its own"),
        (lambda: nn.Conv2d(16, 6, 5, groups=2), "a Conv2d of 2 groups"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_head_that_no_plain_layer_can_replace_is_refused(layer, what):
    """It would compute something else: the message names the layer, its kind and the remedy, which works."""
    recipe = with_head(layer)
    with pytest.raises(RecipeError, match=f"head: 'fc' is {what}, of which no other size .*: give head=None, and a network"):
        meta_backbone(recipe)
    kept = meta_backbone(dataclasses.replace(recipe, head=None))
    assert type(kept.fc).__name__ == type(layer()).__name__


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(16, 7, bias=False),
        lambda: timm.layers.Linear(16, 7),
        lambda: nn.Conv2d(16, 7, (5, 3), (1, 2), (1, 0), bias=False),
        lambda: nn.Conv2d(16, 7, 2, dilation=3, padding="same", padding_mode="reflect"),
    ],
)
def test_a_new_head_is_the_old_one_but_for_its_outputs(layer):
    """Class and arguments are those that the layer was made with."""
    new, old = build_backbone(with_head(layer), 10).fc, layer()
    assert type(new) is type(old) and repr(new) == repr(old).replace("7", "10", 1)
