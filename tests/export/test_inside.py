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


def test_timm_takes_neither(run_folder, tmp_path):
    """It normalises by itself."""
    for options in ({"preprocess": True}, {"half": True}):
        with pytest.raises(RecipeError, match="--preprocess and --half are for --to onnx and torch"):
            export(run_folder, "timm", tmp_path / "exported", **options)
    assert not list(tmp_path.iterdir())
