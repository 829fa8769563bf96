"""Exported models, loaded by timm, onnxruntime, torch and huggingface_hub alone."""

import dataclasses
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torchvision.models import squeezenet1_1

from finetune.__main__ import VERBS
from finetune.cli.parser import arguments
from finetune.export import describe
from finetune.export.describe import Examples, compare_logits
from finetune.export.export import export
from finetune.export.model_card import describe_origin
from finetune.models.saved import load_model
from finetune.models.saving import save_model
from finetune.recipe.load import chosen_recipe, load_recipe, override
from finetune.recipe.recipe import minimal_recipe
from finetune.recipe.serialize import from_dict, to_dict
from finetune.results.baseline import describe_record
from finetune.utils.errors import RecipeError
from helpers import PIXEL_ROUNDING, PREPROCESSING, ROOT, timm_alone


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A run folder of a network that is none of timm's."""
    run = tmp_path_factory.mktemp("foreign")
    inputs = {**PREPROCESSING, "input_size": (3, 64, 64), "crop_mode": "squash"}
    save_model(run / "model", squeezenet1_1(num_classes=2), inputs, ("a", "b"))
    recipe = dataclasses.replace(minimal_recipe("torchvision/squeezenet1_1", "gone", 64), loss="binary")
    (run / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    (run / "result.json").write_text("{}")
    return run


def by_hand(files, about):
    """Images as model.json says, with PIL and numpy alone: float32 [n, 3, H, W]; for crop_mode "center"."""
    inputs, size, rows = about["preprocessing"], about["preprocessing"]["input_size"][1], []
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
        factor = inputs["resize"] / min(image.size)
        shape = [inputs["resize"] if side == min(image.size) else int(side * factor) for side in image.size]
        image = image.resize(shape, getattr(Image.Resampling, inputs["interpolation"].upper()))
        left, top = (round((side - size) / 2) for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
        rows.append(((pixels - inputs["mean"]) / inputs["std"]).transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(rows), dtype=np.float32)


def logits_and_files(run_folder, image_folder):
    """What the run itself wrote of its validation images: logits [15, 3], and their files."""
    files = [file for name in ("blue", "green", "red") for file in sorted((image_folder / "val" / name).iterdir())]
    return safetensors.torch.load_file(run_folder / "predictions.safetensors")["logits"], files


def test_timm_alone_loads_the_exported_folder(run_folder, image_folder, tmp_path):
    """The folder, elsewhere, gives by timm's documented two lines the logits that the run wrote."""
    folder = export(run_folder, "timm", tmp_path / "exported")
    folder = folder.rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "curves.png", "model.safetensors"]
    expected, files = logits_and_files(run_folder, image_folder)
    torch.testing.assert_close(timm_alone(folder, files), expected, atol=PIXEL_ROUNDING, rtol=0)


def test_the_model_card_is_one_of_the_hubs(run_folder, tmp_path):
    """huggingface_hub reads its front matter: library, tags, licence, metrics and the run's own results."""
    card = ModelCard.load(export(run_folder, "timm", tmp_path / "exported") / "README.md")
    result = json.loads((run_folder / "result.json").read_text())
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == ("timm", "unknown", "image-classification")
    assert card.data.tags == ["image-classification", "timm"] and card.data.metrics == ["accuracy", "f1"]
    assert [(row.metric_type, row.metric_value) for row in card.data.eval_results] == [
        ("accuracy", result["top1"]),
        ("f1", result["macro_f1"]),
    ]
    for text in (
        "`resnet18`, fine-tuned on",
        "from random weights",
        f"| top-1 | {result['top1']:.2%} |",
        "That is 1 run, seed 3.",
        "crop_pct: 1.0",
        f"torch {torch.__version__}",
        "Data: not known here",
        "](curves.png)",
        "Classes, in the order of the logits: blue, green, red.",
    ):
        assert text in card.text
    assert str(run_folder.parent) not in card.content and "/images" not in card.content


def test_the_cards_command_is_that_of_the_run(run_folder, image_folder, tmp_path):
    """Typed again, with the folder of images in place of its name, it resolves to the run's recipe."""
    text = (export(run_folder, "timm", tmp_path / "exported") / "README.md").read_text()
    line = next(line for line in text.splitlines() if "finetune train" in line)
    words = shlex.split(
        line.replace(f"data.source={image_folder.name}", f"data.source={image_folder}").partition("finetune ")[2]
    )
    recipe, file, _ = chosen_recipe(arguments(words, VERBS))
    assert json.loads(json.dumps(to_dict(recipe))) == json.loads((run_folder / "recipe.json").read_text())
    assert file == ROOT / "recipes" / "resnet18_cifar.py"


def origin(run, name, recipe):
    """What a run's card says of its command and its spread."""
    (run / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    return describe_origin(run, name, recipe)


def test_the_card_gives_the_spread_of_a_recorded_recipe(tmp_path):
    """A run of a measured recipe, unchanged but for its seed, names that record; changed, it is one run."""
    name = "efficientnet_lite0_digits"
    recipe, file = load_recipe(name)
    shutil.copyfile(file, tmp_path / "recipe.py")
    number = describe_record(json.loads((ROOT / "recipes" / "baselines" / f"{name}.json").read_text()))
    command, spread = origin(tmp_path, name, dataclasses.replace(recipe, seed=7))
    assert (
        command == f"finetune train {name} --set seed=7" and spread == f"1 run, seed 7; the recipe's baseline: top-1 {number}"
    )
    changed = override(recipe, ["epochs=7", "groups.head.lr=2e-4"])
    command, spread = origin(tmp_path, name, changed)
    assert "--set epochs=7" in command and "--set groups.head.lr=0.0002" in command and spread == "1 run, seed 0"
    (tmp_path / "recipe.py").write_text(file.read_text().replace("AdamW(weight_decay=0.05)", "SGD(momentum=0.9)"))
    assert origin(tmp_path, name, recipe)[0].startswith("not known")
    (tmp_path / "recipe.py").unlink()
    assert origin(tmp_path, name, recipe)[0] == "not known: the recipe was made in a program"


@pytest.mark.parametrize(
    "assignment", ["optimizer.eps=1e-07", "augment.crop_scale=(0.5, 0.9)", "linear_probe=None", "class_weights='balanced'"]
)
def test_the_cards_command_repeats_every_kind_of_set(tmp_path, assignment):
    """An optimizer's option, a tuple, a part taken away and one that was not there come back as they were typed."""
    recipe, file = load_recipe("efficientnet_lite0_digits")
    shutil.copyfile(file, tmp_path / "recipe.py")
    resolved = from_dict(json.loads(json.dumps(to_dict(override(recipe, [assignment])))))
    words = shlex.split(origin(tmp_path, "efficientnet_lite0_digits", resolved)[0])
    assert override(recipe, words[words.index("--set") + 1 :: 2]) == override(recipe, [assignment])


def test_the_best_epochs_card_says_how_it_was_chosen(run_folder, tmp_path):
    """model-best is exported with its own metric, a smoke run without one."""
    result = json.loads((run_folder / "result.json").read_text())
    text = (export(run_folder / "model-best", "timm", tmp_path / "best") / "README.md").read_text()
    number = result["best_epoch"] + 1
    assert f"after {f'epoch {number}' if number else 'the linear probe'}, the best of them, chosen on these very" in text
    assert f"top-1 | {result['best_top1']:.2%}" in text and "macro F1" not in text
    shutil.copytree(run_folder, tmp_path / "smoke")
    (tmp_path / "smoke" / "result.json").write_text(json.dumps({**result, "smoke": True}))
    card = ModelCard.load(export(tmp_path / "smoke", "timm") / "README.md")
    assert "That is a SMOKE RUN" in card.text and card.data.eval_results is None


def test_onnxruntime_alone_gets_the_same_logits(run_folder, image_folder, tmp_path):
    """With images prepared by hand as model.json says, in batches of any size; labels lie in the file, too."""
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = export(run_folder, "onnx", tmp_path / "exported")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx"]
    about = json.loads((folder / "model.json").read_text())
    expected, files = logits_and_files(run_folder, image_folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = by_hand(files, about)
    for batch, logits in ((images, expected), (images[3:4], expected[3:4])):
        found = session.run([about["output"]], {about["input"]: batch})[0]
        np.testing.assert_allclose(found, logits, atol=PIXEL_ROUNDING, rtol=0)
    assert about["checked"]["on"] == "8 validation images" and 0 <= about["checked"]["largest_difference"] <= 1e-4
    inside = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert inside == {key: value for key, value in about.items() if key != "checked"}
    assert inside["classes"] == ["blue", "green", "red"] and inside["opset"] == 18


def test_torch_alone_loads_the_exported_program(run_folder, image_folder, tmp_path):
    """A process that imports torch and nothing else gets the same logits, and classes and preprocessing from the file."""
    folder = export(run_folder, "torch", tmp_path / "exported")
    about = json.loads((folder / "model.json").read_text())
    expected, files = logits_and_files(run_folder, image_folder)
    safetensors.torch.save_file({"images": torch.from_numpy(by_hand(files, about)), "logits": expected}, tmp_path / "tensors")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(
                (
                    "import sys, json, torch, safetensors.torch",
                    "net = torch.export.load('exported/model.pt2', extra_files=(extra := {'model.json': ''})).module()",
                    "tensors = safetensors.torch.load_file('tensors')",
                    "for rows in (slice(15), slice(3, 4)):",
                    "    found, expected = net(tensors['images'][rows]), tensors['logits'][rows]",
                    f"    torch.testing.assert_close(found, expected, atol={PIXEL_ROUNDING}, rtol=0)",
                    "print({'timm', 'finetune'} & set(sys.modules), extra['model.json'], sep='\\n')",
                )
            ),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("set()\n"), done.stderr
    assert json.loads(done.stdout.partition("\n")[2]) == {key: value for key, value in about.items() if key != "checked"}
    assert 0 <= about["checked"]["largest_difference"] <= 1e-4


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_any_network_is_exported(foreign, to):
    """Of torchvision, too; without the run's images, those it is tried on are generated, and model.json says so."""
    pytest.importorskip("onnxscript")
    about = json.loads((export(foreign, to) / "model.json").read_text())
    assert about["checked"]["on"] == "8 generated images" and about["classes"] == ["a", "b"]
    assert about["probabilities"] == "the sigmoid of logits / temperature"
    assert about["preprocessing"]["steps"][3] == "RGB; resized by PIL, bilinear: 64 x 64 pixels, whatever the shape"


class TwoAtOnce(torch.nn.Module):
    """A network that takes batches of two alone."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 2)

    def forward(self, images):
        return self.head(images.mean((2, 3)).reshape(2, 3).sum(1, keepdim=True).expand(2, 4))


def test_a_network_that_torch_can_not_export_is_one_message(foreign, tmp_path, monkeypatch):
    """A network that does not take any number of images is refused in one sentence, and no folder is left."""
    refused = load_model(foreign)._replace(net=TwoAtOnce().eval())
    monkeypatch.setattr(describe, "load_model", lambda source: refused)
    with pytest.raises(RecipeError, match="torch can't export this network for any number of images: .+"):
        export(foreign, "torch", tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_a_file_whose_logits_differ_is_not_handed_over(run_folder, tmp_path, monkeypatch):
    """A difference above 1e-4, or no number at all, is an error, and no folder is left."""
    net, noise = load_model(run_folder).net, Examples(torch.randn(4, 3, 32, 32), "noise")
    assert compare_logits(net, net, noise)["largest_difference"] == 0
    for wrong in (lambda batch: net(batch) + 3e-4, lambda batch: net(batch) * torch.nan, lambda batch: net(batch.flip(1))):
        with pytest.raises(RecipeError, match="differ from the original's"):
            compare_logits(net, wrong, noise)
    monkeypatch.setattr(describe, "TOLERANCE", -1.0)
    with pytest.raises(RecipeError, match="nothing was written"):
        export(run_folder, "torch", tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_named(run_folder, foreign, tmp_path, monkeypatch):
    """An unknown format, files in the way, a network that is not timm's, no run, a package that is missing."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    shutil.copytree(run_folder / "model", tmp_path / "alone")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    for call, fault in (
        (lambda: export(run_folder, "tflite"), "--to tflite: there are timm, gradio, onnx, torch$"),
        (lambda: export(run_folder, "torchscript"), "deprecated TorchScript: --to torch"),
        (lambda: export(run_folder, "timm", tmp_path / "full"), "full already holds files; name another --output"),
        (lambda: export(foreign, "timm"), "not one of timm's; --to onnx and torch take any"),
        (lambda: export(tmp_path / "alone", "onnx"), "no run folder to write into: name one with --output"),
        (lambda: export(tmp_path / "alone", "timm", tmp_path / "new"), "describes a finished run, and there is none"),
        (lambda: export(run_folder, "onnx"), "pip install onnx onnxscript onnxruntime"),
    ):
        with pytest.raises(RecipeError, match=fault):
            call()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"] and not (tmp_path / "new").exists()
