"""Networks to compare: the shelves are timm's, and nothing is downloaded unasked."""

import pytest
import timm

from finetune.models.backbone import meta_backbone
from finetune.models.linear_probe import head_layer
from finetune.ranking import candidates
from finetune.ranking.candidates import SHELVES, Wanted
from finetune.recipe.recipe import minimal_recipe
from finetune.utils.errors import RecipeError


def test_without_names_nothing_is_downloaded(monkeypatch):
    """By default the networks are those installed or in the cache; with none of them, the words say what to type."""
    monkeypatch.setattr(candidates, "is_cached", lambda name: name == "resnet34.a1_in1k")
    installed = [("tf_efficientnet_lite0", None)]
    assert candidates.name_networks(Wanted()) == [*installed, ("resnet34.a1_in1k", None)]
    monkeypatch.setattr(candidates, "is_cached", lambda name: False)
    monkeypatch.setattr(candidates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="--shelf small fetches eight networks"):
        candidates.name_networks(Wanted())


@pytest.mark.parametrize("name", sorted({name for shelf in SHELVES.values() for name in shelf}))
def test_the_shelves_networks_can_be_ranked(name):
    """timm has pretrained weights by each name, of a network with one linear layer as its head and of the shelf's size."""
    assert timm.is_model_pretrained(name) and timm.models.get_pretrained_cfg_value(name, "license")
    recipe = minimal_recipe(name, "digits", candidates.usual_size(name))
    net = meta_backbone(recipe)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    head_layer(recipe, net)
    assert parameters < 30e6 if name in SHELVES["small"] else 80e6 < parameters < 100e6
