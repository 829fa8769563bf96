"""Exported networks with normalisation and probabilities inside, or in float16."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.export.export import export
from finetune.inference.predict import predict_images
from finetune.models.saved import load_model
from finetune.utils.errors import RecipeError


def returned(folder, images):
    """What an exported file returns of images, by its own library alone."""
    if (folder / "model.onnx").is_file():
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        (name,) = (one.name for one in session.get_inputs())
        return session.run(None, {name: images})[0], session.get_outputs()[0].name
    with torch.no_grad():
        return torch.export.load(folder / "model.pt2").module()(torch.from_numpy(images)).numpy(), None


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("preprocess", [False, True], ids=["logits", "probabilities"])
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_each_pair_of_options_is_exported(run_folder, tmp_path, to, preprocess, half):
    """Pixels give what `predict` says of such images; logits are the network's; float16 to the rounding of its layers."""
    pytest.importorskip("onnxscript")
    folder = export(run_folder, to, tmp_path / "exported", preprocess, half)
    about = json.loads((folder / "model.json").read_text())
    assert (about["preprocess"], about["half"]) == (preprocess, half)
    pixels = np.random.RandomState(0).randint(0, 255, (3, 32, 32, 3)).astype(np.uint8)
    model = load_model(run_folder)
    mean, std = (np.array(model.preprocessing[name], np.float32) for name in ("mean", "std"))
    normal = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    found, name = returned(folder, pixels if preprocess else np.ascontiguousarray(normal))
    assert name in (None, about["output"])
    if preprocess:
        rows = predict_images(model, [Image.fromarray(one) for one in pixels], top=3)
        wanted = np.array([[dict(row["top"])[name] for name in model.classes] for row in rows])
        assert about["output"] == "probabilities" and about["preprocessing"]["steps"][-1].startswith("uint8")
    else:
        with torch.no_grad():
            wanted = model.net(torch.from_numpy(normal)).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=(2e-2 if half else 1e-4) * max(1, np.abs(wanted).max()))
    size = sum(file.stat().st_size for file in folder.glob("model.*"))
    assert (size < 0.6 * (run_folder / "model" / "model.safetensors").stat().st_size) == half


@pytest.mark.parametrize("number", [1, 3, 10])
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_fixed_number_of_images(run_folder, tmp_path, to, number):
    """So many at once give the network's logits, within 1e-4; another number is refused by the program that loads the file."""
    pytest.importorskip("onnxscript")
    folder = export(run_folder, to, tmp_path / "exported", batch_size=number)
    assert json.loads((folder / "model.json").read_text())["batch"] == number
    images = np.random.RandomState(0).normal(size=(number, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = load_model(run_folder).net(torch.from_numpy(images)).numpy()
    found, _ = returned(folder, images)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))
    with pytest.raises(Exception, match="(?i)dimension|guard|shape|size"):
        returned(folder, np.concatenate([images, images]))


def test_timm_takes_none_of_them(run_folder, tmp_path):
    """It normalises by itself, and takes any number; no images at once are none to export for."""
    for options in ({"preprocess": True}, {"half": True}, {"batch_size": 1}):
        with pytest.raises(RecipeError, match="--preprocess, --half and --batch-size are for --to onnx and torch"):
            export(run_folder, "timm", tmp_path / "exported", **options)
    with pytest.raises(RecipeError, match="--batch-size starts at 1, not 0"):
        export(run_folder, "onnx", tmp_path / "exported", batch_size=0)
    assert not list(tmp_path.iterdir())
