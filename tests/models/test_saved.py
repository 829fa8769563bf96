"""A model loaded again."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch

from finetune.data.sources import load_data
from finetune.inference.predict import logits_of
from finetune.models.backbone import build_backbone
from finetune.models.saved import load_model, save_model
from finetune.utils.errors import RecipeError
from helpers import PREPROCESSING, ROOT

OWN = """
from torch import nn
from finetune.image_data import generated
from finetune.lr_schedule import Constant
from finetune.recipe import SGD, Data, Group, Recipe


def net():
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(6 * 6 * 6, 3))


def images():
    data = generated()
    data.train.classes = data.classes
    return data.train, data.val


recipe = Recipe(backbone=net, head="4", data=Data(images, image_size=28, batch_size=8), groups=(Group("all", ".", lr=0.01),),
                optimizer=SGD(momentum=0.9), schedule=Constant(), batch_norm="train", epochs=1, flip_test=True)
"""


def run(recipe, output, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune" / "run.py"), "--recipe", str(recipe), "--output", str(output), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run of a function's network on a function's images, scored with mirror images."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    return run(folder / "own.py", folder / "out")


def test_a_functions_network_comes_back_from_its_run(own):
    """A network that the recipe's own function makes has, loaded again, the logits that the run wrote, mirrored ones too."""
    model = load_model(own)
    logits, _ = logits_of(model, load_data(model[3]).val, "stop", 0)
    assert logits.equal(safetensors.torch.load_file(own / "predictions.safetensors")["logits"])
    with pytest.raises(RecipeError, match="loaded from the whole run folder"):
        shutil.copytree(own / "model", own.parent / "alone")
        load_model(own.parent / "alone")


def test_a_torchvision_network_comes_back_from_its_run(tmp_path):
    """It is built by its name in recipe.json; the same images give the same logits."""
    name = "torchvision/squeezenet1_1"
    net = build_backbone(SimpleNamespace(backbone=name), 3).eval()
    save_model(tmp_path / "model", net, PREPROCESSING, ("a", "b", "c"))
    (tmp_path / "recipe.json").write_text(json.dumps({"backbone": name, "data": {}}))
    loaded, classes, preprocessing, _ = load_model(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert loaded(images).equal(net(images)) and classes == ("a", "b", "c") and preprocessing["std"] == [0.5] * 3
    assert not loaded.training


def test_a_repository_is_loaded_from_the_cache_without_a_network(run_folder, tmp_path, monkeypatch):
    """hf-hub:OWNER/NAME and its URL are the same model, and once it is in the cache, nobody is asked."""
    cache = tmp_path / "models--someone--red-or-blue"
    shutil.copytree(run_folder / "model", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    expected = load_model(run_folder)[0].state_dict()
    for source in ("hf-hub:someone/red-or-blue", "https://huggingface.co/someone/red-or-blue/tree/main"):
        net, classes, _, settings = load_model(source)
        assert classes == ("blue", "green", "red") and settings.loss == "cross_entropy"
        assert all(tensor.equal(expected[name]) for name, tensor in net.state_dict().items())


def test_a_hub_that_does_not_answer_is_one_message(tmp_path, monkeypatch, asked):
    """The hub is asked once a model, not again and again; a name that no repository can have is answered likewise."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for source in ("hf-hub:someone/something", "https://huggingface.co/someone/something", "hf-hub:///"):
        with pytest.raises(RecipeError, match=f"can't fetch config.json and model.safetensors of {source}"):
            load_model(source)
    assert asked == [("127.0.0.1", 9)] * 2


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize(
    "files,fault",
    [
        ({}, "no model in foreign: no foreign/config.json"),
        (
            {"config.json": '{"architecture": "resnet18"}', "pytorch_model.bin": pickle.dumps(Trap())},
            "foreign/model.safetensors",
        ),
        ({"config.json": '{"architecture": "resnet18"}', "model.safetensors": pickle.dumps(Trap())}, "timm can't load foreign"),
        ({"config.json": '{"architecture": "resnet81"}', "model.safetensors": ""}, "Unknown model .resnet81."),
        ({"config.json": '{"architectures": ["ResNetForImages"]}', "model.safetensors": ""}, "names no architecture"),
        ({"config.json": '{"architec', "model.safetensors": ""}, "can't read foreign/config.json"),
        ({"config.json": "[1, 2]", "model.safetensors": ""}, "can't read foreign/config.json"),
    ],
)
def test_a_foreign_folder_is_one_message_and_runs_nothing(tmp_path, monkeypatch, files, fault):
    """What is missing, cut or foreign is named; a pickle in the folder stays shut."""
    monkeypatch.chdir(tmp_path)
    Path("foreign").mkdir()
    for name, content in files.items():
        Path("foreign", name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=fault):
        load_model("foreign")
    assert not Path("sprung").exists()
