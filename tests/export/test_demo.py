"""The page to try a network on."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from finetune.export.export import export
from finetune.inference.predict import predict_images
from finetune.models.saved import load_model
from finetune.utils.errors import RecipeError


def load_app(folder, monkeypatch):
    """The module app.py, with a stand-in for gradio where it is not installed."""
    if importlib.util.find_spec("gradio") is None:
        monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    spec = importlib.util.spec_from_file_location("app", folder / "app.py")
    spec.loader.exec_module(app := importlib.util.module_from_spec(spec))
    return app


def test_the_app_says_what_predict_says(run_folder, image_folder, tmp_path, monkeypatch):
    """Elsewhere, by timm alone: each class's probability of each image, at the model's temperature."""
    folder = export(run_folder, "gradio", tmp_path / "demo").rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "model", "requirements.txt"]
    assert "finetune" not in (folder / "app.py").read_text() and len((folder / "app.py").read_text().splitlines()) < 35
    app, files = load_app(folder, monkeypatch), sorted((image_folder / "val").rglob("*.png"))[::5]
    for file, row in zip(files, predict_images(load_model(run_folder), files, top=3), strict=True):
        assert app.predict(Image.open(file)) == pytest.approx(dict(row["top"]), abs=5e-3)  # pixels are rounded elsewhere


def test_the_app_names_what_is_above_its_threshold(run_folder, image_folder, tmp_path, monkeypatch):
    """Of several labels an image: the classes that predict names, in the order of the classes."""
    run = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("model-best", "checkpoint*"))
    several = {"loss": "multi_label", "metric": "mean_average_precision"}
    for name, changes in (("recipe.json", several), ("model/config.json", {"thresholds": [0.01, 0.99, 0.45]})):
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))
    app, files = load_app(export(run / "model", "gradio", tmp_path / "demo"), monkeypatch), [*image_folder.glob("val/*/0.png")]
    for file, row in zip(files, predict_images(load_model(run / "model"), files, top=3), strict=True):
        probs, above = app.predict(Image.open(file))
        assert probs == pytest.approx(dict(row["top"]), abs=5e-3) and above == ", ".join(sorted(row["predicted"]))


def test_options_of_other_formats_are_refused(run_folder, tmp_path):
    """Normalisation and float16 are not the app's."""
    with pytest.raises(RecipeError, match="--preprocess, --half and --batch-size are for --to onnx and torch"):
        export(run_folder, "gradio", tmp_path / "demo", half=True)
