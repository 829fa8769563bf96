"""Whatever trains is saved and loads again; what can't is found before the training."""

import json
from functools import partial

import pytest
import timm
import torch

from benchmarks.networks import ODD, Base
from finetune.models.backbone import build_backbone, meta_backbone
from finetune.models.pretrained import preprocessing
from finetune.models.saved import load_network, read_json, try_saving
from finetune.models.saving import save_model
from finetune.recipe import Data
from finetune.recipe.serialize import from_dict, to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.seed import seed_all
from helpers import ALL, PREPROCESSING, small_recipe

CLASSES = tuple("abcde")


def recipe_of(backbone, head=None):
    """A recipe with that network, whose last layer, without `head`, has 5 outputs already."""
    return small_recipe(backbone=backbone, head=head, groups=ALL, data=Data("generated", image_size=32, batch_size=8))


def logits_of(net):
    seed_all("logits")
    with torch.no_grad():
        return net.eval()(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ODD)
def test_each_comes_back_or_is_refused(tmp_path, name):
    """Each network of the zoo gives the same logits, bit for bit, once saved and loaded, or is refused in one sentence."""
    backbone, refusal = ODD[name]
    recipe = recipe_of(backbone)
    if refusal:
        with pytest.raises(RecipeError, match=refusal) as caught:
            meta_backbone(recipe, 5)
            try_saving(recipe, build_backbone(recipe, 5), PREPROCESSING, CLASSES)
        assert "\n" not in str(caught.value)
        return
    meta_backbone(recipe, 5)
    net = build_backbone(recipe, 5)
    try_saving(recipe, net, preprocessing(recipe, net), CLASSES)
    with torch.no_grad():  # as if trained
        for parameter in net.parameters():
            parameter += 0.01
    save_model(tmp_path / "model", net, preprocessing(recipe, net), CLASSES)
    again = load_network(tmp_path / "model", read_json(tmp_path / "model" / "config.json"), recipe)
    assert logits_of(again).equal(logits_of(net)) and logits_of(net).isfinite().all()


@pytest.mark.parametrize("head,outputs", [(None, 5), ("fc", 1000)])
def test_a_functions_timm_model_is_loaded_by_timm(tmp_path, head, outputs):
    """What a function makes with timm.create_model, its head fitted here or there, timm loads from the folder alone."""
    recipe = recipe_of(partial(timm.create_model, "test_resnet", num_classes=outputs), head)
    net = build_backbone(recipe, 5)
    save_model(tmp_path / "model", net, preprocessing(recipe, net), CLASSES)
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.num_classes == 5 and logits_of(again).equal(logits_of(net))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["label_names"] == list(CLASSES)


@pytest.mark.parametrize("name", ["timm, changed", "timm, handed on"])
def test_timm_is_not_said_to_make_what_it_does_not(tmp_path, name):
    """A network that timm would make with other activations, or not at all, is kept as the recipe's own."""
    recipe = recipe_of(ODD[name][0])
    save_model(tmp_path / "model", build_backbone(recipe, 5), PREPROCESSING, CLASSES)
    assert json.loads((tmp_path / "model" / "config.json").read_text()).keys() == {"label_names", "preprocessing"}


@pytest.mark.parametrize(
    "outputs,fault", [(5, ""), (7, "returns (1, 7) for one image, not one logit for each of 5 classes; head names")]
)
def test_a_last_layer_of_the_right_size_is_kept(outputs, fault):
    """Without `head` a function's network is taken as it is; its size is checked once the classes are known."""

    def net():
        net = Base()
        net.fc = torch.nn.Linear(8, outputs)
        return net

    recipe = recipe_of(net)
    meta_backbone(recipe)
    if fault:
        with pytest.raises(RecipeError) as caught:
            try_saving(recipe, build_backbone(recipe, 5), PREPROCESSING, CLASSES)
        assert fault in str(caught.value)
    assert build_backbone(recipe, 5).fc.out_features == outputs


class Maker:
    def __call__(self):
        return Base()


def test_functions_without_a_name_have_one_in_files():
    """A partial is known by its function and arguments, a callable object by its class; both are read back and compared."""
    names = [to_dict(recipe_of(backbone))["backbone"] for backbone in (partial(Base, width=6), partial(Base, 7), Maker())]
    assert names == ["function Base(width=6)", "function Base(7)", "function Maker"]
    recipe = recipe_of(partial(timm.create_model, "test_vit", act_layer=torch.nn.ReLU))
    assert to_dict(from_dict(json.loads(json.dumps(to_dict(recipe))))) == to_dict(recipe)
    assert build_backbone(recipe_of(Maker()), 5).fc.out_features == 5
