"""A model loaded again."""

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch

from finetune.data.sources import load_data
from finetune.export.export import export
from finetune.inference.evaluate import evaluate
from finetune.inference.predict import compute_logits
from finetune.models.backbone import build_backbone
from finetune.models.saved import beyond_chance, choose_model, find_model, load_model, model_to_use
from finetune.models.saving import save_model
from finetune.recipe.recipe import minimal_recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from helpers import PREPROCESSING, ROOT, predict

OWN = """
from torch import nn
from finetune import SGD, Constant, Data, Group, Recipe
from finetune.data.builtin import generated


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
    """A run of a function's network on a function's images, evaluated with mirror images."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    return run(folder / "own.py", folder / "out")


def test_a_functions_network_comes_back_from_its_run(own):
    """A network that the recipe's own function makes has, loaded again, the logits that the run wrote, mirrored ones too."""
    model = load_model(own)
    logits, _ = compute_logits(model, load_data(model.recipe).val, "stop", 0)
    assert logits.equal(safetensors.torch.load_file(own / "predictions.safetensors")["logits"])
    with pytest.raises(RecipeError, match="loaded from the whole run folder"):
        shutil.copytree(own / "model", own.parent / "alone")
        load_model(own.parent / "alone")


def test_a_torchvision_network_comes_back_from_its_run(tmp_path):
    """It is built by its name in recipe.json; the same images give the same logits."""
    name = "torchvision/squeezenet1_1"
    recipe = minimal_recipe(name, "digits", 64)
    net = build_backbone(recipe, 3).eval()
    save_model(tmp_path / "model", net, PREPROCESSING, ("a", "b", "c"))
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    loaded, classes, preprocessing, *_ = load_model(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert loaded(images).equal(net(images)) and classes == ("a", "b", "c") and preprocessing["std"] == [0.5] * 3
    assert not loaded.training


@pytest.mark.parametrize("schedule", [{"type": "Cosine", "floor": 0.0}, {"type": "Polynomial", "power": 2.0}], ids=str)
def test_a_run_of_version_0_1_is_still_of_use(run_folder, image_folder, tmp_path, schedule):
    """A recipe.json with norm_stats, score, Frozen and Polynomial gives predictions, metrics and exports as under new names."""
    old = shutil.copytree(run_folder, tmp_path / "old")
    values = json.loads((old / "recipe.json").read_text())
    del values["batch_norm"], values["metric"], values["lr_scale"]
    values |= {"norm_stats": "eval", "score": "top1", "schedule": {**schedule, "warmup_epochs": 0.5, "warmup_start": 0.01}}
    values["groups"][-1] = {"type": "Frozen", "name": "stem", "pattern": "conv1|bn1"}
    (old / "recipe.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = load_model(old)
    recipe = model.recipe
    assert (recipe.batch_norm, recipe.metric, recipe.groups[-1].lr) == ("frozen", "top1", 0)
    assert predict(old, [image_folder / "val"]) == predict(run_folder, [image_folder / "val"])
    found, expected = (evaluate(run, image_folder) for run in (old, run_folder))
    assert found == {**expected, "model": str(old)}
    card, about = export(old, "timm") / "README.md", export(old, "torch") / "model.json"
    assert "| top-1 |" in card.read_text() and json.loads(about.read_text())["classes"] == list(model.classes)


def test_a_run_in_fp16_is_evaluated_in_float32_on_a_cpu(run_folder, image_folder, tmp_path):
    """Its logits are those of the same run without mixed precision."""
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    half = shutil.copytree(run_folder, tmp_path / "half")
    values = json.loads((half / "recipe.json").read_text())
    assert values["mixed_precision"] == "no"
    (half / "recipe.json").write_text(json.dumps({**values, "mixed_precision": "fp16"}))
    assert load_model(half).recipe.mixed_precision == "fp16"
    assert predict(half, [image_folder / "val"]) == predict(run_folder, [image_folder / "val"])


@pytest.mark.parametrize(
    "last,best,best_epoch,probe,used,why",
    [
        (0.9, 0.9, 3, 0.8, "model", "the last epoch, and none was better"),
        (0.8, 0.8, -1, 0.8, "model", "none was better"),  # fine-tuning added nothing, and took nothing
        (0.5, 0.8, -1, 0.8, "model-best", "the linear probe had top-1 80.00 %, the last epoch 50.00 %"),
        (0.79, 0.8, -1, 0.8, "model-best", "the linear probe had"),  # it did not pay, chance or not
        (0.7, 0.9, 1, 0.8, "model-best", "epoch 2 had top-1 90.00 %, the last epoch 70.00 %, the linear probe 80.00 %"),
        (0.88, 0.9, 1, 0.8, "model", "the last epoch; epoch 2 had top-1 90.00 %, which may be chance"),
        (0.6, 0.9, 1, None, "model-best", "epoch 2 had top-1 90.00 %, the last epoch 60.00 %"),
    ],
)
def test_a_run_says_which_network_is_to_be_used(last, best, best_epoch, probe, used, why):
    """The last epoch's, but where the linear probe was better, or the best epoch by more than chance."""
    result = {"top1": last, "best_top1": best, "best_epoch": best_epoch, "val_images": 100}
    found, reason = model_to_use(result | ({"linear_probe_top1": probe} if probe else {}), "top1")
    assert found == used and why in reason
    if probe:  # its name in version 0.1
        assert model_to_use(result | {"head_top1": probe}, "top1") == (found, reason)
    assert model_to_use({"top1": last}, "top1")[0] == "model"  # of a run that kept no best


def test_chance_is_twice_the_standard_error_of_the_difference():
    """Of simulated pairs of runs of the same accuracy, 3 to 6 % differ by more, as the normal distribution has it."""
    drawn = np.random.default_rng(0).binomial(400, 0.8, (4000, 2)) / 400
    share = np.mean([beyond_chance(one, other, 400) for one, other in drawn])
    assert 0.03 < share < 0.06


def test_a_runs_network_is_chosen_by_what_the_run_says(run_folder, tmp_path):
    """What result.json says is obeyed, what is asked for outweighs it, and a path to a network is taken as it is."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    for said in ("model", "model-best"):
        (run / "result.json").write_text(json.dumps(result | {"use": said, "use_reason": "so it says"}))
        assert choose_model(run) == (str(run / said), "so it says") and find_model(run) == (run / said, run)
        for asked, name in (("last", "model"), ("best", "model-best")):
            assert choose_model(run, asked) == (str(run / name), "as asked for")
            assert choose_model(run / name) == (str(run / name), "") and find_model(run / name) == (run / name, run)
    for source in (run / "model", "hf-hub:someone/something"):
        with pytest.raises(RecipeError, match="one network, not a run with two: leave out the checkpoint"):
            choose_model(source, "best")
    with pytest.raises(RecipeError, match="checkpoint 'bset': there are last, best"):
        choose_model(run, "bset")


def test_a_run_before_its_end_has_its_best_epoch(run_folder, tmp_path):
    """Without its last network the message leads to the other, which loads."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    with pytest.raises(RecipeError, match="There is another: --checkpoint best"):
        load_model(run)
    assert load_model(choose_model(run, "best")[0]).classes == ("blue", "green", "red")


def test_a_recipe_that_can_not_be_read_is_one_message(run_folder, tmp_path):
    """A recipe.json that holds none, or one of a newer version, is named."""
    values = json.loads((run_folder / "recipe.json").read_text())
    run = shutil.copytree(run_folder, tmp_path / "run")
    for content in ({}, {"data": {}}, {**values, "data": 3}, {**values, "groups": {}}, {**values, "newer": 1}):
        (run / "recipe.json").write_text(json.dumps(content))
        with pytest.raises(RecipeError, match="recipe.json holds no recipe that can be read here"):
            load_model(run)


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
        net, classes, _, recipe, *_ = load_model(source)
        assert classes == ("blue", "green", "red") and (recipe.backbone, recipe.loss) == ("resnet18", "cross_entropy")
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
